"""One shard of prepared rows: text ids, trained flags, media references and counts; never pixels.

A shard is one file of mapped arrays (see `arrays`), named by its number and a CRC-32 over its folder's name, its number
and its bytes, so that its name says whether it is whole and in its place. What a medium becomes is kept as its plan;
the ids of its placeholders are not kept, as they follow from the plan. Row i of n owns the slice ``ends[i-1]:ends[i]``
of each flat array:

=================  =======================================================================================
`ids`              uint16 or uint32, the text ids; `id_ends` int64 (n,)
`trained`          uint8, one bit per text id
`places`           int32, for each medium the text ids before it; `media_ends` int32 (n,)
`files`            int32, for each medium its number among the names; −1: ask the row itself
`slices`           int64 (media, 3): offset, length (−1: to the end), frame (−1: a picture)
`keys`             int32, for each medium its tensor's number among the keys; −1: none is named
`plans`            int32, for each medium its number among the plans
`name_*`, `key_*`  texts: uint8 bytes laid end to end, and int64 ends; `plan_*` as well
the rest           the columns of `measure.Measured`, (n,) each
=================  =======================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.arrays import map_arrays, pack_arrays
from vlmtune.data.prepared.measure import COLUMNS
from vlmtune.data.sample import Laid, MediaPlan, MediaRef, Planned
from vlmtune.files import write_atomic

SHARDS = "[0-9]*-*.safetensors"
"""The names of shards."""


class Texts:
    """Distinct texts, numbered in the order in which they were first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        encoded = [text.encode("utf-8", "surrogatepass") for text in self._numbers]
        return {
            f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            f"{name}_ends": np.cumsum([len(text) for text in encoded], dtype=np.int64),
        }


@dataclass(slots=True)
class ShardWriter:
    """Collects the rows of a shard.

    base: media paths under this folder are kept relative to it, so that data and shards can move together.
    """

    base: str
    wide: bool
    """Ids may be above 65,535."""
    laid: list[Laid] = field(default_factory=list)
    counts: list[tuple[int, ...]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)

    def add(self, laid: Laid, counts: tuple[int, ...]) -> None:
        """counts: in the order of `measure.COLUMNS`."""
        self.laid.append(laid)
        self.counts.append(counts)

    def add_bad(self, reason: str) -> None:
        self.bad.append((len(self.laid), reason))
        self.add(_NOTHING, (0,) * len(COLUMNS))

    def write(self, folder: Path, number: int) -> Path:
        content = self.content()
        path = folder / f"{number:05d}-{zlib.crc32(content, _seal(folder, number)):08x}.safetensors"
        write_atomic(path, content)
        return path

    def content(self) -> bytes:
        """The bytes of the shard; equal rows give equal bytes."""
        counts = np.array(self.counts, np.uint64)
        arrays = {name: counts[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
        ids = np.concatenate([laid.ids for laid in self.laid])
        arrays["ids"] = ids.astype(np.uint32 if self.wide else np.uint16)
        arrays["id_ends"] = np.cumsum([len(laid.ids) for laid in self.laid], dtype=np.int64)
        arrays["trained"] = np.packbits(np.concatenate([laid.trained for laid in self.laid]))
        arrays |= self._media()
        notes = {"bad": self.bad, "unknown_keys": dict(self.unknown_keys)}
        return pack_arrays(arrays, notes)

    def _media(self) -> dict[str, np.ndarray]:
        names, keys, plans = Texts(), Texts(), Texts()
        known: dict[MediaPlan, int] = {}
        files: list[int] = []
        slices: list[tuple[int, int, int]] = []
        numbers: list[int] = []
        key_numbers: list[int] = []
        for laid in self.laid:
            for ref, plan in laid.media:
                in_row = ref.inline is not None or bool(ref.more)
                files.append(-1 if in_row else names.number(self._name(ref.path)))
                length = -1 if ref.length is None else ref.length
                slices.append((ref.offset, length, -1 if ref.frame is None else ref.frame))
                key_numbers.append(-1 if ref.key is None else keys.number(ref.key))
                if plan not in known:
                    known[plan] = plans.number(json.dumps(dataclasses.asdict(plan)))
                numbers.append(known[plan])
        return {
            "places": np.array([place for laid in self.laid for place in laid.places], np.int32),
            "media_ends": np.cumsum([len(laid.media) for laid in self.laid], dtype=np.int32),
            "files": np.array(files, np.int32),
            "slices": np.array(slices, np.int64).reshape(-1, 3),
            "keys": np.array(key_numbers, np.int32),
            "plans": np.array(numbers, np.int32),
            **names.arrays("name"),
            **keys.arrays("key"),
            **plans.arrays("plan"),
        }

    def _name(self, path: str) -> str:
        return path.removeprefix(self.base + "/")


_NOTHING = Laid(ids=np.zeros(0, np.int32), trained=np.zeros(0, bool), places=(), media=())


class Shard:
    """A shard on disk, mapped. `base`: see `ShardWriter`."""

    def __init__(self, path: Path, base: str) -> None:
        """Raises DataError: the file is not a whole shard."""
        self.path = path
        self.base = base
        self.arrays, notes = map_arrays(path)
        self.bad: list[tuple[int, str]] = [(int(row), str(reason)) for row, reason in notes["bad"]]
        self.unknown_keys: Counter[str] = Counter(notes["unknown_keys"])

    def __len__(self) -> int:
        return len(self.arrays["id_ends"])

    def laid(self, i: int, ask_row: Callable[[], Planned]) -> Laid:
        """Row `i` of the shard; `ask_row` finds media that lie in the row itself."""
        arrays = self.arrays
        start, end = _slice(arrays["id_ends"], i)
        bits = np.unpackbits(arrays["trained"][start // 8 : (end + 7) // 8])
        first, last = _slice(arrays["media_ends"], i)
        media = self.media(i)
        return Laid(
            ids=arrays["ids"][start:end].astype(np.int32),
            trained=bits[start % 8 : start % 8 + end - start].astype(bool),
            places=tuple(arrays["places"][first:last].tolist()),
            media=ask_row() if media is None else media,
        )

    def media(self, i: int) -> Planned | None:
        """The media of row `i`; None when they lie in the row itself."""
        first, last = _slice(self.arrays["media_ends"], i)
        if (self.arrays["files"][first:last] < 0).any():
            return None
        return tuple(self._medium(k) for k in range(first, last))

    def _medium(self, k: int) -> tuple[MediaRef, MediaPlan]:
        name = self._text("name", int(self.arrays["files"][k]))
        offset, length, frame = self.arrays["slices"][k].tolist()
        key = int(self.arrays["keys"][k])
        ref = MediaRef(
            path=name if name.startswith("/") else f"{self.base}/{name}",
            offset=offset,
            length=None if length < 0 else length,
            frame=None if frame < 0 else frame,
            key=None if key < 0 else self._text("key", key),
        )
        return ref, _plan(self._text("plan", int(self.arrays["plans"][k])))

    def _text(self, table: str, number: int) -> str:
        start, end = _slice(self.arrays[f"{table}_ends"], number)
        return self.arrays[f"{table}_bytes"][start:end].tobytes().decode("utf-8", "surrogatepass")


def _plan(text: str) -> MediaPlan:
    values: dict[str, Any] = json.loads(text)
    # JSON knows no tuples; a plan holds nothing else that it would change.
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return MediaPlan(**fields)


def _slice(ends: np.ndarray, i: int) -> tuple[int, int]:
    return (int(ends[i - 1]) if i else 0), int(ends[i])


def find_shards(folder: Path, numbers: Collection[int], *, verify: bool) -> dict[int, Path]:
    """The whole shards among `numbers`. verify: recompute each CRC-32; else names and headers are believed."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(SHARDS)):
        number, _, crc = path.stem.partition("-")
        if number.isdecimal() and int(number) in numbers and (not verify or _crc(path, int(number)) == crc):
            found[int(number)] = path
    return found


def _seal(folder: Path, number: int) -> int:
    """What a shard's CRC-32 begins with, so that a whole shard under another's number or key is not taken for it."""
    return zlib.crc32(f"{folder.name}/{number}".encode("utf-8", "surrogatepass"))


def _crc(path: Path, number: int) -> str:
    value = _seal(path.parent, number)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
