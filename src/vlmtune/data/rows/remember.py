"""What was learnt about files once, kept beside the prepared rows until the files change.

A file counts as unchanged while its size and its time of modification are; whoever sets times back deletes the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.arrays import map_arrays, pack_arrays
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.files import write_atomic

Known = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
"""Arrays and JSON notes."""


def remembered(folder: Path | None, kind: str, files: Sequence[str], learn: Callable[[], Known]) -> Known:
    """What `learn` finds out about `files`; from `folder`/index when it was found out before and no file changed.

    Args:
        folder: the folder of prepared rows; None remembers nothing.
        kind: tells apart different things about the same files, and their versions ("jsonl-1").
    """
    if folder is None:
        return learn()
    name = hashlib.blake2b("\0".join([kind, *files]).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = folder / "index" / f"{name}.safetensors"
    state = _state(files)
    if path.exists():
        try:
            arrays, notes = map_arrays(path)
            if notes["files"] == state:
                return arrays, notes["notes"]
        except (DataError, KeyError):
            pass  # written by another version, or damaged: it is only a memory
    known = learn()
    if state is not None and state == _state(files):
        # A folder that cannot be written (read-only, full) costs learning again next time, no more.
        with contextlib.suppress(VlmtuneError):
            write_atomic(path, pack_arrays(known[0], {"files": state, "notes": known[1]}))
    return known


def _state(files: Sequence[str]) -> list[list[Any]] | None:
    """Path, size and time of every file; None when one cannot be asked, which `learn` will report."""
    try:
        stats = [os.stat(file) for file in files]
    except OSError:
        return None
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
