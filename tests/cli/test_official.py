"""Official InternVL folders at the command line: nothing of them is run, what is broken is said in one paragraph."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.cli.main import main

VLMTUNE = (sys.executable, "-c", "from vlmtune.cli.main import entry; entry()")


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_folder("official-internlm2"), tmp_path / "model"))


def in_a_terminal(command: list[str], seconds: int = 120) -> tuple[int, str]:
    """Exit code and what stood on the screen; a program that asks a question waits here until the time is up."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        screen, end = b"", time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    screen += os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
            elif process.poll() is not None:
                break
        if process.poll() is None and time.monotonic() >= end:
            process.kill()
        code = process.wait()
    os.close(ours)
    return code, screen.decode(errors="replace")


def test_code_in_the_folder_is_neither_run_nor_asked_about(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    names = ("configuration_internvl_chat", "modeling_internvl_chat", "tokenization_internlm2", "processing_x")
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(witness)!r}, 'w').write('yes')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    picture = tmp_path / "a.png"
    PIL.Image.new("RGB", (60, 40), "red").save(picture)
    ask = [*VLMTUNE, "chat", str(folder), "--image", str(picture), "--ask", "What?", "--max-new-tokens", "2"]
    export = [*VLMTUNE, "export", str(folder), "-o", str(tmp_path / "out"), "--layout", "native"]
    for command in (ask, export):
        code, screen = in_a_terminal(command)
        assert code == 0, screen
        assert "y/N" not in screen and "custom code" not in screen
    assert not witness.exists()
    kept = {path.name for path in (tmp_path / "out" / "official").iterdir()}
    assert {f"{name}.py" for name in names} <= kept, "the code travels, for an export back"


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def lose_a_shard(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.1.attention.wqkv.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bend_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["mlp1.3.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.1.attention.wz.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def lose_the_picture_token(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<IMG_CONTEXT>", "<IMG_GONE>")
        (folder / name).write_text(text)


BROKEN = {
    "a shard is missing": (lose_a_shard, "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
    "a tensor is missing": (lose_a_tensor, "model.language_model.layers.1.self_attn.q_proj.weight"),
    "a tensor has another shape": (bend_a_tensor, "model.multi_modal_projector.linear_2.weight (3, 3) in the file"),
    "a tensor too many": (add_a_tensor, "language_model.model.layers.1.attention.wz.weight"),
    "another architecture": (
        lambda folder: change_config(folder, model_type="internvl_chat_9", architectures=["InternVLChatNine"]),
        "model_type 'internvl_chat_9' with architectures ['InternVLChatNine'] is not known",
    ),
    "another tower": (
        lambda folder: change_config(folder, vision_config__architectures=["SiglipVisionModel"]),
        "the vision tower is 'SiglipVisionModel'; expected InternVisionModel",
    ),
    "another decoder": (
        lambda folder: change_config(folder, llm_config__model_type="internlm9"),
        "the decoder is of model_type 'internlm9'",
    ),
    "no placeholder": (lose_the_picture_token, "the vocabulary lacks <IMG_CONTEXT>"),
    "the tokenizer is longer than the embedding": (
        lambda folder: change_config(folder, llm_config__vocab_size=300),
        "the tokenizer is longer than the embedding",
    ),
    "an unknown template": (lambda folder: change_config(folder, template="alpaca"), "the chat template 'alpaca'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_one_paragraph_and_nothing_is_written(
    fault: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking, message = BROKEN[fault]
    breaking(folder)
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--layout", "native"]) == 4
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in complaint and str(folder) in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_sharded_folder_is_read(folder: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    split_into_shards(folder)
    assert main(["export", str(folder), "-o", str(tmp_path / "out")]) == 0
    before, after = (
        load_file(at / "model.safetensors") for at in (tiny_folder("official-internlm2"), tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_layout_names_the_known_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--layout", "xtuner"]) == 2
    assert "no layout 'xtuner' for internvl; expected native or official" in capsys.readouterr().err


def test_info_tells_the_family_and_the_layout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["model"]
    assert (told["family"], told["layout"], told["missing"], told["unknown"]) == ("internvl", "official", 0, 0)
    assert told["parameters"]["vision"] and told["parameters"]["projector"] and told["parameters"]["language"]
