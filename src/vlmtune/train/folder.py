"""The run folder: who may write to it, which run it belongs to, and whether that run is over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune.config.schema import FORMAT_VERSION, RunConfig
from vlmtune.errors import RunFolderError
from vlmtune.files import write_atomic
from vlmtune.train import checkpoint

LOCK_FILE = ".lock"
IDENTITY_FILE = "identity.json"
FINISHED_FILE = "finished.json"

# Keys that may change between two starts of one run: how it is launched, logged and saved, not what it learns. (Which
# rows are left out as bad is part of the plan, whose digest is compared as well.)
_FREE = {
    "train": {
        "output_dir", "micro_batch_size", "activation_checkpointing", "strategy", "deterministic", "log_every",
        "eval_every", "save_every", "keep_checkpoints", "early_stopping", "first_step_proof",
    },
    "tuning": {"native_base"},
    "data": {"workers", "prepared", "bad_rows", "max_bad_share"},
}  # fmt: skip


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this process; the lock goes with the process, however it ends.

    Raises:
        RunFolderError: another process holds it; names its id and host.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            # Not `flock`: workers inherit that one when they are forked, and may outlive a killed parent for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunFolderError(
                f"is in use by {holder}",
                where=str(run_dir),
                remedy="Wait until it ends, or choose another train.output_dir.",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def identity(config: RunConfig) -> dict[str, Any]:
    """What makes two runs the same one: dotted key -> value, of the sections model, tuning, data and train."""
    tree = config.model_dump(mode="json", include={"model", "tuning", "data", "train"})
    for section, keys in _FREE.items():
        for key in keys:
            tree[section].pop(key, None)
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def claim(run_dir: Path, config: RunConfig, data: Mapping[str, str] | None = None) -> None:
    """Makes the folder this run's, or checks that it is.

    A folder without a whole checkpoint belongs to nobody: a run that failed before its first one left nothing behind
    that a corrected start could spoil.

    Args:
        data: digests of the rows and of the plan, once they are known; without them only the configuration is compared,
            which needs no reading of data, and nothing is written.

    Raises:
        RunFolderError: it belongs to another run; lists the keys that differ.
    """
    file = run_dir / IDENTITY_FILE
    ours: dict[str, Any] = {"format_version": FORMAT_VERSION, "keys": identity(config), "data": dict(data or {})}
    if not file.exists() or not checkpoint.whole(run_dir):
        if data is not None:
            write_atomic(file, json.dumps(ours, indent=1, ensure_ascii=False))
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs["format_version"] != FORMAT_VERSION:
        raise RunFolderError(
            f"has format {theirs['format_version']}",
            where=str(run_dir),
            expected=f"format {FORMAT_VERSION}",
            remedy="Continue it with the version of vlmtune that began it, or choose another train.output_dir.",
        )
    differing = _differences(theirs["keys"], ours["keys"])
    if data is not None and not differing:
        differing = [f"{name} (changed)" for name in data if data[name] != theirs["data"].get(name)]
    if differing:
        raise RunFolderError(
            f"belongs to another run; these differ: {'; '.join(differing)}",
            where=str(run_dir),
            remedy="Choose another train.output_dir, or take the old values back to continue that run.",
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    missing = object()
    keys = [key for key in {**theirs, **ours} if theirs.get(key, missing) != ours.get(key, missing)]
    return [f"{key} (there {_shown(theirs, key)}, here {_shown(ours, key)})" for key in keys]


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"
    return text if len(text) <= 80 else text[:77] + "…"


def mark_finished(run_dir: Path, summary: Mapping[str, Any]) -> None:
    write_atomic(run_dir / FINISHED_FILE, json.dumps({"format_version": FORMAT_VERSION, **summary}, indent=1))


def finished(run_dir: Path) -> dict[str, Any] | None:
    """What `mark_finished` wrote, or None for a run that is not over."""
    file = run_dir / FINISHED_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
