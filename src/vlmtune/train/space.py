"""Disk space for checkpoints, looked at before the start rather than found missing at the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.config.schema import RunConfig
from vlmtune.errors import RunFolderError
from vlmtune.files import free_bytes
from vlmtune.train import checkpoint
from vlmtune.tuning.components import ComponentRow

_WEIGHT = 4  # bytes of a saved parameter: trained ones are float32
_ADAM = 8  # bytes of AdamW's two averages of a trained parameter


def checkpoint_bytes(config: RunConfig, parameters: Sequence[ComponentRow]) -> int:
    """About how large one checkpoint is: all weights under full tuning, else the trained ones, and the optimizer."""
    trained = sum(row.trained for row in parameters)
    saved = sum(row.total for row in parameters) if config.tuning.method == "full" else trained
    return saved * _WEIGHT + trained * _ADAM


def check(run_dir: Path, config: RunConfig, parameters: Sequence[ComponentRow]) -> None:
    """Refuses a run whose checkpoints cannot fit: those kept, the best one, and the one being written.

    Raises:
        RunFolderError: with both figures.
    """
    one = checkpoint_bytes(config, parameters)
    missing = max(1, config.train.keep_checkpoints + 2 - len(checkpoint.whole(run_dir)))
    free = free_bytes(run_dir)
    if missing * one > free:
        raise RunFolderError(
            f"up to {missing} checkpoints of about {one / 2**30:.2f} GiB will be written, "
            f"but {free / 2**30:.2f} GiB are free",
            where=str(run_dir),
            remedy="Free some space, choose another train.output_dir, or lower train.keep_checkpoints.",
        )
