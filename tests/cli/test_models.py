"""`vlmtune eval`, `export`, `chat` and `info` as a user runs them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
from rows import write_embedding

from vlmtune.cli.main import main


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("internvl")


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A folder with rows, a picture and a YAML."""
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = [
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": "Yes."}],
        }
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {model}}}\n"
        "data: {workers: 0, sources: {path: rows.jsonl}, eval: {path: rows.jsonl}}\n"
        "eval: {max_new_tokens: 3}\ntrain: {output_dir: run, max_steps: 2, learning_rate: 0.01, global_batch_size: 3}\n"
    )
    return tmp_path


def test_eval_of_a_model_on_a_file(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / "rows.jsonl")
    arguments = ["eval", str(model), "--data", data, "--limit", "4", "--max-new-tokens", "3", "-o", str(folder / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "exact match" in printed and "0 of 4" in printed
    assert json.loads((folder / "out" / "results.json").read_text())["count"] == 4
    assert len((folder / "out" / "predictions.jsonl").read_text().splitlines()) == 4


def test_eval_of_a_run_before_training(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = str(folder / "run.yaml")
    assert main(["eval", yaml]) == 2
    assert "has not been trained yet" in capsys.readouterr().err
    out = folder / "out"
    assert main(["eval", yaml, "--model", str(model), "eval.batch_size=2", "-o", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    assert (record["settings"]["batch_size"], record["settings"]["max_new_tokens"]) == (2, 3)
    assert record["settings"]["max_length"] == 4096


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_exported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The eval loss of training is the loss that `eval` finds."""
    yaml = str(folder / "run.yaml")
    assert main(["train", yaml]) == 0
    assert main(["eval", yaml]) == 0
    best = json.loads((folder / "run" / "best.json").read_text())
    found = json.loads((folder / "run" / "eval" / "results.json").read_text())
    assert found["loss"] == pytest.approx(best["eval_loss"], abs=1e-5)
    assert main(["export", str(folder / "run"), "-o", str(folder / "out")]) == 0
    printed = capsys.readouterr().out
    assert "compared on a picture prompt" in printed and f"wrote {folder / 'out'}" in printed
    assert json.loads((folder / "out" / "export.json").read_text())["provenance"]["config"]["train"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "MODEL"], "Give --data FILE"),
        (["eval", "MODEL", "a=b", "--data", "x"], "'a=b' changes a YAML"),
        (["eval", "MODEL", "--model", "MODEL", "--data", "x"], "two models"),
        (["eval", "MODEL", "--data", "x", "--limit", "0"], "--limit: is 0; expected 1 or more"),
        (["chat", "MODEL", "--json"], "--json needs --ask"),
        (["chat", "/nowhere/model"], "no such folder"),
        (["export", "MODEL"], "-o"),
        (["export", "MODEL", "-o", "out", "--layout", "xtuner"], "no layout 'xtuner'"),
        (["info", "/nowhere/model"], "no such folder"),
    ],
)
def test_requests_that_make_no_sense(
    arguments: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model) if word == "MODEL" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err


def test_export_and_a_second_one(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(folder / "out")
    assert main(["export", str(model), "-o", out, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "= 2 × the difference of one merge and cast to bfloat16" in printed
    assert main(["export", str(model), "-o", out]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(model), "-o", out, "--overwrite", "--verify", "none"]) == 0
    assert "not compared" in capsys.readouterr().out


def test_an_export_whose_base_has_moved(
    folder: Path, adapter_folder_at: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_folder_at(Path("/gone/base"))
    assert main(["export", str(adapter), "-o", str(folder / "out")]) == 4
    assert "--base DIR" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.fixture
def adapter_folder_at(tmp_path: Path) -> Callable[[Path], Path]:
    def adapter(base: Path) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        return folder

    return adapter


def test_chat_answers_once(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(folder / "a.png")
    ask = ["chat", str(model), "--image", picture, "--image", picture, "--ask", "What?", "--max-new-tokens", "3"]
    assert main([*ask, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == [picture, picture] and said["question"] == "What?"
    assert main(ask) == 0
    assert capsys.readouterr().out == said["answer"] + "\n"


def test_chat_and_eval_with_embeddings(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = json.loads((model / "config.json").read_text())["text_config"]["hidden_size"]
    write_embedding(folder / "a.safetensors", 3, length, key="page")
    page = f"{folder / 'a.safetensors'}#page"
    picture = ["--image", str(folder / "a.png")]
    ask = ["chat", str(model), *picture, "--embedding", page, "--max-new-tokens", "3", "--json", "--ask"]
    for question in ("What is <embedding>?", "What?"):
        assert main([*ask, question]) == 0
        assert json.loads(capsys.readouterr().out)["embeddings"] == [page]
    assert main([*ask, "<embedding> <embedding>"]) == 3
    assert "the question says <embedding> 2 times, and 1 embedding would stand there" in capsys.readouterr().err

    write_embedding(folder / "wide.pt", 3, length + 1)
    with monkeypatch.context() as patched:
        patched.setattr("vlmtune.infer.session.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
        assert main(["chat", str(model), "--embedding", str(folder / "wide.pt"), "--ask", "?"]) == 3
    assert f"wide.pt has rows of {length + 1} numbers; expected {length}" in capsys.readouterr().err

    turns = [{"from": "human", "value": "<embedding>?"}, {"from": "gpt", "value": "Yes."}]
    (folder / "rows.jsonl").write_text(json.dumps({"embedding": "a.safetensors#page", "conversations": turns}))
    data = ["--data", str(folder / "rows.jsonl"), "--max-new-tokens", "3"]
    assert main(["eval", str(model), *data, "-o", str(folder / "out")]) == 0
    capsys.readouterr()
    assert main(["chat", str(model), "--embedding", page, "--ask", "<embedding>?", "--max-new-tokens", "3"]) == 0
    alone = capsys.readouterr().out
    (line,) = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["prediction"] + "\n" == alone


def test_chat_reads_lines_and_survives_a_missing_picture(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"/image {folder}/gone.png\n/image {folder}/a.png\nWhat?\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(model), "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "gone.png" in captured.err and "Traceback" not in captured.err
    assert "1 picture in your next turn" in captured.out


def test_chat_tells_a_bad_picture_before_it_loads_the_model(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmtune.infer.session.load_located", None)
    assert main(["chat", str(model), "--image", str(folder / "rows.jsonl"), "--ask", "?"]) == 3
    assert "is not a picture" in capsys.readouterr().err


def test_info_of_the_machine_and_of_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "internvl (InternVLForConditionalGeneration" in printed and "packing        yes" in printed


def test_info_counts_parameters_without_reading_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose weights are a hole on the disk: the header is all that is there."""
    from safetensors.torch import load_file

    folder = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    raw = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(raw[:header])
        file.truncate(len(raw))
    assert main(["info", str(folder), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    assert sum(described["parameters"].values()) == sum(tensor.numel() for tensor in tensors.values())
    assert (described["unknown"], described["missing"]) == (0, 0)
    assert described["pictures"]["448×448"][0] > 0
    assert described["frames"]["448×448"][0] > 0
    assert described["video"].count("<frame>") == 2 and described["box"][0]
