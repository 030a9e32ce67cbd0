"""`vlmtune check` and `vlmtune preview` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from rows import write_embedding

from vlmtune.cli.main import main


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("internvl")


@pytest.fixture
def run_yaml(tmp_path: Path, model: Path) -> Path:
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    write_rows(tmp_path, [row(i) for i in range(12)])
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {model}}}\ndata:\n  workers: 0\n  sources: {{path: rows.jsonl}}\n")
    return path


def row(i: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {i}."}]
    return {"id": i, "image": "a.png", "conversations": turns, **more}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_check_of_good_data(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "train.epochs=3", "--decode", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Every row can be trained." in printed and "3 steps = 3 epochs" in printed
    assert " in 1 pack of at most " in printed and " tokens, 1 pack, 1 step\n" in printed
    report = json.loads(out.read_text())
    assert (report["rows"], report["bad"], report["steps"], report["images"]) == (12, [], 3, 12)
    assert 0 < report["trained_tokens"] < report["tokens"]


def test_check_lists_all_bad_rows_and_exits_with_3(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(run_yaml.parent, [row(i, **({} if i % 2 else {"image": f"gone{i}.png"})) for i in range(12)])
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "--json", str(out)]) == 3
    printed = capsys.readouterr().out
    assert "6 bad rows: a run would refuse to start." in printed and "… and 3 more" in printed
    bad = json.loads(out.read_text())["bad"]
    listed = run_yaml.parent / "runs" / "run" / "bad_rows.jsonl"
    assert str(listed) in printed.replace("\n", "")
    assert [json.loads(line) for line in listed.read_text().splitlines()] == bad
    assert [entry["origin"] for entry in bad] == [f"rows.jsonl:{i + 1}" for i in range(0, 12, 2)]
    assert all(f"gone{i}.png" in entry["reason"] for i, entry in zip(range(0, 12, 2), bad, strict=True))


def test_bad_rows_within_the_cap_are_told_and_listed_until_there_are_none(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = run_yaml.parent / "runs" / "run" / "bad_rows.jsonl"
    write_rows(run_yaml.parent, [row(i, **({"image": "gone.png"} if i == 4 else {})) for i in range(12)])
    assert main(["check", str(run_yaml), "data.bad_rows=drop", "data.max_bad_share=0.1"]) == 0
    assert "1 bad row would be dropped" in capsys.readouterr().out and listed.exists()
    assert main(["check", str(run_yaml), "data.bad_rows=drop", "data.max_bad_share=0.05"]) == 3
    assert "1 of 12 rows are bad, 8.33%" in " ".join(capsys.readouterr().out.split())
    write_rows(run_yaml.parent, [row(i) for i in range(12)])
    assert main(["check", str(run_yaml)]) == 0
    assert not listed.exists() and "bad_rows.jsonl" not in capsys.readouterr().out


def test_the_quick_look(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_yaml.parent / "check.json"
    assert main(["check", str(run_yaml), "--quick", "--json", str(out)]) == 0
    assert "No row is bad." in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["rows"], report["images"], report["tokens"], report["epoch"]) == (12, 12, None, {"rows.jsonl": 12})
    write_rows(run_yaml.parent, [row(0), row(1, image=None)])
    assert main(["check", str(run_yaml), "--quick"]) == 3
    assert "1 bad row: a run would refuse to start." in capsys.readouterr().out


def test_check_names_the_devices_it_cannot_divide_for(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run_yaml), "--devices", "3", "data.packing=false"]) == 2
    assert "error: train.global_batch_size: 16 rows per step cannot be dealt to 3 devices" in capsys.readouterr().err
    assert main(["check", str(run_yaml), "--devices", "0"]) == 2
    assert "no whole number from 1" in capsys.readouterr().err


def test_preview_shows_rows_in_training_order_or_one(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(run_yaml), "-n", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" trained (") == 2 and printed.count("[image 60×40 → ") == 2
    assert "An epoch: 12 rows in 1 step of 16" in printed
    assert main(["preview", str(run_yaml), "--row", "5"]) == 0
    printed = capsys.readouterr().out
    assert "rows.jsonl:5" in printed and "Number 4." in printed
    assert main(["preview", str(run_yaml), "--row", "55"]) == 2
    assert "no row is called '55' (the last row is rows.jsonl:12); expected rows.jsonl:N" in capsys.readouterr().err


def test_preview_marks_what_is_trained_without_colours(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(run_yaml), "--row", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("⟦trained⟧  not trained  [image]\n")
    inside = printed.split("\n", 2)[2].split("⟦")[1].split("⟧")[0]
    assert inside.startswith("Number 4.") and "What?" not in inside and "\x1b" not in printed


def test_preview_shows_what_is_wrong_with_a_row(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(run_yaml.parent, [row(0), row(1, image=None)])
    assert main(["preview", str(run_yaml)]) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "Number 0." in printed and "rows.jsonl:2: 1 <image> mark but 0 images. Add the missing path" in printed


def test_preview_writes_a_page(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_yaml.parent / "pages" / "preview.html"
    assert main(["preview", str(run_yaml), "-n", "3", "--html", str(page)]) == 0
    assert "preview.html: 3 rows, 0 bad, 0." in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert html.count("<article") == 3 and "Preview of run.yaml" in html and "12 rows in 1 step of 16" in html
    assert html.count("data:image/png;base64,") == sum(html.count(f"tile {i} of") for i in range(1, 5)) + html.count(
        "once more"
    )


def test_preview_shows_bad_rows_on_the_page(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(run_yaml.parent, [row(0), row(1, image="gone<i>.png")])
    page = run_yaml.parent / "preview.html"
    assert main(["preview", str(run_yaml), "--html", str(page)]) == 3
    assert "rows.jsonl:2: there is no file" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "gone&lt;i&gt;.png" in html and "gone<i>" not in html and "✗ bad row." in html
    assert main(["preview", str(run_yaml), "--row", "1", "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<article") == 1


def test_embeddings_are_counted_decoded_and_shown(
    run_yaml: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_yaml.parent
    length = json.loads((model / "config.json").read_text())["text_config"]["hidden_size"]
    write_embedding(folder / "page.pt", 5, length)
    torch.save(torch.full((2, length), torch.inf), folder / "inf.pt")
    turns = [{"from": "human", "value": "<image>\nRead <embedding>."}, {"from": "gpt", "value": "Yes."}]
    write_rows(folder, [row(i, embedding="page.pt", conversations=turns) for i in range(12)])
    out = folder / "check.json"
    assert main(["check", str(run_yaml), "--json", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "images embedded tokens" in printed and "Pictures and embeddings were read up to their headers" in printed
    report = json.loads(out.read_text())
    assert (report["images"], report["embedded"], report["sources"][0]["embedded"]) == (12, 60, 60)
    assert main(["preview", str(run_yaml), "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert "[embedding page.pt: 5 tokens]" in printed and "1 image, 1 embedding of 5 rows" in printed

    write_rows(folder, [row(0, embedding="inf.pt", conversations=turns), *(row(i) for i in range(1, 12))])
    assert main(["check", str(run_yaml)]) == 0
    assert main(["check", str(run_yaml), "--decode", "--json", str(out)]) == 3
    (bad,) = json.loads(out.read_text())["bad"]
    assert bad["origin"] == "rows.jsonl:1"
    assert bad["reason"].startswith(
        "the embedding inf.pt has NaN or infinity in 2 of its 2 rows, the first being row 1"
    )
