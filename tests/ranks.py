"""Two processes of one group, as the tests of distributed work start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def on_two_ranks(entry: Path, cases: Any, folder: Path, *, timeout: float = 240) -> str:
    """Runs `entry FOLDER/cases.json` on two ranks; the output of both. Never hangs: all are killed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    code = "import sys; from vlmtune.cli import launch\nsys.exit(launch.start(2, [sys.argv[2]], entry=[sys.argv[1]]))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(entry), str(folder / "cases.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output[-3000:]}")
    assert process.returncode == 0, output[-5000:]
    return output
