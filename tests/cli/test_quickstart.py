"""`vlmtune quickstart` as a user runs it; export, chat, eval and resume on the folder that it leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Protocol

import pytest
import torch

from vlmtune.cli import main as cli
from vlmtune.cli.main import main
from vlmtune.config.load import load_config
from vlmtune.quickstart.places import RECORD
from vlmtune.weights.shards import Shards

whole = pytest.mark.slow


class Quickstart(Protocol):
    """What the fixture gives; see conftest.py."""

    root: Path
    printed: str
    cpu_seconds: float


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The verb works on one thread; called in this process it would leave the other tests with one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def figure(printed: str, pattern: str) -> float:
    (found,) = re.findall(pattern, printed, flags=re.MULTILINE)
    return float(found)


def answers(root: Path, stage: str, task: str) -> list[dict]:
    file = root / "eval" / f"{stage}-{task}" / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@whole
def test_it_learns_what_it_says(quickstart: Quickstart) -> None:
    printed = quickstart.printed
    assert figure(printed, r"^exact match, held-out digits: ([\d.]+) %") >= 95
    assert figure(printed, r"random weights: ([\d.]+) %\)$") < 30
    after = figure(printed, r"^exact match, held-out pairs:\s+([\d.]+) %")
    assert after >= 80 and after > figure(printed, r"before LoRA: ([\d.]+) %") + 50
    last = r"^after LoRA, the model in demo/model: ([\d.]+) % of the digits, [\d.]+ % of the pairs$"
    assert figure(printed, last) >= 95
    # On a quiet core this is the time that it takes; elsewhere a clock would measure the neighbours.
    assert quickstart.cpu_seconds < 300


@whole
def test_the_printed_figures_are_those_of_the_predictions(quickstart: Quickstart) -> None:
    rows = json.loads((quickstart.root / "data" / "digits.test.json").read_text())
    said = answers(quickstart.root, "full", "digits")
    assert len(said) == len(rows) >= 350
    right = sum(one["prediction"] == row["conversations"][1]["value"] for one, row in zip(said, rows, strict=True))
    shown = figure(quickstart.printed, r"^exact match, held-out digits: ([\d.]+) %")
    assert shown == pytest.approx(100 * right / len(rows), abs=0.05)


@whole
def test_the_exported_folder_answers_without_vlmtune(quickstart: Quickstart) -> None:
    first = answers(quickstart.root, "lora", "pairs")[0]
    row = json.loads((quickstart.root / "data" / "pairs.test.json").read_text())[0]
    images = [str(quickstart.root / "data" / image) for image in row["image"]]
    question = "Which digit is larger, the first or the second?"
    done = subprocess.run(
        [sys.executable, "-I", str(quickstart.root / "ask_plain.py"), question, *images],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == first["prediction"]
    assert "import vlmtune" not in (quickstart.root / "ask_plain.py").read_text()
    text = (quickstart.root / "model" / "config.json").read_text()
    assert json.loads(text)["model_type"] == "internvl" and "vlmtune" not in text


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.classes.append(f"{tag}.{(values.get('class') or '').split(' ')[0]}")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


@whole
def test_the_report_is_one_page_with_curves_and_answers(quickstart: Quickstart) -> None:
    text = (quickstart.root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.classes.count("svg.chart") == 2
    assert page.classes.count("li.example") >= 16
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    shown = figure(quickstart.printed, r"^exact match, held-out digits: ([\d.]+) %")
    assert f"{shown} %" in text and "vlmtune chat" in text


@whole
def test_chat_says_what_eval_recorded(quickstart: Quickstart, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((quickstart.root / "data" / "digits.test.json").read_text())[0]
    picture = str(quickstart.root / "data" / row["image"])
    for model in ("model", "runs/lora"):
        argv = ["chat", str(quickstart.root / model), "--image", picture, "--ask", "Which digit is this?"]
        assert main(argv) == 0
        assert capsys.readouterr().out.strip() == answers(quickstart.root, "lora", "digits")[0]["prediction"]


@whole
def test_eval_repeats_the_figures(quickstart: Quickstart, tmp_path: Path) -> None:
    rows = str(quickstart.root / "data" / "pairs.test.json")
    argv = ["eval", str(quickstart.root / "model"), "--data", rows, "--limit", "40", "--batch-size", "20"]
    assert main([*argv, "--max-new-tokens", "16", "-o", str(tmp_path)]) == 0
    said = [json.loads(line)["prediction"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert said == [one["prediction"] for one in answers(quickstart.root, "lora", "pairs")[:40]]


@whole
def test_export_gives_the_same_folder_again(quickstart: Quickstart, tmp_path: Path) -> None:
    assert main(["export", str(quickstart.root / "runs" / "lora"), "-o", str(tmp_path / "again")]) == 0
    ours, theirs = Shards(tmp_path / "again"), Shards(quickstart.root / "model")
    assert set(ours.infos) == set(theirs.infos)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.infos)


@whole
def test_its_configurations_train_after_an_edit(quickstart: Quickstart, tmp_path: Path) -> None:
    for stage in ("full", "lora"):
        out = tmp_path / stage
        argv = ["train", str(quickstart.root / f"{stage}.yaml"), "train.max_steps=2", f"train.output_dir={out}"]
        assert main(argv) == 0
        assert json.loads((out / "finished.json").read_text())["steps"] == 2


@whole
def test_the_next_steps_can_be_typed(quickstart: Quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.root.parent)
    _, _, tail = quickstart.printed.partition("What to try next:")
    commands = [shlex.split(line) for line in tail.splitlines() if line.startswith("  ") and "#" not in line]
    assert {command[0] for command in commands} == {"vlmtune", "tensorboard", "python"}
    for command in commands:
        if command[0] == "vlmtune":
            cli._parse(command[1], cli._load(command[1]), command[2:])
        paths = [word for word in command if word.startswith("demo/")]
        assert paths and all(Path(path).exists() for path in paths)


@whole
def test_a_finished_quickstart_repeats_its_result(quickstart: Quickstart, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in quickstart.root.rglob("*") if file.is_file()}
    assert main(["quickstart", str(quickstart.root)]) == 0
    again = capsys.readouterr().out
    assert "is finished" in again
    (line,) = re.findall(r"^exact match, held-out digits.*$", quickstart.printed, flags=re.MULTILINE)
    assert line in again
    assert {file: file.stat().st_mtime_ns for file in quickstart.root.rglob("*") if file.is_file()} == before


@whole
def test_an_interrupted_quickstart_goes_on(
    quickstart: Quickstart, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped between the stages: the export is made again, the training is not."""
    root = tmp_path / "demo"
    shutil.copytree(quickstart.root, root)
    record = json.loads((root / RECORD).read_text())
    for stage in ("export", "plain", "report"):
        del record["seconds"][stage]
    (root / RECORD).write_text(json.dumps(record))
    (root / "report.html").unlink()
    assert main(["quickstart", str(root)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2 and "20 of 20 answers are the same" in printed
    assert "step " not in printed
    assert (root / "report.html").is_file()


def test_only_data_and_only_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "small"
    assert main(["quickstart", str(root), "--only", "data"]) == 0
    assert {child.name for child in root.iterdir()} == {RECORD, "data"}
    assert len(list((root / "data" / "images").iterdir())) == 1797
    assert main(["quickstart", str(root), "--only", "model"]) == 0
    assert {child.name for child in root.iterdir()} == {RECORD, "data", "tiny"}
    assert "0.54 million parameters" in capsys.readouterr().out
    assert main(["info", str(root / "tiny")]) == 0
    # The rows and the model fit together without anything else.
    yaml = tmp_path / "run.yaml"
    rows = root / "data" / "pairs.val.json"
    yaml.write_text(f"model: {{path: {root / 'tiny'}}}\ndata: {{workers: 0, sources: {{path: {rows}}}}}\n")
    assert load_config(yaml).data.sources[0].path.endswith("pairs.val.json")
    assert main(["check", str(yaml)]) == 0


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["quickstart", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "not empty" in error and "Traceback" not in error
    assert [child.name for child in tmp_path.iterdir()] == ["notes.txt"]
