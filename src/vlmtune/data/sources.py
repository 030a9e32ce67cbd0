"""Random access to the rows of all sources of a run.

Opening a corpus reads every file once to learn where its rows are; after that a row costs one read at an offset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmtune.config.schema import SourceConfig
from vlmtune.data.adapters import to_sample
from vlmtune.data.index import RowIndex, index_file
from vlmtune.data.paths import MediaRoot
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of rows, indexed."""

    path: str
    name: str
    """What messages call it: the file's name, with as many folders as tell it from the other sources."""
    index: RowIndex
    media: MediaRoot
    repeat: float

    def __len__(self) -> int:
        return len(self.index.starts)


@dataclass(eq=False)
class Corpus:
    """All rows of a list of sources, in the order of the sources. Read-only and picklable; rows are numbered from 0."""

    sources: tuple[Source, ...]
    _first: np.ndarray = field(init=False, repr=False)
    _files: dict[int, _File] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._first = np.concatenate([[0], np.cumsum(self.source_sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, object]:
        # Open files stay here; the process that unpickles opens its own.
        return {"sources": self.sources, "_first": self._first, "_files": {}}

    @property
    def source_sizes(self) -> list[int]:
        return [len(source) for source in self.sources]

    @property
    def repeats(self) -> list[float]:
        return [source.repeat for source in self.sources]

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def source_of(self, i: int) -> int:
        """The source that row `i` belongs to."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return int(np.searchsorted(self._first, i, side="right")) - 1

    def origin(self, i: int) -> str:
        """`coco.jsonl:124` (line) or `coco.json:124` (row), counted from 1."""
        which = self.source_of(i)
        source = self.sources[which]
        return f"{source.name}:{source.index.number(i - int(self._first[which]))}"

    def row(self, i: int) -> object:
        """Row `i` as JSON says it.

        Raises:
            DataError: broken JSON, or bytes that are not UTF-8.
        """
        which = self.source_of(i)
        source, local = self.sources[which], i - int(self._first[which])
        file = self._files.get(which)
        if file is None:
            file = self._files[which] = _File(source.path)
        raw = file.read(int(source.index.starts[local]), int(source.index.lengths[local]))
        return parse_row(raw, self.origin(i))

    def adapt(self, i: int, row: object) -> Sample:
        """The sample that `row`, the content of row `i`, says.

        Raises:
            DataError: see `adapters.to_sample`.
        """
        return to_sample(row, origin=self.origin(i), locate=self.sources[self.source_of(i)].media.locate)

    def sample(self, i: int) -> Sample:
        """Row `i` as a sample.

        Raises:
            DataError: with the origin, whatever is wrong with the row.
        """
        return self.adapt(i, self.row(i))

    def find(self, text: str) -> int:
        """The row with the origin `text` (``coco.jsonl:124``), or with the number `text` when there is one source.

        Raises:
            UsageError: no such row, or a number alone with several sources.
        """
        name, _, number = text.rpartition(":")
        sources = [i for i, source in enumerate(self.sources) if source.name == name or not name]
        if not number.isdecimal() or len(sources) != 1:
            known = " or ".join(f"{name}:N" for name in self.names[:5])
            raise UsageError(f"no row is called {text!r}", expected="N" if len(self.sources) == 1 else known)
        source = self.sources[sources[0]]
        numbers = source.index.numbers
        local = int(number) - 1 if numbers is None else int(np.searchsorted(numbers, int(number)))
        if not 0 <= local < len(source) or source.index.number(local) != int(number):
            last = source.index.number(len(source) - 1)
            raise UsageError(f"there is no row {source.name}:{number}", expected=f"a row from 1 to {last}")
        return int(self._first[sources[0]]) + local

    def digest(self) -> str:
        """A hash of the bytes of all sources, in order; independent of where the files lie."""
        whole = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            whole.update(f"{source.index.digest} {len(source)}\n".encode())
        return whole.hexdigest()


def open_corpus(sources: Sequence[SourceConfig], *, allow: Sequence[str] = ()) -> Corpus:
    """Index the files of `sources`; their paths and `allow` are absolute (`config.load` sees to it).

    Raises:
        DataError: a missing or foreign file, a `root` that is no folder, a list that is not closed.
    """
    names = _names([source.path for source in sources])
    opened = []
    for source, name in zip(sources, names, strict=True):
        index = index_file(source.path, name)
        if index.unfinished:
            raise _broken_list(source.path, name, index)
        opened.append(
            Source(path=source.path, name=name, index=index, media=_media(source, name, allow), repeat=source.repeat)
        )
    return Corpus(tuple(opened))


def parse_row(raw: bytes, origin: str) -> object:
    """One row of JSON.

    Raises:
        DataError: naming the byte that is not UTF-8, or showing the spot where the JSON breaks.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the row is 0x{raw[error.start]:02X}, which is not UTF-8",
            where=origin,
            remedy="Save the file as UTF-8 (for a Chinese file: iconv -f GB18030 -t UTF-8).",
        ) from None
    try:
        row = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeEncodeError as error:
        raise DataError(
            f"the escape \\u{ord(error.object[error.start]):04x} is half of a character",
            where=origin,
            expected="both halves of a surrogate pair, as in \\ud83d\\ude00",
            remedy="Some tool cut the text in the middle of a character; write the row again, or take it out.",
        ) from None
    except json.JSONDecodeError as error:
        raise _broken_json(text, error, origin) from None
    except RecursionError:
        raise DataError("the row is nested too deeply", where=origin, expected="an object of a few levels") from None
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"broken JSON: {error}", where=origin) from None


def _broken_json(text: str, error: json.JSONDecodeError, origin: str) -> DataError:
    if not text.strip():
        return DataError("the row is empty", where=origin, remedy="There is a comma too many; take it out.")
    at = min(error.pos, len(text))
    before = re.sub(r"\s+", " ", text[max(0, at - 40) : at])
    after = re.sub(r"\s+", " ", text[at : at + 25])
    spot = f"{'…' if at > 40 else ''}{before}»{after}{'…' if at + 25 < len(text) else '«end'}"
    remedy = "Correct the place after the » sign."
    if text[at : at + 1] == "'":
        remedy = "JSON wants double quotes: replace ' by \"."
    elif error.msg.startswith("Unterminated string") or at >= len(text.rstrip()):
        remedy = "The row breaks off: complete it or take it out."
    elif "','" in error.msg:
        remedy = "A comma is missing before the » sign (or a quote inside the text before it lacks its backslash)."
    elif error.msg == "Extra data":
        remedy = "One row ends before the » sign: a comma is missing there, or two rows share a line."
    return DataError(f"broken JSON at character {at + 1} ({error.msg}): {spot}", where=origin, remedy=remedy)


def _broken_list(path: str, name: str, index: RowIndex) -> DataError:
    """The error for a list whose brackets do not close: the first broken row, or else the end of the file."""
    file = _File(path)
    for i in range(len(index.starts)):
        try:
            parse_row(file.read(int(index.starts[i]), int(index.lengths[i])), f"{name}:{index.number(i)}")
        except DataError as error:
            error.found += f" ({index.unfinished})"
            return error
    return DataError(index.unfinished, where=name, expected="one JSON list, [ … ]", remedy="Correct the file's end.")


def _media(source: SourceConfig, name: str, allow: Sequence[str]) -> MediaRoot:
    if source.root is None:
        folder = os.path.dirname(os.path.abspath(source.path))
        return MediaRoot(folder, why=f"the folder of {name}, as the source has no `root`", allow=tuple(allow))
    if not os.path.isdir(source.root):
        raise DataError(
            f"the media root {source.root} is not a folder", where=name, remedy="Correct `root` of this source."
        )
    return MediaRoot(source.root, why="`root` of the source", allow=tuple(allow))


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell different files apart."""
    parts = {path: path.strip("/").split("/") for path in paths}

    def name(path: str) -> str:
        for depth in range(1, len(parts[path])):
            end = parts[path][-depth:]
            if not any(parts[other][-depth:] == end for other in parts if other != path):
                return "/".join(end)
        return path

    return [name(path) for path in paths]


class _File:
    """A file that is only read at offsets: no shared position, so forked processes may use one descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"the source {path} cannot be opened any more ({error.strerror})") from error

    def read(self, offset: int, length: int) -> bytes:
        raw = os.pread(self._descriptor, length, offset)
        if len(raw) != length:
            raise DataError(f"the source {self.path} became shorter while it was in use", remedy="Start again.")
        return raw

    def __del__(self) -> None:
        if "_descriptor" in self.__dict__:
            os.close(self._descriptor)
