"""Tensors by name that do not lie in safetensors shards, with the surface of `weights.shards.Shards`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmtune.errors import WeightsError
from vlmtune.weights import pickles
from vlmtune.weights.shards import Shards, TensorInfo, describe, read_header
from vlmtune.weights.strict import listed

_WRAPPED = ("state_dict", "module", "model")
"""Where a pickled checkpoint keeps its tensors: mmengine, DeepSpeed without ZeRO, plain PyTorch trainers."""


class Tensors:
    """A `Source` that is put together by hand.

    Args:
        folder: what messages name: the folder or file that the tensors come from.
        infos: what each tensor is, by name.
        read: gives one tensor as its info says; called each time that it is asked for.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
        self.folder = folder
        self._infos = dict(infos)
        self._read = read

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        """Raises:
        WeightsError: no tensor of this name.
        """
        if name not in self._infos:
            raise WeightsError(f"no tensor {name}", where=str(self.folder))
        return self._read(name)


def of_mapping(tensors: Mapping[str, torch.Tensor], place: Path) -> Tensors:
    infos = {name: describe(name, tensor.dtype, tensor.shape, place) for name, tensor in tensors.items()}
    return Tensors(place, infos, lambda name: tensors[name].detach())


def of_file(file: Path) -> Tensors:
    """A safetensors file that is no model folder's, such as an adapter's."""
    from safetensors import safe_open

    def read(name: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    return Tensors(file, {info.name: info for info in read_header(file)}, read)


def of_folders(places: Mapping[str, Path], where: Path) -> Tensors:
    """Model folders, the tensors of each under its own prefix.

    Args:
        places: prefix without its dot -> folder.
        where: what messages name.
    """
    sources = {prefix: Shards(place) for prefix, place in places.items()}
    infos = {
        f"{prefix}.{name}": replace(info, name=f"{prefix}.{name}")
        for prefix, source in sources.items()
        for name, info in source.infos.items()
    }

    def read(name: str) -> torch.Tensor:
        prefix, own = name.split(".", 1)
        return sources[prefix].read(own)

    return Tensors(where, infos, read)


def read_pickle(file: Path) -> tuple[Tensors, str]:
    """The tensors of a pickled checkpoint (``iter_500.pth``), and the training configuration that it holds as text.

    The text is empty where there is none: mmengine keeps it in ``meta.cfg``.

    Raises:
        WeightsError: a file that cannot be read, see `pickles.load`; one that holds no tensors by name.
    """
    held = pickles.load(file)
    if not isinstance(held, dict):
        raise WeightsError(f"the file holds a {type(held).__name__}", where=str(file), expected="a dictionary")
    inner = next((held[key] for key in _WRAPPED if isinstance(held.get(key), dict)), held)
    strangers = [
        str(name) for name, value in inner.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if strangers or not inner:
        raise WeightsError(
            f"{len(strangers)} of {len(inner)} entries are no tensors: {listed(strangers)}" if inner else "no tensors",
            where=str(file),
            expected="a state_dict: tensors by name, by itself or under the key state_dict",
        )
    return of_mapping(inner, file), config_text(held)


def config_text(held: Mapping[Any, Any]) -> str:
    """The configuration that mmengine wrote beside the weights, if it is plain text."""
    meta = held.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return text if isinstance(text, str) else ""
