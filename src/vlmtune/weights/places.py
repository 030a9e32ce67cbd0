"""Which files hold the weights of a model folder: safetensors, or pickled ones where there are none, in one folder or
in the three of XTuner's LLaVA models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vlmtune.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
TOWER, PROJECTOR = "visual_encoder", "projector"
"""Folders inside the language model's, as XTuner writes a LLaVA model; their tensors have other names than its."""


POSITIONS, POSITIONS_AGAIN = "vision_model.embeddings.position_embedding.weight", "pos_emb"
"""AuroraCap's encoder holds its position table twice: in each forward it makes the first anew, from the second, in the
size of the picture."""


def folders(folder: Path) -> tuple[Path, ...]:
    """The folders whose weights together are the model's."""
    parts = tuple(folder / name for name in (TOWER, PROJECTOR) if (folder / name / "config.json").is_file())
    return (folder, *parts)


def is_plain(folder: Path) -> bool:
    """Whether the weights are the safetensors of this folder alone, as transformers reads them by itself."""
    return len(folders(folder)) == 1 and _has_safetensors(folder)


def without_safetensors(folder: Path) -> tuple[Path, ...]:
    """Those of `folders` that hold no safetensors: their weights are pickled, or not there."""
    return tuple(place for place in folders(folder) if not _has_safetensors(place))


def _has_safetensors(place: Path) -> bool:
    return any((place / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files with weights of one folder, and what its index says of them: name of a tensor -> name of its file.

    Raises:
        WeightsError: there are none, or not all.
    """
    for index, single in ((INDEX, SINGLE), (PICKLED_INDEX, PICKLED)):
        if (folder / index).is_file():
            return _listed(folder / index)
        if (folder / single).is_file():
            return [folder / single], {}
    raise WeightsError(
        "no folder of this name" if not folder.is_dir() else "no weights in safetensors files",
        where=str(folder),
        expected=f"{SINGLE}, or {INDEX} and its shards (or {PICKLED} in their stead)",
        remedy="Point to a model folder; weights in other files must be saved as safetensors first.",
    )


def _listed(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = [str(name) for name in dict.fromkeys(listed.values())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"the index cannot be read ({error})", where=str(index), expected="JSON with a weight_map"
        ) from None
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise WeightsError(
            f"the index names {outside[0]!r}, which lies outside the folder", where=str(index),
            expected="shards beside the index", remedy="Do not use this folder; download the model again.",
        )  # fmt: skip
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(files)} shards are missing: {', '.join(missing[:3])}",
            where=str(index.parent),
            remedy="Download or copy the folder again.",
        )
    return files, listed
