"""Arrays in one file that is mapped, not read: the safetensors format.

Prepared shards and remembered indices are such files. Opening one costs its header; a slice costs its pages.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vlmtune.errors import DataError

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F32": np.float32,
    "F64": np.float64,
}
_NOTES = "__metadata__"


def pack_arrays(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> bytes:
    """The content of a file with `arrays` and JSON `notes`; equal arrays and notes give equal bytes."""
    metadata = {"notes": json.dumps(notes, sort_keys=True, ensure_ascii=False)}
    return bytes(
        safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}, metadata)
    )


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays as read-only maps of the file, and the notes.

    Raises:
        DataError: a file that is missing, cut short or not of this format.
    """
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        notes = json.loads(header.pop(_NOTES)["notes"])
        start = 8 + length
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes where {end} are announced")
        whole = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        arrays = {}
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            arrays[name] = whole[first:last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return arrays, notes
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(
            f"the file cannot be used ({error})", where=str(path), remedy="Delete it; it is made again when needed."
        ) from error
