"""Where the rows of a .jsonl or .json file begin and end: one pass over the bytes, a few MB in memory at a time.

The result is two integers per row; no row is parsed here. Bytes are hashed on the way, so that a run knows its data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from vlmtune.errors import DataError

BLOCK = 4 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
_FOREIGN = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"(\xb5/\xfd": "zstd data",
    b"PAR1": "a parquet file",
    b"\x80\x04": "a Python pickle, which is never opened",
    b"\x80\x05": "a Python pickle, which is never opened",
}
_SPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The rows of one file.

    starts, lengths: int64 (n,), in bytes. numbers: int64 (n,), the line (.jsonl) or the row (.json), counted from 1;
    None when row i has number i + 1. unfinished: the list was not closed properly, so its last row may be half a row.
    """

    starts: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray | None
    digest: str
    unfinished: str = ""
    """What is wrong with the file as a whole; empty when nothing is."""

    def number(self, i: int) -> int:
        return i + 1 if self.numbers is None else int(self.numbers[i])


def index_file(path: str, name: str) -> RowIndex:
    """Index a .jsonl (one row per line) or .json (one list of rows) file.

    Raises:
        DataError: missing or unreadable file, other ending, another encoding, no list, no rows.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".json", ".jsonl"):
        ends = f"ends in {ending}" if ending else "has no ending"
        raise DataError(
            f"the source {path} {ends}",
            where=name,
            expected="a .jsonl, .json, .parquet or .tar file, or a folder",
        )
    try:
        with open(path, "rb") as stream:
            start = _skip_bom(stream, name)
            digest = hashlib.blake2b(digest_size=16)
            blocks = _blocks(stream, digest)
            index = _lines(blocks, start, digest) if ending == ".jsonl" else _elements(blocks, start, digest, name)
            if ending == ".jsonl" and len(index.starts):
                _refuse_list(stream, int(index.starts[0]), name)
    except OSError as error:
        raise DataError(
            f"the source {path} cannot be read ({error.strerror or error})",
            where=name,
            remedy="Correct `path` under data.sources.",
        ) from error
    if not len(index.starts):
        raise DataError("the file holds no rows", where=name, remedy="Take it out of the sources, or fill it.")
    return index


def _refuse_list(stream: BinaryIO, first: int, name: str) -> None:
    """A whole JSON list under the name .jsonl would give one broken row per line."""
    stream.seek(first)
    if stream.read(16).lstrip(_SPACE)[:1] == b"[":
        raise DataError(
            "the file begins with a list, [",
            where=name,
            expected="one row, { … }, per line",
            remedy="If the whole file is one list of rows, name it .json.",
        )


def _skip_bom(stream: BinaryIO, name: str) -> int:
    head = stream.read(4)
    for mark, kind in _FOREIGN.items():
        if head.startswith(mark):
            raise DataError(
                f"the file is {kind}", where=name, expected="JSON text", remedy="Unpack it, or name it what it is."
            )
    for mark, encoding in _OTHER_BOMS.items():
        if head.startswith(mark):
            raise DataError(
                f"line 1 begins with byte 0x{head[0]:02X}, the mark of {encoding}",
                where=name,
                expected="UTF-8",
                remedy=f"Convert it: iconv -f {encoding} -t UTF-8.",
            )
    start = len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0
    stream.seek(start)
    return start


def _blocks(stream: BinaryIO, digest: hashlib.blake2b) -> Iterator[bytes]:
    while block := stream.read(BLOCK):
        digest.update(block)
        yield block


def _lines(blocks: Iterator[bytes], position: int, digest: hashlib.blake2b) -> RowIndex:
    """Lines that are not blank. Blocks are joined so that each piece holds whole lines."""
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    seen = 0
    for piece in _whole_lines(blocks):
        data = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(data == 0x0A)
        if piece[-1] != 0x0A:
            ends = np.append(ends, len(piece))
        begins = np.concatenate([[0], ends[:-1] + 1])
        keep = ends > begins
        # Only a line that begins with white space can be blank, so only those are looked at.
        suspects = np.flatnonzero(keep & np.isin(data[np.minimum(begins, len(piece) - 1)], tuple(_SPACE)))
        for i in suspects:
            keep[i] = bool(piece[begins[i] : ends[i]].strip(_SPACE))
        starts.append(position + begins[keep])
        lengths.append((ends - begins)[keep])
        numbers.append(seen + 1 + np.flatnonzero(keep))
        seen += len(ends)
        position += len(piece)
    lines = _joined(numbers)
    gapless = len(lines) == 0 or lines[-1] == len(lines)
    return RowIndex(_joined(starts), _joined(lengths), None if gapless else lines, digest.hexdigest())


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in blocks:
        cut = block.rfind(b"\n") + 1
        if not cut:
            pending.append(block)
            continue
        yield b"".join([*pending, block[:cut]])
        pending = [block[cut:]] if cut < len(block) else []
    if pending:
        yield b"".join(pending)


def _elements(blocks: Iterator[bytes], position: int, digest: hashlib.blake2b, name: str) -> RowIndex:
    """The elements of a top-level JSON array, found by brackets and commas outside of strings."""
    scanner = _ListScanner(position, name)
    for block in _unsplit_escapes(blocks):
        scanner.feed(block)
    starts, ends, trouble = scanner.finish()
    return RowIndex(starts, ends - starts, None, digest.hexdigest(), trouble)


def _unsplit_escapes(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Move a backslash run at the end of a block to the next one, so that an escape never straddles two blocks."""
    pending = b""
    for block in blocks:
        block = pending + block
        kept = len(block.rstrip(b"\\"))
        pending = block[kept:]
        if kept:
            yield block[:kept]
    if pending:
        yield pending


_QUOTE, _COMMA = 0x22, 0x2C
_STRUCTURAL = np.zeros(256, bool)
_STRUCTURAL[list(b'"{}[],')] = True
_DEPTH = np.zeros(256, np.int64)
_DEPTH[list(b"{[")] = 1
_DEPTH[list(b"}]")] = -1


@dataclass(slots=True)
class _ListScanner:
    """Follows strings and nesting over blocks of bytes, vectorised: no Python step per character."""

    position: int
    name: str
    depth: int = 0
    in_string: bool = False
    opened: int = -1
    """Offset of the first element's first byte; -1 before the opening bracket."""
    closed: int = -1
    """Offset of the closing bracket; -1 before it."""
    trailing: str = ""
    blank: bool = True
    """Nothing but white space was seen inside the list."""
    borders: list[np.ndarray] = field(default_factory=list)

    def feed(self, block: bytes) -> None:
        offset = 0
        if self.opened < 0:
            offset = self._open(block)
            if self.opened < 0:
                self.position += len(block)
                return
        if self.closed < 0:
            self._scan(block, offset)
        elif not self.trailing and block.strip(_SPACE):
            self.trailing = _excerpt(block.strip(_SPACE)[:40])
        self.position += len(block)

    def finish(self) -> tuple[np.ndarray, np.ndarray, str]:
        """starts, ends (both int64) and what is wrong with the list as a whole."""
        if self.opened < 0:
            raise DataError("the file is empty", where=self.name, expected="a JSON list of rows")
        borders = _joined(self.borders)
        trouble = f"after the list's closing bracket the file goes on with {self.trailing}" if self.trailing else ""
        end = self.closed
        if end < 0:
            end = self.position
            trouble = "the file ends before the list is closed"
        if self.blank and not len(borders):
            return _joined([]), _joined([]), trouble
        starts = np.concatenate([[self.opened], borders + 1]).astype(np.int64)
        ends = np.append(borders, end).astype(np.int64)
        return starts, ends, trouble

    def _open(self, block: bytes) -> int:
        """Find the opening bracket; returns the offset behind it."""
        rest = block.lstrip(_SPACE)
        if not rest:
            return 0
        if rest[:1] != b"[":
            raise DataError(
                f"the file begins with {_excerpt(rest[:20])}",
                where=self.name,
                expected="a JSON list of rows, [ … ]",
                remedy="If every line is a row of its own, name the file .jsonl.",
            )
        offset = len(block) - len(rest) + 1
        self.opened = self.position + offset
        self.depth = 1
        return offset

    def _scan(self, block: bytes, offset: int) -> None:
        data = np.frombuffer(block, np.uint8)
        interesting = _STRUCTURAL[data]
        interesting[:offset] = False
        if b"\\" in block:
            interesting[_escaped(data)] = False
        places = np.flatnonzero(interesting)
        kinds = data[places]
        quotes = kinds == _QUOTE
        inside = (np.cumsum(quotes) + self.in_string) & 1 == 1
        outside = ~inside & ~quotes
        if len(inside):
            self.in_string = bool(inside[-1])
        places, kinds = places[outside], kinds[outside]
        depth = self.depth + np.cumsum(_DEPTH[kinds])
        ends = np.flatnonzero(depth <= 0)
        if len(ends):
            last = int(ends[0])
            self.closed = self.position + int(places[last])
            self.in_string = False
            tail = block[int(places[last]) + 1 :].strip(_SPACE)
            self.trailing = _excerpt(tail[:40]) if tail else ""
            places, kinds, depth = places[:last], kinds[:last], depth[:last]
        if self.blank:
            end = len(block) if self.closed < 0 else self.closed - self.position
            self.blank = not block[offset:end].strip(_SPACE)
        if len(depth):
            self.depth = int(depth[-1])
        self.borders.append(self.position + places[(depth == 1) & (kinds == _COMMA)])


def _escaped(data: np.ndarray) -> np.ndarray:
    """Offsets of bytes that follow an odd run of backslashes. The block does not end in a backslash."""
    slashes = np.flatnonzero(data == 0x5C)
    begins = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
    lengths = np.diff(np.append(begins, len(slashes)))
    after = slashes[begins] + lengths
    after = after[lengths % 2 == 1]
    return after[after < len(data)]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _excerpt(raw: bytes) -> str:
    return repr(raw.decode("utf-8", "replace"))
