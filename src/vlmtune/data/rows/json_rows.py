"""The rows of a .json list or a .jsonl file, read at their offsets; the file is never loaded whole."""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path

import numpy as np

from vlmtune.data.rows.formats import cut
from vlmtune.data.rows.index import RowIndex, index_file
from vlmtune.data.rows.remember import Known, remembered
from vlmtune.errors import DataError

MAX_ROW_BYTES = 256 << 20  # a row with pictures as data URIs is large; a larger one is a mistake in the file


class JsonRows:
    """See `rows.corpus.Rows`."""

    def __init__(self, path: str, name: str, memory: Path | None = None) -> None:
        """
        Raises:
            DataError: a missing or foreign file, no rows, a list that is not closed.
        """

        def learn() -> Known:
            index = index_file(path, name)
            if index.unfinished:
                raise _broken_list(path, name, index)
            arrays = {"starts": index.starts, "lengths": index.lengths}
            if index.numbers is not None:
                arrays["numbers"] = index.numbers
            return arrays, {"digest": index.digest}

        arrays, notes = remembered(memory, "json-1", [path], learn)
        self.files = (path,)
        self.digest = str(notes["digest"])
        self._index = RowIndex(arrays["starts"], arrays["lengths"], arrays.get("numbers"), self.digest)
        self._file: File | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # the process that unpickles opens its own

    def __len__(self) -> int:
        return len(self._index.starts)

    def place(self, i: int) -> tuple[int, str]:
        return 0, str(self._index.number(i))

    def find(self, file: int, label: str) -> int | None:
        if not label.isdecimal():
            return None
        number, numbers = int(label), self._index.numbers
        i = number - 1 if numbers is None else int(np.searchsorted(numbers, number))
        return i if 0 <= i < len(self) and self._index.number(i) == number else None

    def read(self, i: int, origin: str) -> object:
        length = int(self._index.lengths[i])
        if length > MAX_ROW_BYTES:
            raise DataError(
                f"the row has {length:,} bytes",
                where=origin,
                expected=f"at most {MAX_ROW_BYTES:,}",
                remedy="Keep pictures in files of their own, and write their paths.",
            )
        if self._file is None:
            self._file = File(self.files[0])
        return parse_row(self._file.read(int(self._index.starts[i]), length), origin)


class File:
    """A file that is only read at offsets: no shared position, so forked processes may use one descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"the source {path} cannot be opened any more ({error.strerror})") from error
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        raw = os.pread(self._descriptor, length, offset)
        if len(raw) != length:
            raise DataError(f"the source {self.path} became shorter while it was in use", remedy="Start again.")
        return raw


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
        row = json.loads(text, object_pairs_hook=no_key_twice)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except DataError as error:
        error.where = origin
        raise
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


def no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object; JSON readers keep the last of two equal keys and forget the other in silence.

    Raises:
        DataError: without its place, which the caller knows.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(
            f"the key {cut(repr(twice), 60)} stands twice in one object",
            expected="every key once",
            remedy="Take one of the two out: only one of their values could be used.",
        )
    return found


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
    file = File(path)
    for i in range(len(index.starts)):
        try:
            parse_row(file.read(int(index.starts[i]), int(index.lengths[i])), f"{name}:{index.number(i)}")
        except DataError as error:
            error.found += f" ({index.unfinished})"
            return error
    return DataError(index.unfinished, where=name, expected="one JSON list, [ … ]", remedy="Correct the file's end.")
