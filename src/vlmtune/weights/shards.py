"""Read and write safetensors folders one tensor at a time.

A folder holds either one ``model.safetensors`` or several shards with ``model.safetensors.index.json``. `Shards` looks
only at headers until a tensor is asked for; `write_shards` lays down the header of each shard first and then streams
the tensors into it, so that neither side ever holds more than one tensor. Pickled weights (``pytorch_model.bin``) are
read where a folder has no others, without running anything in them, and never written.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmtune.errors import WeightsError
from vlmtune.weights.places import INDEX, POSITIONS, POSITIONS_AGAIN, SINGLE, folders, weight_files

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no larger ones either

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_TORCH = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {name: code for code, name in _TORCH.items()}
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Codes of the dtypes that a change of the floating dtype applies to (float8 weights are quantised, not cast)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about a tensor; `dtype` is the safetensors code (``F32``, ``BF16``, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * _BYTES[self.dtype]


def dtype_code(name: str) -> str:
    """``bfloat16`` -> ``BF16``."""
    return _NAMES[name]


def dtype_name(code: str) -> str:
    """``BF16`` -> ``bfloat16``."""
    return _TORCH[code]


def describe(name: str, dtype: torch.dtype, shape: Sequence[int], place: Path) -> TensorInfo:
    """
    Raises:
        WeightsError: a dtype that safetensors cannot hold.
    """
    try:
        return TensorInfo(name, dtype_code(str(dtype).removeprefix("torch.")), tuple(shape))
    except KeyError:
        raise WeightsError(f"{name} has the dtype {dtype}", where=str(place), expected="plain numbers") from None


class Source(Protocol):
    """Tensors by name, one at a time; `Shards` is one."""

    folder: Path

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor: ...


class Shards:
    """The tensors of a model folder by their names on disk.

    Args:
        folder: a folder with weights; of the three of an XTuner model, the language model's.

    Raises:
        WeightsError: no weights, a shard that the index names is missing, or a file that is cut off or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._info: dict[str, TensorInfo] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        for place in folders(folder):
            self._add(place)
        if POSITIONS_AGAIN in self._info:
            self._info[POSITIONS] = replace(self._info.pop(POSITIONS_AGAIN), name=POSITIONS)

    def _add(self, place: Path) -> None:
        files, listed = weight_files(place)
        for file in files:
            for info in self._read_pickle(file) if file.suffix == ".bin" else read_header(file):
                if info.name in self._info:
                    raise WeightsError(
                        f"the tensor {info.name} is in {self._file_of[info.name].name} and in {file.name}",
                        where=str(self.folder),
                        expected="every tensor once",
                        remedy="Download or save the folder again.",
                    )
                self._info[info.name], self._file_of[info.name] = info, file
        lost = sorted(set(listed) - set(self._info))
        if lost:
            raise WeightsError(
                f"the index lists {len(lost)} tensors that no shard holds, the first is {lost[0]}",
                where=str(place),
                remedy="Download or save the folder again.",
            )

    def _read_pickle(self, file: Path) -> list[TensorInfo]:
        from vlmtune.weights import pickles

        tensors = pickles.load_tensors(file)
        self._pickled.update(tensors)
        return [describe(name, tensor.dtype, tensor.shape, file) for name, tensor in tensors.items()]

    def __len__(self) -> int:
        return len(self._info)

    def __contains__(self, name: object) -> bool:
        return name in self._info

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Header entries by name, in the order of the files."""
        return self._info

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype.

        Raises:
            WeightsError: the folder has no tensor of this name.
        """
        from safetensors import safe_open

        if name not in self._info:
            raise WeightsError(f"no tensor {name}", where=str(self.folder), remedy="Download or save the folder again.")
        if name == POSITIONS and POSITIONS_AGAIN in self._file_of:
            name = POSITIONS_AGAIN
        if name in self._pickled:
            return self._pickled[name].detach()
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def main_dtype(source: Source) -> str:
    """The floating dtype that most numbers of a folder have, by torch's name.

    Raises:
        WeightsError: there are no floating weights.
    """
    sizes: dict[str, int] = {}
    for info in source.infos.values():
        if info.dtype in FLOATING:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_elements
    if not sizes:
        raise WeightsError("no floating weights in this folder", where=str(source.folder))
    return dtype_name(max(sizes, key=lambda code: sizes[code]))


def read_header(file: Path) -> list[TensorInfo]:
    """The entries of a safetensors file in the order of their bytes; no weights are read.

    Raises:
        WeightsError: the file is no safetensors file or is shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _broken(file, "no safetensors header")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ends = sorted((v["data_offsets"][0], v["data_offsets"][1], k) for k, v in header.items())
            infos = [TensorInfo(k, header[k]["dtype"], tuple(map(int, header[k]["shape"]))) for _, _, k in ends]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise _broken(file, "a safetensors header that cannot be read") from None
    for info in infos:
        if info.dtype not in _BYTES:
            raise WeightsError(f"{info.name} has the unknown dtype {info.dtype}", where=str(file))
    end = 8 + length + (ends[-1][1] if ends else 0)
    if end != size:
        raise _broken(file, f"{size} bytes where the header promises {end}")
    return infos


def _broken(file: Path, found: str) -> WeightsError:
    return WeightsError(found, where=str(file), remedy="The file is cut off or damaged; download or copy it again.")


def write_shards(
    folder: Path,
    plan: Sequence[TensorInfo],
    tensor: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[Iterable[TensorInfo]], Iterable[TensorInfo]] = iter,
) -> list[Path]:
    """Write `plan` as safetensors shards and an index (one shard: without an index).

    Args:
        folder: exists; files of the same names are replaced.
        plan: every tensor with the dtype and shape that it will be written with.
        tensor: gives a tensor by name; called once per name, in an order that keeps the numbers aligned in the file.
        max_shard_bytes: a shard is closed before it would grow beyond this (a larger tensor has a shard of its own).
        advance: wraps the tensors that are being written (a progress bar).

    Returns:
        The files that were written.

    Raises:
        WeightsError: `tensor` gave another dtype or shape than the plan says.
    """
    shards = _partition(plan, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    order = [(name, info) for name, shard in zip(names, shards, strict=True) for info in shard]
    steps = iter(advance([info for _, info in order]))
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(_header(shard))
            for info in shard:
                next(steps)
                stream.write(_bytes(tensor(info.name), info, folder))
            stream.flush()
            os.fsync(stream.fileno())
    next(steps, None)  # lets a progress bar close itself
    written = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {info.name: name for name, info in order}
        total = sum(info.num_bytes for info in plan)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.append(folder / INDEX)
    return written


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _partition(plan: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in plan:
        if shards[-1] and filled + info.num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.num_bytes
    # Wide numbers first: the header's padding to 8 bytes then keeps every tensor aligned for readers that map the file.
    return [sorted(shard, key=lambda info: -_BYTES[info.dtype]) for shard in shards]


def _header(shard: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in shard:
        end = offset + info.num_bytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: torch.Tensor, info: TensorInfo, folder: Path) -> memoryview:
    import torch

    code = dtype_code(str(tensor.dtype).removeprefix("torch."))
    if code != info.dtype or tuple(tensor.shape) != info.shape:
        raise WeightsError(
            f"{info.name} is {code} {tuple(tensor.shape)}", where=str(folder), expected=f"{info.dtype} {info.shape}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
