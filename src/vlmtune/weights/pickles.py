"""Pickled checkpoints, opened without running anything in them.

torch's `weights_only` reader builds tensors and plain containers alone. The checkpoints of DeepSpeed and mmengine hold
a few more classes beside the weights (loss scalers, logged numbers, the configuration). Those are named here and become
inert stubs that take any state and do nothing; every other global is refused by its name.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from vlmtune.errors import WeightsError


class Inert:
    """Stands for an object that is not looked at: takes whatever its pickle says, keeps nothing, runs nothing."""

    def __new__(cls, *args: Any) -> Inert:
        del args
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        del state  # object's own way would keep it as attributes


STUBBED = (
    # DeepSpeed, ZeRO-1/2/3 (found in checkpoints of deepspeed 0.19; older ones hold a subset)
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # mmengine's message hub and configuration (found in checkpoints of mmengine 0.10)
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    "mmengine.config.config.Config",
    "builtins.getattr",  # names the statistics of a HistoryBuffer; as a stub it gets nothing
    "__builtin__.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_COMPLAINT = re.compile(r"WeightsUnpickler error:\s*(.+)")


def load(file: Path) -> Any:
    """What the file holds; tensors lie on the CPU and are mapped from the disk where the format allows it.

    Raises:
        WeightsError: a global that is not in `STUBBED`, by name; a file that is cut off or no pickled checkpoint.
    """
    stubs: list[Any] = [(Inert, name) for name in STUBBED]
    try:
        with torch.serialization.safe_globals(stubs):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):  # the format before torch 1.6 cannot be mapped
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(str(error), file) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # torch reports damaged archives and pickles with any of these
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"the checkpoint cannot be read ({first})", where=str(file),
            expected="a whole file as torch.save wrote it", remedy="Copy it again.",
        ) from None  # fmt: skip


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors by name of a file of weights alone (``pytorch_model.bin``).

    Raises:
        WeightsError: see `load`; a file that holds something else.
    """
    held = load(file)
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise WeightsError("the file holds something else than weights", where=str(file), expected="tensors by name")
    return held


def _refused(message: str, file: Path) -> WeightsError:
    named, complaint = _GLOBAL.search(message), _COMPLAINT.search(message)
    found = (
        f"the pickle asks for {named[1]}, which is no part of a checkpoint that this program reads"
        if named
        else f"the pickle does what a checkpoint does not do ({complaint[1].strip() if complaint else message[:200]})"
    )
    return WeightsError(
        found, where=str(file),
        remedy="Nothing in it was run. If you trust the file, open it where it was written and save its state_dict "
        "alone with torch.save.",
    )  # fmt: skip
