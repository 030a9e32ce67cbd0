"""With a model folder nothing looks for the network: the sockets are closed, and a whole job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import write_rows, write_yaml

CLOSED = """
import socket, sys

def refuse(*arguments, **keywords):
    sys.stderr.write(f"NETWORK {arguments[-1:]}\\n")
    raise OSError("the network is closed")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
from vlmtune.cli.main import entry
entry()
"""


@pytest.mark.slow
def test_a_job_needs_no_network(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path, num=8)
    yaml = write_yaml(tmp_path, tiny_folder("llava"), rows, {"train": {"max_steps": 1}, "tuning": {"method": "lora"}})
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    for argv in (
        ["check", str(yaml)],
        ["train", str(yaml)],
        ["info", str(tmp_path / "run")],
        ["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", CLOSED, *argv], capture_output=True, text=True, check=False, env=environ
        )
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        assert "NETWORK" not in done.stderr, argv
        assert "warning" not in (done.stdout + done.stderr).lower(), (argv, done.stdout, done.stderr)
