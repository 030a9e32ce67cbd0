"""Rows as XComposer's fine-tuning scripts read them, through `vlmtune check`: what it names, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import PIL.Image
import pytest
from xcomposer2_models import furnish

from vlmtune.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(golden.OWN / "xcomposer2" / "vl", tmp_path_factory.mktemp("xcomposer2") / "vl")


@pytest.fixture
def run_yaml(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "img").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        PIL.Image.new("RGB", (60, 40), colour).save(tmp_path / "img" / f"{name}.png")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {model}}}\ndata:\n  workers: 0\n  max_length: 512\n  sources: {{path: data.txt}}\n"
    )
    (tmp_path / "data.txt").write_text("vl.json 0.004\ntext.json 0.002\n")
    return path


def row(*turns: str, images: int = 0, roles: tuple[str, str] = ("user", "assistant")) -> dict[str, Any]:
    said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    listed = [f"img/{name}.png" for name in "ab"[:images]]
    return {"id": "0", "conversations": said, **({"image": listed} if listed else {})}


GOOD = [
    row("<ImageHere> <ImageHere>Please describe these two images in detail.", "The first image......", images=2),
    row("<ImageHere> what is the color of the dog", "it is ....", images=1),
    row("<ImageHere>What?", "A cat.", "And <ImageHere>?", "A dog.", images=2, roles=("human", "gpt")),
]
TEXT = [row("你好", "你好，我是浦语·灵笔。"), row("Tell me something.", "Something.", "More.", "No.")]
BAD = [
    (row("<ImageHere>What?", "x", images=2), "1 <ImageHere> mark but 2 images. Put <ImageHere> into a user turn where"),
    (row("<ImageHere><ImageHere>?", "x", images=1), "2 <ImageHere> marks but 1 image. Add the missing path, or remove"),
    (row("What is in the image?", "x", images=1), "0 <image> marks but 1 image."),
    (row("Show me a tree.", "Here: <ImageHere>", images=1), "(The 1 in the answers count as text.)"),
    (row("<ImageHere>What?", images=1), "there is no assistant turn, so nothing can be learnt"),
    (row("<ImageHere>What?", "  \n", images=1), "the answer in message 2 is empty"),
    (row("Hi", "Yo", roles=("user", "model")), "message 2 has the unknown role 'model'"),
    (row("Hi", "Yo", roles=("assistant", "user")), "the first turn is the assistant's"),
    (row("long " * 200, "x"), "expected at most 512 (data.max_length)"),
    ({**row("<ImageHere>?", "x"), "image": ["img/gone.png"]}, "img/gone.png"),
]


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "vl.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "text.json").write_text(json.dumps(TEXT), encoding="utf-8")


def test_good_rows_of_a_data_txt(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(run_yaml.parent, GOOD)
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "--decode", "--json", str(out)]) == 0, capsys.readouterr()
    report = json.loads(out.read_text())
    assert report["rows"] == 5 and report["bad"] == []


def test_rows_that_would_train_nothing_or_lose_a_picture_are_named(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(run_yaml.parent, [GOOD[0], *(bad for bad, _ in BAD)])
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "--json", str(out)]) == 3
    bad = json.loads(out.read_text())["bad"]
    assert [entry["origin"] for entry in bad] == [f"vl.json:{i + 2}" for i in range(len(BAD))]
    for entry, (_, reason) in zip(bad, BAD, strict=True):
        assert reason in entry["reason"] and "\n" not in entry["reason"]
    assert f"{len(BAD)} bad rows: a run would refuse to start." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gone.json 1", "data.txt:2: there is no file gone.json"),
        ("text.json many", "data.txt:2: "),
        ("text.json 0", "data.txt:2: the number is 0; expected more than 0. Take the line out."),
        ("other.txt 1", "data.txt:2: other.txt: the source"),
        ("img 1", "data.txt:2: img: the folder holds no file with rows"),
        ("mess.json 1", "data.txt:2: mess.json: "),
    ],
)
def test_a_line_of_data_txt_that_is_wrong(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    _write(run_yaml.parent, GOOD)
    (run_yaml.parent / "data.txt").write_text(f"vl.json 0.004\n{line}\n")
    (run_yaml.parent / "other.txt").write_text("text.json 1\n")
    (run_yaml.parent / "mess.json").write_text("nothing like rows")
    assert main(["check", str(run_yaml)]) in (2, 3)
    printed = " ".join(capsys.readouterr().err.split())
    assert said in printed, printed


@pytest.mark.parametrize(
    ("style", "said"), [("xtuner", "model.chat: is xtuner, which has no form for InternLM-XComposer2"), ("newline", "")]
)
def test_other_forms_of_the_conversation(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], style: str, said: str
) -> None:
    _write(run_yaml.parent, GOOD)
    done = main(["check", str(run_yaml), f"model.chat={style}"])
    assert said in " ".join(capsys.readouterr().err.split()) and bool(done) == bool(said)


def test_pictures_of_more_tokens_than_can_be_counted(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths are 32-bit numbers: 10¹⁴ tokens would wrap around to a length that fits."""
    _write(run_yaml.parent, GOOD)
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "model.image.size=80000000", "--json", str(out)]) == 3, capsys.readouterr()
    bad = json.loads(out.read_text())["bad"]
    assert [entry["origin"] for entry in bad] == ["vl.json:1", "vl.json:2", "vl.json:3"]
    assert all("tokens; expected at most 2,147,483,647" in entry["reason"] for entry in bad)


def test_a_data_txt_for_the_evaluation_has_no_numbers(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(run_yaml.parent, GOOD)
    assert main(["check", str(run_yaml), f"data.eval={{path: {run_yaml.parent}/data.txt}}"]) == 2
    assert "take the numbers out of a copy of the list" in " ".join(capsys.readouterr().err.split())
    (run_yaml.parent / "eval.txt").write_text("vl.json\ntext.json\n")
    assert main(["check", str(run_yaml), f"data.eval={{path: {run_yaml.parent}/eval.txt}}"]) == 0, capsys.readouterr()
