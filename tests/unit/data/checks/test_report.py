"""The report: every bad row, the counts of an epoch, the oddities, the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from vlmtune.config.schema import RunConfig, TrainConfig
from vlmtune.data.checks.render import render
from vlmtune.data.checks.report import Report, check, histogram, kinds
from vlmtune.data.encode import encode
from vlmtune.data.prepared.measure import BadRow
from vlmtune.errors import ConfigError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder

Row = dict[str, Any]


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(str(tiny_folder("internvl")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    PIL.Image.new("RGB", (5, 40), "red").save(tmp_path / "thin.png")
    return tmp_path


def row(question: str = "What?", answer: str = "A cat.", **more: Any) -> Row:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def report_on(
    folder: Path,
    opened: OpenedFolder,
    rows: list[Row] | dict[str, list[Row]],
    *,
    ways: dict[str, Row] | None = None,
    **more: Any,
) -> Report:
    """A report on files of rows; `more` are options of data and train, by their own names."""
    files = rows if isinstance(rows, dict) else {"a.jsonl": rows}
    for name, content in files.items():
        lines = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
        (folder / name).write_text(lines)
    opened_as = {name: {"path": str(folder / name), **(ways or {}).get(name, {})} for name in files}
    sources = [source for name, source in opened_as.items() if name != "eval.jsonl"]
    data = {"sources": sources, "workers": 0, "max_length": 300, "prepared": str(folder / "prepared")}
    if "eval.jsonl" in files:
        data["eval"] = opened_as["eval.jsonl"]
    own = {key: more.pop(key) for key in ("decode", "world", "quick") if key in more}
    train = {key: more.pop(key) for key in list(more) if key in TrainConfig.model_fields}
    config = RunConfig.model_validate({"model": {"path": "m"}, "data": {**data, **more}, "train": train})
    return check(config, opened, **own)


def shown(report: Report, listed: Path | None = None) -> str:
    console = Console(width=80, file=None, record=True, quiet=False, highlight=False)
    with console.capture() as capture:
        for piece in render(report, listed):
            console.print(piece)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_good_rows(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(f"What {'cat ' * i}?", f"It is {i}.", id=i) for i in range(30)]
    rows[0] = row("<image>\nWhat?", image="a.png", id=0)
    report = report_on(folder, opened, rows, global_batch_size=8, epochs=2, world=2)
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    encoded = [encode(report.train.corpus.sample(i), opened) for i in range(30)]
    assert data["ok"] and data["bad"] == [] and data["warnings"] == [] and data["rows"] == 30 and data["images"] == 1
    assert data["tokens"] == data["batch"]["tokens_per_epoch"] == sum(e.num_tokens for e in encoded)
    assert data["trained_tokens"] == sum(e.num_trained for e in encoded)
    assert (data["steps"], data["steps_per_epoch"], data["epoch"]) == (8, 4, {"a.jsonl": 30})
    assert data["micro_batches"] % 2 == 0 and data["packs"] == 4 * data["micro_batches"]
    longest = max(encoded, key=lambda e: e.num_tokens)
    assert data["longest"] == {"origin": longest.origin, "tokens": longest.num_tokens}
    assert sum(bin["rows"] for bin in data["lengths"]) == 30
    text = shown(report)
    assert "An epoch: 30 rows" in text and "The run: 8 steps = 2 epochs" in text and "× 2 devices" in text
    assert " ".join(text.split()).endswith("--decode reads all of them.") and "Every row can be trained." in text


def test_what_merging_leaves(folder: Path, tiny_folder: Callable[[str], Path]) -> None:
    """16 patches, r = int(16 × 0.5 ÷ 3) = 2 in two of three layers: 12 tokens of each of two pictures."""
    rows = [row("<image>\nWhat?", image="a.png"), row("<image>\nWhich?", image="thin.png"), row()]
    for quick in (False, True):
        report = report_on(folder, open_folder(tiny_folder("llava-merged")), rows, quick=quick)
        data = report.as_dict()
        assert (data["images"], data["visual_tokens"]) == (2, 24)
        assert "0.5 leaves 12 of 16 tokens of 32×32 pixels (75.0 %)" in data["about_pictures"]
        text = " ".join(shown(report).split())
        share = "" if quick else f", {int(1000 * 24 / data['tokens']) / 10:g}% of all"
        assert f"Pictures: 2 (with frames of videos), 24 tokens{share}; " in text and data["about_pictures"] in text


def test_every_bad_row_is_listed_grouped_and_stops_the_run(folder: Path, opened: OpenedFolder) -> None:
    bad = [row("<image>" * (i + 2), image="a.png") for i in range(5)]
    bad += [row("<image>", image="gone.png"), row(answer=""), row("cat " * 300)]
    report = report_on(folder, opened, [*bad, *[row() for _ in range(4)], "{'broken': 1}"])
    data = report.as_dict()
    assert report.refuses and not data["ok"]
    assert [entry["origin"] for entry in data["bad"]] == [f"a.jsonl:{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 13)]
    assert [entry["kind"] for entry in data["bad"]] == ["row"] * 7 + ["length", "row"]
    assert data["rows"] == 13 and data["sources"][0]["bad"] == 9 and data["epoch"] == {"a.jsonl": 4}
    titles = {title: len(rows) for title, rows in kinds(report.bad)}
    assert titles["N <image> marks but N images"] == 5 and titles["the row has N tokens"] == 1
    text = shown(report)
    assert all(f"a.jsonl:{i} " in text for i in (1, 2, 3, 6, 7, 8, 13)) and "… and 2 more" in text
    assert "5 rows with the same kind of mistake" in text
    assert text.strip().endswith("9 bad rows: a run would refuse to start.")


def test_over_long_rows_follow_the_policy(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(), row("cat " * 400), row()]
    refused = report_on(folder, opened, rows)
    assert [entry["origin"] for entry in refused.as_dict()["bad"]] == ["a.jsonl:2"]
    assert "expected at most 300 (data.max_length)" in refused.bad[0][1].reason
    dropped = report_on(folder, opened, rows, too_long="drop").as_dict()
    assert dropped["ok"] and dropped["bad"] == [] and dropped["dropped"] == 1 and dropped["epoch"] == {"a.jsonl": 2}
    nothing = report_on(folder, opened, rows[1:2], too_long="drop")
    assert nothing.refuses and nothing.as_dict()["steps"] == 0
    assert "data: no row is left to train on. So a run" in shown(nothing) and "1 row is longer than 300" in shown(
        nothing
    )


def test_decode_finds_truncated_pictures(folder: Path, opened: OpenedFolder) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    rows = [row("<image>", image="cut.jpg")]
    assert not report_on(folder, opened, rows).refuses
    report = report_on(folder, opened, rows, decode=True)
    assert report.refuses and "cut.jpg cannot be decoded" in shown(report)


def test_sources_and_how_they_are_mixed(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(f"{i}", f"{i}") for i in range(10)]
    files = {"a.jsonl": rows, "b.jsonl": rows[:4], "c.jsonl": rows[1:7], "d.jsonl": rows[3:9], "eval.jsonl": rows[5:8]}
    ways = {"a.jsonl": {"repeat": 1.5}, "b.jsonl": {"choose": 7}, "c.jsonl": {"weight": 1}, "d.jsonl": {"weight": 3}}
    report = report_on(folder, opened, files, ways=ways)
    data = report.as_dict()
    assert data["epoch"] == {"a.jsonl": 15, "b.jsonl": 7, "c.jsonl": 3, "d.jsonl": 9}
    assert data["batch"]["rows_per_epoch"] == 34 and data["rows"] == 26 and data["eval"]["rows"] == 3
    assert [source["mixing"] for source in data["sources"]] == ["repeat 1.5", "choose 7", "weight 1", "weight 3"]
    text = shown(report)
    assert "all" in text and all(f"({way})" in " ".join(text.split()) for way in ("repeat 1.5", "weight 3"))
    with pytest.raises(ConfigError, match=r"^data\.eval: the eval source eval\.jsonl has repeat 2"):
        report_on(folder, opened, files, ways={"eval.jsonl": {"repeat": 2}})


def test_equal_names_are_added_and_a_source_listed_twice_is_told(folder: Path, opened: OpenedFolder) -> None:
    (folder / "a.jsonl").write_text(json.dumps(row()))
    source = {"path": str(folder / "a.jsonl")}
    data = {"sources": [source, {**source, "repeat": 3}], "workers": 0, "prepared": str(folder / "prepared")}
    report = check(RunConfig.model_validate({"model": {"path": "m"}, "data": data}), opened)
    assert report.as_dict()["epoch"] == {"a.jsonl": 4}
    assert report.warnings == ["a.jsonl under data.sources is listed twice: an epoch takes its rows from each entry."]


def test_bad_rows_are_dropped_within_the_cap(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(str(i), str(i)) for i in range(9)] + [row(answer="")]
    report = report_on(folder, opened, rows, bad_rows="drop", max_bad_share=0.1)
    data = report.as_dict()
    assert (
        data["ok"] and [entry["origin"] for entry in data["bad"]] == ["a.jsonl:10"] and data["epoch"] == {"a.jsonl": 9}
    )
    assert "1 bad row would be dropped" in shown(report) and "allows 10.00%" in shown(report)
    over = report_on(folder, opened, rows, bad_rows="drop", max_bad_share=0.09)
    text = " ".join(shown(over).split())
    assert over.refuses and "1 of 10 rows are bad, 10.00%" in text and text.endswith("a run would refuse to start.")
    assert report_on(folder, opened, rows).refuses


def test_dropping_bad_rows_says_nothing_about_long_ones(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(), row("cat " * 400), row(answer="")]
    report = report_on(folder, opened, rows, bad_rows="drop", max_bad_share=1)
    assert report.refuses and [entry["kind"] for entry in report.as_dict()["bad"]] == ["length", "row"]
    both = report_on(folder, opened, rows, bad_rows="drop", too_long="drop", max_bad_share=1)
    assert not both.refuses and [entry["kind"] for entry in both.as_dict()["bad"]] == ["row"]


@pytest.mark.parametrize("quick", [False, True])
def test_an_evaluation_of_no_row_is_refused(folder: Path, opened: OpenedFolder, quick: bool) -> None:
    files = {"a.jsonl": [row()], "eval.jsonl": [row(answer="")]}
    report = report_on(folder, opened, files, bad_rows="drop", max_bad_share=1, quick=quick)
    assert report.refuses and "data.eval: no row is left to evaluate on" in " ".join(shown(report).split())


def test_a_source_without_a_usable_row_is_refused(folder: Path, opened: OpenedFolder) -> None:
    files = {"a.jsonl": [row()], "b.jsonl": [row(answer=""), row(answer=" ")]}
    report = report_on(folder, opened, files, bad_rows="drop", max_bad_share=1)
    assert report.refuses and "b.jsonl: none of its 2 rows can be trained" in " ".join(shown(report).split())
    assert report.as_dict()["steps"] == 0 and report.as_dict()["epoch"] == {"a.jsonl": 1, "b.jsonl": 0}


def test_steps_counted_in_tokens(folder: Path, opened: OpenedFolder) -> None:
    rows = [row("cat " * i, "dog " * i) for i in range(1, 41)]
    report = report_on(folder, opened, rows, global_batch_tokens=1200, world=2)
    data = report.as_dict()
    assert data["micro_batches"] == 4 and data["steps"] == -(-data["packs"] // 4)
    assert data["packs"] * 300 >= data["tokens"] > 0.9 * data["packs"] * 300
    text = " ".join(shown(report).split())
    assert "1,200 tokens (global_batch_tokens) in 4 packs of at most 300 tokens = 2 accumulated × 2 devices" in text
    assert f"{data['packs']} packs, {data['steps']} steps" in text


def test_the_quick_look_finds_the_same_bad_rows_and_oddities_without_tokens(folder: Path, opened: OpenedFolder) -> None:
    bad = [row("<image><image>", image="a.png"), row("<image>", image="gone.png"), row(answer="")]
    odd = [row("<image>", image="thin.png", rank=1), row("q", "an <image> tag", id=2), row("q", "x", id=2)]
    files = {"a.jsonl": [*bad, *odd, "{'broken': 1}"], "eval.jsonl": [row(), row(answer="")]}
    slow, quick = report_on(folder, opened, files), report_on(folder, opened, files, quick=True)
    assert quick.refuses and quick.bad == slow.bad and quick.warnings == slow.warnings and len(quick.warnings) == 3
    data, known = quick.as_dict(), slow.as_dict()
    assert json.loads(json.dumps(data)) == data
    same = ("ok", "rows", "bad", "dropped", "images", "epoch", "unknown_keys", "warnings")
    assert {key: data[key] for key in same} == {key: known[key] for key in same}
    nothing = ("tokens", "trained_tokens", "packs", "steps", "steps_per_epoch", "micro_batches", "longest")
    assert all(data[key] is None for key in nothing) and data["batch"] == {} and data["lengths"] == []
    assert data["sources"][0]["tokens"] is None and data["eval"]["tokens"] is None
    assert "5 bad rows: a run would refuse to start." in shown(quick)
    good = report_on(folder, opened, [row()], quick=True)
    assert not good.refuses and "No row is bad." in shown(good) and "Tokens per row" not in shown(good)


def test_the_quick_look_refuses_what_a_plan_would(folder: Path, opened: OpenedFolder) -> None:
    outside = row("<image>Where?", "<bbox>", image="a.png", objects={"ref": [], "bbox": [[1, 2, 1000, 2000]]})
    slow, quick = (report_on(folder, opened, [row(), outside], quick=quick) for quick in (False, True))
    assert quick.bad == slow.bad and "lies outside of its picture" in quick.bad[0][1].reason
    for quickly in (False, True):
        with pytest.raises(ConfigError, match="less than half a row"):
            report_on(folder, opened, [row()] * 3, ways={"a.jsonl": {"repeat": 0.1}}, quick=quickly)


def test_the_quick_look_works_in_processes_and_decodes(folder: Path, opened: OpenedFolder) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [row("<image>", image="cut.png" if i % 500 == 7 else "a.png", id=i) for i in range(1200)]
    one = report_on(folder, opened, rows, quick=True, decode=True)
    two = report_on(folder, opened, rows, quick=True, decode=True, workers=2)
    assert [entry.index for _, entry in one.bad] == [7, 507, 1007] and two.bad == one.bad
    assert np.array_equal(one.train.measured.id_hash, two.train.measured.id_hash)
    assert one.train.measured.num_images.sum() == 1197


def test_bad_eval_rows_count_as_well(folder: Path, opened: OpenedFolder) -> None:
    report = report_on(folder, opened, {"a.jsonl": [row()], "eval.jsonl": [row(answer="")]})
    assert report.refuses and report.as_dict()["bad"][0]["in"] == "data.eval"


def test_suspicious_things_are_warnings_not_errors(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(str(i), "yes" if i % 3 == 0 else f"no {i}", id=i) for i in range(30)]
    rows[4] = row("q", "an <image> tag", id=2, rank=1)
    rows[5] = row("<image>", "x", image="thin.png", id=5)
    report = report_on(folder, opened, {"a.jsonl": rows, "b.jsonl": rows[:9], "eval.jsonl": rows})
    assert not report.refuses
    warnings = "\n".join(report.warnings)
    assert "4 rows share their id with another row of their file (first: a.jsonl:3)." in warnings
    assert "2 rows have <image> marks in an answer; they are trained as text (first: a.jsonl:5)." in warnings
    assert "pictures narrower or lower than 8 pixels (first: a.jsonl:6)." in warnings
    assert "13 of 39 rows (33%) have the same answer, 'yes' (first: a.jsonl:1)." in warnings
    assert "eval.jsonl under data.eval is the same file as a.jsonl under data.sources" in warnings
    assert "keys that nothing reads: rank (2 rows)" in " ".join(shown(report).split())


def test_few_rows_may_have_the_same_answer(folder: Path, opened: OpenedFolder) -> None:
    assert report_on(folder, opened, [row(str(i), "yes") for i in range(19)]).warnings == []
    assert len(report_on(folder, opened, [row(str(i), "yes") for i in range(20)]).warnings) == 1


def test_a_model_that_cannot_pack_is_padded_and_batches_must_divide(folder: Path, opened: OpenedFolder) -> None:
    rows = [row(str(i), str(i)) for i in range(20)]
    report = report_on(folder, opened, rows, packing=False, micro_batch_size=2, global_batch_size=8)
    assert report.as_dict()["packs"] is None and report.as_dict()["micro_batches"] == 4
    assert "2 (micro_batch_size) × 4 accumulated × 1 device = 8 rows" in " ".join(shown(report).split())
    with pytest.raises(ConfigError, match="nearest are 6 and 9"):
        report_on(folder, opened, rows, packing=False, micro_batch_size=3, global_batch_size=8)


def test_histogram_covers_all_rows() -> None:
    assert histogram(np.array([])) == []
    assert histogram(np.array([5, 8, 9, 100])) == [(8, 2), (16, 1), (32, 0), (64, 0), (128, 1)]
    assert histogram(np.array([1, 1])) == [(1, 2)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("there is no file /a/b.png (the row says b.png).", "there is no file /a/c d/x.png (the row says x)."),
        ("2 <image> marks but 1 image. Add it.", "1 <image> mark but 0 images. Add it."),
        ("a.png is not a picture: it begins with b'x'", "b.png is not a picture: it begins with b'y: z'"),
        ("broken JSON at character 3 (Expecting value): x", "broken JSON at character 1,234 (Extra data): y"),
        ("message 2 has the unknown role 'robot'; expected", "message 4 has the unknown role 'tool'; expected"),
    ],
)
def test_kinds_look_past_names_and_numbers(one: str, other: str) -> None:
    rows = [("data.sources", BadRow("a:1", reason, 0)) for reason in (one, other)]
    groups = kinds(rows)
    assert len(groups) == (2 if "c d" in other else 1), groups  # a name with a space is not recognised as a name


def test_of_very_many_bad_rows_a_few_of_each_kind_are_shown(folder: Path, opened: OpenedFolder) -> None:
    text = shown(report_on(folder, opened, [*[row(answer="") for _ in range(250)], row()]))
    assert "250 rows with the same kind of mistake" in text
    assert "a.jsonl:3 " in text and "a.jsonl:4 " not in text
    assert "… and 247 more" in text
