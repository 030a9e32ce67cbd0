"""Files of pseudo-text: one floating tensor (n, d), in a safetensors file or a pickle that torch.save wrote.

Errors are `DataError` without a place; the caller knows the row and adds it.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors

from vlmtune.data.media import pictures
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import torch

_EXPECTED = "a tensor (n, d) of floating-point numbers, in a .safetensors file or as torch.save writes one (.pt)"
# What torch reports damaged archives and pickles with.
_DAMAGE = (
    RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    struct.error,
)  # fmt: skip
_TYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


def shape(ref: MediaRef) -> tuple[int, int]:
    """(d, n): how long a row is, and how many there are; the rows themselves stay on the disk where it can be so.

    Raises:
        DataError: a file that cannot be read, or holds something else than one floating (n, d) tensor, n ≥ 1.
    """
    return _shape(_tensor(ref), ref)


def _shape(tensor: torch.Tensor, ref: MediaRef) -> tuple[int, int]:
    named, size = f"the embedding {name_of(ref)}", tuple(tensor.shape)
    if str(tensor.dtype) not in _TYPES:
        raise DataError(f"{named} holds numbers of the type {str(tensor.dtype)[6:]}", expected=_EXPECTED)
    if len(size) != 2:
        raise DataError(f"{named} is a tensor {_written(size)}", expected=_EXPECTED)
    if 0 in size:
        raise DataError(f"{named} is empty: {_written(size)}", expected="one row at least")
    if tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        # Of a view that repeats its numbers, or a tensor without any: few bytes may claim to be any size.
        raise DataError(
            f"{named} is a tensor {_written(size)} of which not all numbers are in the file",
            expected="every row with its own numbers",
            remedy="Save a copy of it: torch.save(rows.clone().contiguous(), file).",
        )
    return size[1], size[0]


def rows(ref: MediaRef, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The tensor as float32 (n, d), on the CPU.

    Args:
        size: (d, n) as it was when the row was planned.

    Raises:
        DataError: as `shape`; another shape than `size`; NaN or infinity in it.
    """
    return load(ref, size).float()


def load(ref: MediaRef, size: tuple[int, int] | None = None) -> torch.Tensor:
    """As `rows`, in the numbers of the file."""
    tensor = _tensor(ref).detach()
    now = _shape(tensor, ref)
    if size is not None and size != now:
        raise DataError(
            f"the embedding {name_of(ref)} is {_written(now[::-1])} now, but was {_written(size[::-1])} when the row "
            "was planned",
            remedy="Do not change the data during a run.",
        )
    bad = (~tensor.float().isfinite()).any(1).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"the embedding {name_of(ref)} has NaN or infinity in {len(bad):,} of its {len(tensor):,} rows, the first "
            f"being row {int(bad[0]) + 1:,}",
            remedy="Make it again, or take the row out.",
        )
    return tensor


def split_name(name: str) -> tuple[str, str | None]:
    """`store.safetensors#page/7` -> its file and the name of the tensor in it; other names as they are, and None."""
    file, hash_, key = name.partition(".safetensors#")
    return (file + ".safetensors", key) if hash_ else (name, None)


def name_of(ref: MediaRef) -> str:
    """What messages call it: `page.pt`, `store.safetensors#page-7`."""
    return pictures.name_of(ref) + (f"#{ref.key}" if ref.key is not None else "")


def _written(size: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, size))})"


def _tensor(ref: MediaRef) -> torch.Tensor:
    """What the file holds, mapped from the disk where the format allows it; which of the two it is, its bytes say."""
    whole = ref.inline is None and not ref.offset and ref.length is None and not ref.more
    with pictures.open_bytes(ref) as stream:
        try:
            first = stream.read(9)
            stream.seek(0)
        except OSError as error:
            raise DataError(f"{name_of(ref)} cannot be read ({error.strerror or error})") from error
        if first[8:9] == b"{":  # asked first: the eight bytes before it are a length, and may look like anything
            return _stored(ref, None if whole else stream)
        if first[:2] == b"PK" or first[:1] == b"\x80":
            return _unpickled(ref, stream, mapped=whole and first[:2] == b"PK")
    found = f"begins with {first!r}" if first else "is empty"
    raise DataError(f"the embedding file {pictures.name_of(ref)} {found}", expected=_EXPECTED)


def _unpickled(ref: MediaRef, stream: BinaryIO, *, mapped: bool) -> torch.Tensor:
    """The tensor of a pickle. Nothing in it is run."""
    import torch

    if ref.key is not None:
        raise DataError(f"{name_of(ref)} names a tensor in a pickle", expected="a safetensors file before the #")
    # Given a path, torch takes what is called .safetensors for that, whatever is in it.
    mapped = mapped and not ref.path.endswith(".safetensors")
    source: Any = ref.path if mapped else stream
    try:
        found: object = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        found = None
    except _DAMAGE as error:
        raise _damaged(ref, error) from None
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        kind = "something else" if found is None else f"a {type(found).__name__}"
        raise DataError(
            f"the pickle {name_of(ref)} holds {kind}, not a tensor; no code in it was run",
            expected=_EXPECTED,
            remedy="Save the tensor alone, with torch.save or safetensors.",
        )
    return found


def _stored(ref: MediaRef, stream: BinaryIO | None) -> torch.Tensor:
    """A tensor of a safetensors file; of `stream` where that is a part of another file."""
    import safetensors.torch

    try:
        if stream is not None:
            tensors = safetensors.torch.load(stream.read())
            return tensors[_key(ref, list(tensors))]
        status = os.stat(ref.path)
        file, names = _opened(ref.path, status.st_mtime_ns, status.st_size)
        found: torch.Tensor = file.get_tensor(_key(ref, names))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(ref, error) from error
    return found


@lru_cache(maxsize=4)
def _opened(path: str, changed: int, size: int) -> tuple[Any, Collection[str]]:
    """The file and the names in it; a store of thousands of tensors has a long header, which is read once.

    changed, size: of the file; another has come into its place when they differ.
    """
    del changed, size
    file = safetensors.safe_open(path, "pt")
    return file, frozenset(file.keys())


def _key(ref: MediaRef, names: Collection[str]) -> str:
    """The name of the tensor in its file."""
    if ref.key is not None and ref.key in names:
        return ref.key
    if ref.key is None and len(names) == 1:
        return next(iter(names))
    some = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    held = f"{pictures.name_of(ref)} holds {len(names):,} tensors" + (f" ({some})" if names else "")
    if ref.key is None:
        raise DataError(held, expected="one, or the name of one behind a #: store.safetensors#name")
    raise DataError(f"{held}, and none is called {ref.key}", remedy="Correct the name behind the #.")


def _damaged(ref: MediaRef, error: Exception) -> DataError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"the embedding file {name_of(ref)} is damaged ({first})", expected=_EXPECTED)
