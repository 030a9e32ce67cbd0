"""Where the members of a tar lie: one pass over its headers, seeking over the contents. Nothing is extracted.

The headers are those of POSIX.1-1988 (ustar), its pax extension and GNU tar, as the standard library's `tarfile`
describes them. An archive that was cut into parts is read as the one that it was.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.data.media.pieces import Pieces
from vlmtune.errors import DataError
from vlmtune.progress import track

FILE, SYMLINK, HARD_LINK, SPECIAL, SPARSE = range(5)
KINDS = ("a file", "a symbolic link", "a hard link", "a device or pipe", "a sparse file")
"""What a member is; rows may have the files only."""

BLOCK = 512
_WINDOW = 16 << 10  # small members come with the header's own read
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records; real ones have a few hundred
_SHOWN_FROM = 256 << 20  # a smaller archive is read before anyone looks
_MIB = 1 << 20

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its content begins at byte `offset` of the joined parts."""

    name: str
    kind: int
    offset: int
    length: int


def index_tar(parts: Sequence[str], name: str) -> dict[str, np.ndarray]:
    """The members of the archive that `parts` make up, as arrays.

    Returns:
        names: uint8, all names joined (UTF-8, without a leading ``./``); name_starts: int64 (n + 1,).
        offsets, lengths: int64 (n,), in bytes of the joined parts; kinds: uint8 (n,), see `KINDS`.
        part_sizes: int64 (number of parts,).

    Raises:
        DataError: an unreadable, compressed, damaged or truncated archive; `name` is its place.
    """
    names, starts, offsets, lengths, kinds = bytearray(), array("q", [0]), array("q"), array("q"), bytearray()

    def collect(members: Iterator[Member]) -> Iterator[None]:
        """Yields once for every MiB that is behind."""
        behind = 0
        for member in members:
            names.extend(hashable(member.name))
            starts.append(len(names))
            offsets.append(member.offset)
            lengths.append(member.length)
            kinds.append(member.kind)
            while behind < (member.offset + member.length) // _MIB:
                behind += 1
                yield

    try:
        sizes = [os.path.getsize(part) for part in parts]
        with Pieces([(part, 0, size) for part, size in zip(parts, sizes, strict=True)]) as stream:
            steps = collect(members_of(stream, name, split=len(parts) > 1))
            shown = track(steps, total=stream.size // _MIB, label=f"Members of {name} (MiB)")
            for _ in shown if stream.size >= _SHOWN_FROM else steps:
                pass
    except OSError as error:
        raise DataError(
            f"the archive {error.filename or name} cannot be read ({error.strerror or error})",
            where=name,
            remedy="Correct its path in the YAML.",
        ) from error
    if not kinds:
        raise DataError("the archive holds no files", where=name)
    return {
        "names": np.frombuffer(bytes(names), np.uint8),
        "name_starts": np.frombuffer(starts, np.int64),
        "offsets": np.frombuffer(offsets, np.int64),
        "lengths": np.frombuffer(lengths, np.int64),
        "kinds": np.frombuffer(bytes(kinds), np.uint8),
        "part_sizes": np.array(sizes, np.int64),
    }


def plain_name(name: str) -> str:
    """A member's name without what says nothing: ``./a//b/./c`` -> ``a/b/c``. Case and ``..`` stay as they are."""
    if "//" not in name and "./" not in name:
        return name
    root = "/" if name.startswith("/") else ""
    return root + "/".join(part for part in name.split("/") if part not in ("", "."))


def hashable(name: str) -> bytes:
    """The bytes of a name; those that are not UTF-8 come back as they stood in the archive."""
    return name.encode("utf-8", "surrogateescape")


def name_hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def members_of(stream: Pieces, name: str, *, split: bool) -> Iterator[Member]:
    """The members in order, folders left out. Archives that were joined end to end are read as one.

    Raises:
        DataError: see `index_tar`.
    """
    headers = _Headers(stream, name, split=split)
    headers.refuse_compressed()
    while (info := headers.next()) is not None:
        if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            kind = {tarfile.SYMTYPE: SYMLINK, tarfile.LNKTYPE: HARD_LINK}.get(info.type, SPECIAL)
            yield Member(plain_name(info.name), kind, headers.position, 0)
            continue
        if info.type == tarfile.DIRTYPE:
            continue
        offset = headers.position
        headers.skip(info)
        if info.type == b"V":  # the name of a GNU volume
            continue
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in info.pax_headers)
        kind = SPARSE if sparse else FILE if info.isreg() else SPECIAL
        yield Member(plain_name(info.name), kind, offset, info.size)


class _Headers:
    """The headers of an archive one by one; `position` is behind the last one that was read."""

    def __init__(self, stream: Pieces, name: str, *, split: bool) -> None:
        self.stream = stream
        self.name = name
        self.split = split
        self.position = 0
        self._window, self._window_start = b"", 0
        self._common: dict[str, str] = {}  # pax records that hold for all members that follow

    def next(self) -> tarfile.TarInfo | None:
        """The next member with its full name and size; None at the end."""
        long_name: str | None = None
        records: dict[str, str] = {}
        while True:
            info = self._header(may_end=long_name is None and not records)
            if info is None:
                return None
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._extension(info).rstrip(b"\0").decode("utf-8", "surrogateescape")
                long_name = text if info.type == tarfile.GNUTYPE_LONGNAME else long_name
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records |= self._pax(self._extension(info))
            elif info.type == tarfile.XGLTYPE:
                self._common |= self._pax(self._extension(info))
            elif info.type == b"M":
                raise self._broken("continues a member of another volume of GNU tar", "Join the volumes first.")
            else:
                return self._completed(info, long_name, {**self._common, **records})

    def skip(self, info: tarfile.TarInfo) -> None:
        """Move behind the content of `info`."""
        more_maps = info.type == tarfile.GNUTYPE_SPARSE and self._read(BLOCK, self.position - BLOCK)[482] != 0
        while more_maps:  # GNU's map of a sparse file goes on in blocks between header and content
            block = self._read(BLOCK)
            self.position += BLOCK
            more_maps = len(block) == BLOCK and block[504] != 0
        end = self.position + info.size
        if end > self.stream.size:
            missing = f"{end - self.stream.size:,} of {info.size:,} bytes are missing"
            raise self._broken(f"ends in the middle of the member {info.name} ({missing})", self._rest())
        self.position = min(-(-end // BLOCK) * BLOCK, self.stream.size)

    def refuse_compressed(self) -> None:
        first = self._read(8)
        for magic, (kind, tool) in _COMPRESSED.items():
            if first.startswith(magic):
                joined = "cat its parts | " if self.split else ""
                raise DataError(
                    f"the archive is compressed with {kind}, so no member can be read by itself",
                    where=self.name,
                    expected="a plain .tar (pictures do not become smaller)",
                    remedy=f"Unpack it once to a plain tar ({joined}{tool} -c … > x.tar), or extract it to a folder."
                    if kind != "zip"
                    else "Extract it to a folder, and name that.",
                )

    def _header(self, *, may_end: bool) -> tarfile.TarInfo | None:
        """The header at `position`, which moves behind it; blocks of zeros are passed over. None at the end."""
        ended = False
        while True:
            block = self._read(BLOCK)
            if block.count(0) < len(block) or not block:
                break
            ended, self.position = True, self.position + len(block)
        if not block:
            if not may_end or (self.split and not ended):
                raise self._broken("ends without a tar's end mark", self._rest())
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if self.position == 0:
                raise DataError(
                    f"this is no tar archive: it begins with {block[:16]!r}", where=self.name, expected="a plain .tar"
                ) from error
            raise self._broken("holds a damaged header", self._rest()) from error
        if info.size < 0:
            raise self._broken(f"gives the member {info.name} {info.size} bytes", self._rest())
        self.position += BLOCK
        return info

    def _completed(self, info: tarfile.TarInfo, long_name: str | None, records: dict[str, str]) -> tarfile.TarInfo:
        info.pax_headers = records
        info.name = records.get("GNU.sparse.name") or records.get("path") or long_name or info.name
        if "size" in records:
            if not records["size"].isdecimal():
                raise self._broken(f"gives the member {info.name} the size {records['size']!r}", self._rest())
            info.size = int(records["size"])
        return info

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        """The content of a header that only describes the next one."""
        if info.size > _MAX_EXTENSION:
            raise self._broken(f"has a name of {info.size:,} bytes", self._rest())
        content = self._read(info.size)
        self.skip(info)
        return content

    def _pax(self, content: bytes) -> dict[str, str]:
        """``<length> <key>=<value>\\n`` one after the other; the length counts the whole record."""
        records: dict[str, str] = {}
        while content.strip(b"\0"):
            digits, space, _ = content.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
            key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
            if not space or not equals or content[length - 1 : length] != b"\n":
                raise self._broken("holds damaged pax records", self._rest())
            records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            content = content[length:]
        return records

    def _read(self, length: int, position: int | None = None) -> bytes:
        """Up to `length` bytes at `position`, fewer at the end."""
        position = self.position if position is None else position
        start = position - self._window_start
        if start < 0 or start + length > len(self._window):
            self.stream.seek(position)
            self._window, self._window_start, start = self._fill(max(length, _WINDOW)), position, 0
        return self._window[start : start + length]

    def _fill(self, length: int) -> bytes:
        pieces = []
        while length and (piece := self.stream.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _rest(self) -> str:
        if self.split:
            return "A part may be missing at the end, or have been cut short: fetch it again."
        return "The file may have been cut short: compare its size with the original, and fetch it again."

    def _broken(self, what: str, remedy: str) -> DataError:
        return DataError(f"the archive {what} (at byte {self.position:,})", where=self.name, remedy=remedy)
