"""Progress: every item passes, and a log file gets few lines."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmtune import progress


def test_every_item_passes_and_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(1000), total=1000, label="rows")) == list(range(1000))
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_long_work_writes_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 3))  # three seconds an item
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert len(list(progress.track(range(12), total=12, label="rows [x]"))) == 12
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rows [x]: 4/12 (33 %), about 24 s left"
    assert len(lines) == 4
    assert lines[-1].startswith("rows [x]: 12/12 in ")


def test_an_error_passes_through() -> None:
    def broken() -> object:
        yield 1
        raise ValueError("row 2")

    with pytest.raises(ValueError, match="row 2"):
        list(progress.track(broken(), total=2, label="rows"))


def test_muted_ranks_are_silent() -> None:
    code = (
        "from vlmtune import progress; progress.SECONDS_BETWEEN_LINES = 0; progress.mute()\n"
        "assert list(progress.track(range(3), total=3, label='rows')) == [0, 1, 2]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
