"""Processes of a run: started here, or by torchrun or srun, whose variables are understood.

Own processes rather than `torch.distributed.run` of itself: that one turns every exit code into 1 and prints a wall of
text around the one paragraph that says what is wrong. The variables are the same, so nothing else notices.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from types import FrameType
from typing import IO

from vlmtune.errors import UsageError

_DEFAULT_PORT = 29500
_SECONDS_TO_SAVE = 300.0  # between a signal to stop and the end of patience
_SECONDS_AFTER_A_DEATH = 10.0
_ENTRY = ("-m", "vlmtune")


def adopt_slurm(environ: MutableMapping[str, str] | None = None) -> None:
    """Translates the variables of srun into those of torch.distributed; does nothing outside of srun or under torchrun.

    Raises:
        UsageError: a variable of SLURM's or torchrun's cannot be read, or they do not fit each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        _check_torchrun(env)
        return
    if "SLURM_PROCID" not in env or _number(env, "SLURM_NTASKS", "1") < 2:
        return
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        _number(env, name, "0")
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["LOCAL_WORLD_SIZE"] = _first_count(env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1"))
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_JOB_NODELIST", "localhost")))
    # Two jobs on one node must not meet; all processes of a job must find the same number.
    env.setdefault("MASTER_PORT", str(_DEFAULT_PORT + int(env.get("SLURM_JOB_ID", "0")) % 10000))


def _check_torchrun(env: Mapping[str, str]) -> None:
    """torch would answer a wrong variable with a traceback, or wait for processes that never come."""
    rank, world = _number(env, "RANK", "0"), _number(env, "WORLD_SIZE", "1")
    _number(env, "LOCAL_RANK", "0")
    if rank >= world:
        raise UsageError(f"is {rank} while WORLD_SIZE is {world}", where="RANK", expected="a number below WORLD_SIZE")


def _number(env: Mapping[str, str], name: str, default: str) -> int:
    value = env.get(name, default)
    if not value.isdecimal():
        raise UsageError(
            f"is {value!r}",
            where=name,
            expected="a whole number, as the launcher sets it",
            remedy="Unset it to start without that launcher.",
        )
    return int(value)


def first_host(nodes: str) -> str:
    """First host of SLURM's short notation: ``gpu[003-007,12],login1`` -> ``gpu003``."""
    match = re.fullmatch(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?(?:,.*)?", nodes)
    if match is None:
        raise UsageError(f"cannot be read: {nodes!r}", where="SLURM_JOB_NODELIST", remedy="Set MASTER_ADDR yourself.")
    name, number, rest = match.groups()
    return f"{name}{number or ''}{rest or ''}"


def _first_count(counts: str) -> str:
    """``8(x2),4`` -> ``8``."""
    return re.split(r"\D", counts, maxsplit=1)[0] or "1"


def processes_to_start(environ: Mapping[str, str] | None = None) -> int:
    """How many processes to start here: NPROC_PER_NODE, else one per visible GPU; 1 inside a started process.

    Raises:
        UsageError: NPROC_PER_NODE is no positive number.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        return 1
    asked = env.get("NPROC_PER_NODE")
    if asked is not None:
        if not asked.isdecimal() or not int(asked):
            raise UsageError(f"is {asked!r}", where="NPROC_PER_NODE", expected="the number of processes, 1 or more")
        return int(asked)
    return _visible_gpus(env)


def _visible_gpus(env: Mapping[str, str]) -> int:
    """Counted without importing torch here: a parent that holds a CUDA context would take memory from its children."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return len([name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def start(num: int, arguments: Sequence[str], entry: Sequence[str] = _ENTRY) -> int:
    """Runs `vlmtune ARGUMENTS` in `num` processes of this machine and returns the exit code of the run.

    The first process speaks; what the others write is kept aside and shown only if they fail where it does not.
    """
    port = str(_free_port())
    with tempfile.TemporaryDirectory(prefix="vlmtune-ranks-") as folder:
        children: list[subprocess.Popen[bytes]] = []
        outputs: list[IO[bytes] | None] = []
        for rank in range(num):
            # Closed with the process; a handle that outlives this block would keep the folder's disk space.
            output: IO[bytes] | None = open(os.path.join(folder, str(rank)), "w+b") if rank else None  # noqa: SIM115
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num),
                "LOCAL_WORLD_SIZE": str(num),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads(num))}
            children.append(
                subprocess.Popen(
                    [sys.executable, *entry, *arguments],
                    env={**os.environ, **variables, **threads},
                    stdout=output,
                    stderr=output,
                )
            )
            outputs.append(output)
        try:
            code, guilty = _wait(children)
            if guilty:
                _show(guilty, outputs[guilty])
        finally:
            for output in outputs:
                if output is not None:
                    output.close()
    return code


def _threads(num: int) -> int:
    return max(1, (os.cpu_count() or 1) // num)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(children: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Waits for all; the first failure ends the others. Returns the exit code and the rank that it comes from.

    Signals to this process are passed on, so that the run saves itself.
    """
    deadline = float("inf")

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal deadline
        del frame
        deadline = min(deadline, time.monotonic() + _SECONDS_TO_SAVE)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    failed: list[int] = []
    try:
        while any(child.poll() is None for child in children):
            fresh = [rank for rank, child in enumerate(children) if child.poll() and rank not in failed]
            if fresh and not failed:
                # The others wait for the dead one in a collective that never ends; give them time for a last word.
                deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_A_DEATH)
            failed += fresh
            if time.monotonic() > deadline:
                for child in children:
                    child.kill()
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed += [rank for rank, child in enumerate(children) if child.returncode and rank not in failed]
    if not failed:
        return 0, 0
    # A process that failed of itself has a positive code; those that were torn down after it come later.
    guilty = next((rank for rank in failed if children[rank].returncode > 0), failed[0])
    code = children[guilty].returncode
    if code > 1 and children[0].returncode == code:
        guilty = 0  # it was refused alike and has said so; 1 may be the echo of another's death
    return (code if code > 0 else 128 - code), guilty


def _show(rank: int, output: IO[bytes] | None) -> None:
    if output is None:
        return
    output.seek(0)
    sys.stderr.write(output.read().decode(errors="replace")[-20_000:])
    sys.stderr.write(f"(process {rank} of this run)\n")
