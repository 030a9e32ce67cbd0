"""InternLM-XComposer2 through the runs of its finetune scripts: full, LoRA and beyond, and back to official folders."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import start
from runs import losses, make_config, write_rows, write_yaml
from safetensors.torch import load_file, save_file

import vlmtune
from vlmtune.errors import ConfigError, ExportError, WeightsError
from vlmtune.export import verify
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.train.run import TrainResult, train

ADAPTED = r"model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.w[123])\.weight"
PROJECTOR = r"vision_proj\.[02]\.(weight|bias)|plora_(glb|sub)_GN"
# Behind what the projector reads; and where no answer of these rows follows a picture directly.
IDLE = r".*\.post_layernorm\.\w+|model\.layers\.1\.(attention\.wo|feed_forward\.w\d)\.Plora_[AB]\.weight"
TUNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"method": "full", "partial_lora_dropout": 0.05}, rf"(?!{IDLE}).*"),
    "lora": ({"method": "lora", "rank": 8, "dropout": 0.05, "partial_lora_dropout": 0.05}, ADAPTED),
    "projector": ({"method": "lora", "rank": 8, "train": ["projector"]}, f"{ADAPTED}|{PROJECTOR}"),
    "qlora": ({"method": "qlora", "rank": 8}, ADAPTED),
}


def _train(folder: Path, base: Path, rows: Path, **sections: Any) -> TrainResult:
    data = {"max_length": 1024, **sections.pop("data", {})}
    return train(make_config(folder, base, rows, data=data, **sections))


def _logits(path: Path, **options: Any) -> list[torch.Tensor]:
    return load(path, device="cpu", **options).logits(verify.fixed_prompts())


def assert_same_logits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for before, after in zip(one, other, strict=True):
        torch.testing.assert_close(after, before, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("xcomposer2", "full"),
        ("xcomposer2-4khd", "full"),
        ("xcomposer2", "lora"),
        ("xcomposer2-4khd", "projector"),
        ("xcomposer2", "qlora"),
    ],
)
def test_official_in_official_out(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, kind: str, name: str
) -> None:
    """The loss falls; the export is an official folder that differs where it was trained only, with equal logits."""
    base = tiny_folder(kind)
    tuning, trained = TUNINGS[name]
    section = {"epochs": 6, "learning_rate": 3e-3 if name == "full" else 2e-2, "schedule": "constant"}
    result = _train(tmp_path, base, rows, tuning=tuning, train=section)
    found = [loss for _, loss in losses(result.run_dir)]
    assert sum(found[-3:]) < sum(found[:3]) - 1.0, found

    out = export(result.run_dir, tmp_path / "out", device="cpu").out
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {one for one in before if not torch.equal(before[one], after[one])}
    assert changed == {one for one in before if re.fullmatch(trained, one)}
    fields = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == fields
    assert (out / "modeling_internlm_xcomposer2.py").is_file()
    if name != "qlora":  # there the trained model is the 4-bit one
        assert_same_logits(_logits(result.run_dir), _logits(out))


def test_a_full_checkpoint_goes_on_as_the_official_folder(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    result = _train(tmp_path, tiny_folder("xcomposer2-4khd"), rows, train={"max_steps": 1})
    kept = {file.name for file in result.best.iterdir()}
    assert {"official.json", "vision_tower_config.json", "tokenizer.json", "modeling_internlm_xcomposer2.py"} <= kept
    # The checkpoint is the base of another run, whose result is official again.
    again = _train(tmp_path / "again", result.best, rows, tuning=TUNINGS["lora"][0], train={"max_steps": 1})
    out = export(again.run_dir, tmp_path / "out", device="cpu")
    assert out.layout == "official"
    assert_same_logits(_logits(again.run_dir), _logits(out.out))


def test_official_to_native_and_back_is_bit_exact(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    for kind in ("xcomposer2", "xcomposer2-4khd"):
        base = tiny_folder(kind)
        native = export(base, tmp_path / kind / "native", layout="native", device="cpu")
        back = export(native.out, tmp_path / kind / "back", layout="official", device="cpu")
        assert all(one.difference == 0.0 for one in (*native.comparisons, *back.comparisons))
        before, after = load_file(base / "model.safetensors"), load_file(back.out / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert json.loads((back.out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
        assert not back.notes
        tower, written = (json.loads((one / "vision_tower_config.json").read_text()) for one in (base, back.out))
        assert tower.items() <= {**written, "architectures": tower["architectures"]}.items()


def test_a_tower_trains_beside_an_adapter_on_a_base_without_the_unused_norm(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    """The publisher's training leaves it out where it trained the tower; PEFT's copy of the tower has it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("xcomposer2"), base)
    whole = load_file(base / "model.safetensors")
    save_file({n: t for n, t in whole.items() if "post_layernorm" not in n}, base / "model.safetensors")
    tuning = {"method": "lora", "rank": 4, "train": ["vision"]}
    result = _train(tmp_path, base, rows, tuning=tuning, train={"max_steps": 1, "precision": "bfloat16"})
    for layout in ("official", "native"):
        out = export(result.run_dir, tmp_path / layout, layout=layout, device="cpu").out
        assert not any("post_layernorm" in name for name in load_file(out / "model.safetensors"))
        assert_same_logits(_logits(result.run_dir), _logits(out))


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    """Partial LoRA's dropout is drawn from the random state that a checkpoint holds, and set again."""
    tuning = {"method": "full", "partial_lora_dropout": 0.3}
    section = {"epochs": 2, "save_every": 1, "activation_checkpointing": True}
    sections: dict[str, dict[str, Any]] = {"tuning": tuning, "train": section, "data": {"max_length": 1024}}
    base, step = tiny_folder("xcomposer2-4khd"), random.SystemRandom().randint(2, 5)
    runs = []
    for name, at in (("whole", 0), ("broken", step)):
        yaml = write_yaml(tmp_path / name, base, rows, sections)
        if at:
            assert start(yaml, at, int(signal.SIGKILL)).returncode == -signal.SIGKILL
        ended = start(yaml)
        assert ended.returncode == 0, ended.stderr
        runs.append(tmp_path / name / "run")
    assert losses(runs[0]) == losses(runs[1]), f"killed at step {step}"
    first, second = (load_file(run / "checkpoint-6" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first), f"killed at step {step}"
    without = _train(tmp_path / "without", base, rows, train=section)
    assert losses(without.run_dir) != losses(runs[0])


def test_the_proof_waits_for_pictures(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Tower, projector and partial LoRA are demanded at the first step with a picture, and named if none comes."""
    base = tiny_folder("xcomposer2")
    text = write_rows(tmp_path / "text", num=4, text_only=4)
    said: list[str] = []
    config = make_config(tmp_path / "a", base, text, data={"max_length": 1024})
    train(config, say=said.append)
    notes = "\n".join(said)
    # Of 20 tensors of partial LoRA, those of the last layer's outputs are never demanded.
    assert "12 tensors of language could not be proven: it needs a row with a picture" in notes, notes
    assert "tensors of vision could not be proven" in notes and "4 tensors of projector" in notes
    mixed = write_rows(tmp_path / "mixed", num=6, text_only=5)
    said.clear()
    section = {"global_batch_size": 1}
    train(make_config(tmp_path / "b", base, mixed, data={"max_length": 1024, "packing": False}, train=section),
          say=said.append)  # fmt: skip
    assert "could not be proven" not in "\n".join(said)


def test_dropout_of_partial_lora_is_refused_elsewhere(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    tuning = {"method": "lora", "partial_lora_dropout": 0.05}
    with pytest.raises(ConfigError, match=r"partial_lora_dropout.*has no effect: this model has no partial LoRA"):
        _train(tmp_path, tiny_folder("internvl"), rows, tuning=tuning)


AUTO = """
import sys, torch
from peft import AutoPeftModelForCausalLM
import vlmtune.models
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**inputs, use_cache=False).logits, sys.argv[3])
"""


def auto_peft_logits(adapter: Path, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a prompt with a picture: plain PEFT's in a process of its own, and ours."""
    session = load(adapter, device="cpu")
    inputs = session.inputs([session.encode(verify.fixed_prompts()[1])])
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(adapter), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", AUTO, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        return torch.load(tmp_path / "logits.pt"), session.model(**inputs, use_cache=False).logits


def test_peft_opens_an_adapter_on_a_native_base_by_itself(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    tuning = TUNINGS["projector"][0]
    result = _train(tmp_path, tiny_folder("xcomposer2-4khd-native"), rows, tuning=tuning, train={"max_steps": 2})
    theirs, ours = auto_peft_logits(result.best, tmp_path)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    back = export(result.run_dir, tmp_path / "out", layout="official", device="cpu").out
    assert_same_logits(_logits(result.run_dir), _logits(back))


def test_peft_opens_an_adapter_on_an_official_base_through_a_native_one(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path
) -> None:
    base, native = tmp_path / "base", tmp_path / "native"
    base.symlink_to(tiny_folder("xcomposer2"))
    tuning = {**TUNINGS["lora"][0], "native_base": str(native)}
    said: list[str] = []
    sections: dict[str, Any] = {"tuning": tuning, "data": {"max_length": 1024}, "model": {"image": {"size": 42}}}
    config = make_config(tmp_path / "a", base, rows, **sections, train={"max_steps": 2})
    result = train(config, say=said.append)
    assert any(str(native) in line for line in said)
    settings = json.loads((result.best / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(native)
    theirs, ours = auto_peft_logits(result.best, tmp_path)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    # An export goes back to the official layout.
    back = export(result.run_dir, tmp_path / "out", device="cpu")
    assert back.layout == "official"
    assert [note for note in back.notes if re.search("of 42 pixels, and were of 28 in the base.*build_mlp.py", note)]
    # The second run finds the native base; nothing is written again.
    written = (native / "model.safetensors").stat().st_mtime_ns
    _train(tmp_path / "b", base, rows, **sections, train={"max_steps": 1})
    assert (native / "model.safetensors").stat().st_mtime_ns == written
    # The official folder has moved: the native one takes its place. Both have: the remedy is said, and works.
    before = _logits(result.run_dir)
    base.unlink()
    assert_same_logits(before, _logits(result.run_dir))
    native.rename(tmp_path / "moved")
    for call in (lambda: vlmtune.load(result.run_dir), lambda: vlmtune.export(result.run_dir, tmp_path / "none")):
        with pytest.raises(WeightsError, match=r"point to it: --base DIR \(in Python: base=DIR\)"):
            call()
    for place in (tmp_path / "moved", tiny_folder("xcomposer2")):
        assert_same_logits(before, _logits(result.run_dir, base=place))


@pytest.mark.parametrize(
    ("kind", "found"),
    [("internvl", "class is transformers' own"), ("xcomposer2-native", "is in the native layout")],
)
def test_a_native_base_without_effect_is_refused(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, kind: str, found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        _train(tmp_path, tiny_folder(kind), rows, tuning={"method": "lora", "native_base": str(tmp_path / "n")})


def test_another_model_is_no_native_base(tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path) -> None:
    tuning = {"method": "lora", "native_base": str(tiny_folder("xcomposer2-4khd-native"))}
    with pytest.raises(WeightsError, match="is no native export of"):
        _train(tmp_path, tiny_folder("xcomposer2"), rows, tuning=tuning)
    small = {"method": "lora", "native_base": str(tiny_folder("xcomposer2-native"))}
    with pytest.raises(WeightsError, match=r"not made for this run's pictures.*size is 42"):
        _train(tmp_path, tiny_folder("xcomposer2"), rows, tuning=small, model={"image": {"size": 42}})
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").touch()
    with pytest.raises((WeightsError, ExportError), match="is in use"):
        tuning["native_base"] = str(tmp_path / "used")
        _train(tmp_path, tiny_folder("xcomposer2"), rows, tuning=tuning)
