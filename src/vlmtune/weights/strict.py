"""Strict loading: every parameter filled, every key of the files used, every shape right; else an error by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vlmtune.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 8
_OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids")


def check_loading(info: Mapping[str, Any], *, where: str) -> None:
    """Refuses what transformers' `from_pretrained(output_loading_info=True)` only warns about.

    Raises:
        WeightsError: a missing, unexpected or mis-shaped key, by name.
    """
    complaints = []
    for label, meaning in (
        ("missing_keys", "missing from the files (they would stay random)"),
        ("unexpected_keys", "in the files but not in the model"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(_name(entry) for entry in info.get(label) or ())
        if names:
            complaints.append(f"{len(names)} {meaning}: {listed(names)}")
    if complaints:
        raise WeightsError(
            "the weights do not fit the model: " + "; ".join(complaints),
            where=where,
            remedy="Download the folder again, or check that config.json belongs to these files.",
        )


def demanded(names: Iterable[str], ignored: Iterable[str] | None) -> list[str]:
    """The names that a model class does not let pass; `ignored` are its `_keys_to_ignore_on_load_*`, or None."""
    patterns = [re.compile(one) for one in ignored or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in patterns)]


def unread(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The tensors of files that a model has no place for, without those that transformers lets pass while it loads.

    Older versions of it wrote buffers that follow from config.json; where a model still has such buffers, they pass.

    Args:
        names: tensors that fill nothing.
        model: may lie on the meta device.
    """
    own = [name for name, _ in model.named_buffers()]
    passed = [rf"(^|\.){re.escape(one)}$" for one in _OLD_BUFFERS if any(name.endswith(one) for name in own)]
    return demanded(names, [*(model._keys_to_ignore_on_load_unexpected or ()), *passed])


def listed(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    key, *shapes = entry
    return f"{key} {' in the file, '.join(str(tuple(shape)) for shape in shapes)} in the model"


def unreadable(error: OSError | SafetensorError, folder: Path) -> WeightsError:
    """A broken or absent weight file as one paragraph."""
    return WeightsError(
        f"the weights cannot be read: {str(error).splitlines()[0]}",
        where=str(folder),
        expected="whole safetensors files, with model.safetensors.index.json if there are several",
        remedy="Download the folder again.",
    )
