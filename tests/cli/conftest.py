"""One whole quickstart for all tests that need a trained model."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

VLMTUNE = (sys.executable, "-c", "from vlmtune.cli.main import entry; entry()")


@dataclass(frozen=True, slots=True)
class Quickstart:
    """root: its folder; tests may read it and add to `runs/`, but change nothing. printed: standard output."""

    root: Path
    printed: str
    cpu_seconds: float


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """`vlmtune quickstart demo`, run once per session in a process of its own (about two minutes on a quiet core)."""
    working = tmp_path_factory.mktemp("quickstart")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*VLMTUNE, "quickstart", "demo"], cwd=working, env=environ, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Quickstart(working / "demo", done.stdout, seconds)
