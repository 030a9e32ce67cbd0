"""Which folders a quickstart enters, and which stages it does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.errors import UsageError
from vlmtune.quickstart.places import RECORD, STAGES, enter


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls: list[str] = []
    record = enter(tmp_path / "new")
    assert record.once("data", lambda: calls.append("data")) is True
    again = enter(tmp_path / "new")
    assert again.once("data", lambda: calls.append("data")) is False
    assert calls == ["data"] and not again.finished
    for stage in STAGES:
        again.once(stage, lambda: None)
    assert enter(tmp_path / "new").finished


def test_a_stage_that_failed_is_done_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        enter(tmp_path).once("data", fail)
    assert enter(tmp_path).once("data", lambda: None) is True


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UsageError, match="not empty and not a quickstart"):
        enter(tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        enter(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 9, "seconds": {}}', "has format 9"),
        ('{"version": 1}', "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_a_foreign_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(UsageError, match=message):
        enter(tmp_path)


def test_the_record_counts_seconds(tmp_path: Path) -> None:
    enter(tmp_path).once("data", lambda: None)
    assert json.loads((tmp_path / RECORD).read_text()) == {"version": 1, "seconds": {"data": 0.0}}
