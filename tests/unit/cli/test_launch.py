"""Processes and the variables that describe them, without torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmtune.cli import launch
from vlmtune.errors import UsageError


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-007,12],login1", "gpu003"),
        ("a-b-[9,11-12]", "a-b-9"),
        ("n1,n2", "n1"),
        ("rack[1-2]-x", "rack1-x"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host


def test_slurm_is_translated() -> None:
    env = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_JOB_NODELIST": "gpu[01-02]",
        "SLURM_JOB_ID": "123456", "SLURM_TASKS_PER_NODE": "8(x2)",
    }  # fmt: skip
    launch.adopt_slurm(env)
    expected = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu01"}
    assert expected.items() <= env.items()
    assert env["MASTER_PORT"] == str(29500 + 3456)
    assert launch.processes_to_start(env) == 1  # srun has started them


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_slurm_is_left_alone(env: dict[str, str]) -> None:
    before = dict(env)
    launch.adopt_slurm(env)
    assert env == before


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "abc"}, "SLURM_NTASKS"),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, "SLURM_PROCID"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7.batch"}, "SLURM_JOB_ID"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "[3"}, "SLURM_JOB_NODELIST"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"}, "LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
    ],
)
def test_variables_that_make_no_sense_are_named(env: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: "):
        launch.adopt_slurm(env)


def test_user_address_stands_above_slurm() -> None:
    env = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    launch.adopt_slurm(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "4000")


def test_how_many_processes_to_start() -> None:
    assert launch.processes_to_start({"NPROC_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "0"}) == 3
    assert launch.processes_to_start({"NPROC_PER_NODE": "3", "RANK": "1"}) == 1
    assert launch.processes_to_start({"CUDA_VISIBLE_DEVICES": "0,2"}) == 2
    assert launch.processes_to_start({"CUDA_VISIBLE_DEVICES": ""}) == 0
    for wrong in ("0", "two", "-1"):
        with pytest.raises(UsageError, match="NPROC_PER_NODE"):
            launch.processes_to_start({"NPROC_PER_NODE": wrong})


def _entry(tmp_path: Path, code: str) -> list[str]:
    (tmp_path / "rank.py").write_text("import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + code)
    return [str(tmp_path / "rank.py")]


def test_ranks_get_their_variables_and_arguments(tmp_path: Path) -> None:
    code = (
        f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join([os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'],"
        " os.environ['MASTER_ADDR'], sys.argv[1]]))\n"
    )
    assert launch.start(3, ["train"], entry=_entry(tmp_path, code)) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"3 {rank} 127.0.0.1 train" for rank in range(3)
    ]


def test_exit_code_and_last_words_of_the_rank_that_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "if rank == 1:\n    print('error: row 7'); sys.exit(3)\nif rank == 2:\n    print('hidden')\n"
    assert launch.start(3, [], entry=_entry(tmp_path, code)) == 3
    shown = capfd.readouterr()
    assert "error: row 7" in shown.err and "process 1" in shown.err and "hidden" not in shown.out + shown.err


def test_what_all_say_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "time.sleep(0.5 * (1 - rank))\nprint('error: fsdp2'); sys.exit(2)\n"
    assert launch.start(2, [], entry=_entry(tmp_path, code)) == 2
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("error: fsdp2") == 1


def test_the_others_do_not_wait_for_a_dead_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_SECONDS_AFTER_A_DEATH", 0.2)
    began = time.monotonic()
    code = "sys.exit(2) if rank == 0 else time.sleep(60)\n"
    assert launch.start(2, [], entry=_entry(tmp_path, code)) == 2
    assert time.monotonic() - began < 20


def test_killed_rank_gives_the_code_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_SECONDS_AFTER_A_DEATH", 0.2)
    code = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)\n"
    assert launch.start(2, [], entry=_entry(tmp_path, code)) == 128 + signal.SIGKILL


def test_signal_reaches_all_ranks(tmp_path: Path) -> None:
    code = (
        f"ready = r'{tmp_path}/ready' + str(rank)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "open(ready, 'w').close()\ntime.sleep(60)\n"
    )
    entry = _entry(tmp_path, code)
    script = f"from vlmtune.cli import launch; raise SystemExit(launch.start(2, [], entry={entry!r}))"
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 143
