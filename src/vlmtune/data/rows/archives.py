"""Tars as they are downloaded: the members of one or of many archives, found by name and read by offset.

An archive may have been cut into parts (`images.tar.aa`, `part_ab`, `images.tar.part-003`): the parts of one folder and
one name are read as one, in their order, and none may be missing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from vlmtune.data.rows.paths import inline, without_file_scheme
from vlmtune.data.rows.patterns import files_of, is_pattern
from vlmtune.data.rows.remember import Known, remembered
from vlmtune.data.rows.tar_index import FILE, KINDS, hashable, index_tar, name_hash, plain_name
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

MAX_MEMBER_BYTES = 1 << 30  # a medium is read whole; a larger "picture" is something else
_PART = re.compile(r"(?P<stem>.*\.tar[._-]?(?:part)?[._-]?|(?:.*[._-])?part[_-]?)(?P<number>[a-z]{2,8}|\d{1,8})")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))([._-].*)?$", re.IGNORECASE)


def is_archive(path: str) -> bool:
    """Whether a name is that of a tar, of a part of one, or of a compressed one, which is refused with its remedy."""
    name = os.path.basename(path)
    return name.lower().endswith(".tar") or _COMPRESSED.search(name) is not None or _PART.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Archive:
    """One tar: a file, or the parts it was cut into, in order."""

    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.parts[0])


def archives_of(paths: Sequence[str]) -> tuple[Archive, ...]:
    """The archives that paths and patterns stand for, parts put together, in the order in which they are first named.

    Raises:
        DataError: nothing matches; a file that is no tar by its name, or compressed; a part missing in between.
    """
    parts: dict[str, dict[str, str]] = {}
    for path in dict.fromkeys(file for pattern in paths for file in files_of(pattern)):
        stem, number = _stem_and_number(path)
        parts.setdefault(stem, {})[number] = path
    return tuple(_in_order(stem, numbered) for stem, numbered in parts.items())


def _stem_and_number(path: str) -> tuple[str, str]:
    folder, name = os.path.split(path)
    if _COMPRESSED.search(name):
        raise DataError(
            "the archive is compressed, so no member can be read by itself",
            where=name,
            expected="a plain .tar (pictures do not become smaller)",
            remedy="Unpack it once to a plain tar (zcat x.tar.gz > x.tar), or extract it to a folder.",
        )
    if name.lower().endswith(".tar"):
        return path, ""
    part = _PART.fullmatch(name)
    if part is None:
        raise DataError(
            "the file is no tar by its name",
            where=name,
            expected="x.tar, or parts such as x.tar.aa, x.tar.001 or part_aa",
            remedy="Correct the path in the YAML, or narrow its pattern.",
        )
    return os.path.join(folder, part["stem"]), part["number"]


def _in_order(stem: str, numbered: Mapping[str, str]) -> Archive:
    if "" in numbered:
        return Archive((numbered[""],))
    padded = any(number.startswith("0") and len(number) > 1 for number in numbered)
    numeric = all(number.isdigit() for number in numbered)
    order = sorted(numbered, key=int) if numeric and not padded else sorted(numbered)
    first = order[0]
    if not (int(first) <= 1 if first.isdigit() else set(first) == {"a"}):
        raise _part_missing(stem, f"the first part here is {os.path.basename(numbered[first])}")
    for before, after in pairwise(order):
        if after not in _successors(before):
            name = os.path.basename(stem) + _successors(before)[0]
            raise _part_missing(stem, f"{name}, which follows {os.path.basename(numbered[before])}, is missing")
    return Archive(tuple(numbered[number] for number in order))


def _successors(number: str) -> tuple[str, ...]:
    """What may follow a part's number: the next one, or the wider one that `split` goes on with (yz zaaa, 89 9000)."""
    if number.isdigit():
        following = f"{int(number) + 1:0{len(number)}d}"
        zero = "0"
    else:
        stripped = number.rstrip("z")
        following = stripped[:-1] + chr(ord(stripped[-1]) + 1) + "a" * (len(number) - len(stripped)) if stripped else ""
        zero = "a"
    kept = following.rstrip(zero)
    return following, kept + zero * (len(following) - len(kept) + 2)


def _part_missing(stem: str, found: str) -> DataError:
    return DataError(
        found,
        where=f"{os.path.basename(stem)}*",
        expected="all parts of the archive, from aa, 0 or 1 on",
        remedy="Fetch the missing part, or correct the pattern in the YAML.",
    )


class Members:
    """The members of some archives: where each lies, by number or by name. Read-only and picklable.

    Numbers count through all archives in order. What was learnt lies in `memory` and is mapped from there; without a
    memory it is kept in this process and travels with a pickle.

    Attributes:
        parts: all files, in order.
        digest: a hash of all names and places, independent of where the files lie.
    """

    def __init__(self, archives: Sequence[Archive], memory: Path | None = None) -> None:
        """
        Raises:
            DataError: see `tar_index.index_tar`.
        """
        self.archives = tuple(archives)
        self._memory = memory
        self._open()

    def _open(self) -> None:
        self.parts = tuple(part for archive in self.archives for part in archive.parts)
        if len(self.archives) == 1:
            arrays, notes = self._learnt(0)
        else:
            # One table to search in, however many archives; a new archive is read, the others are remembered.
            arrays, notes = remembered(self._memory, "tars-2", self.parts, lambda: _known(self._each()))
        self.digest = str(notes["digest"])
        self._arrays = arrays
        # Byte offsets count through all archives' parts, so one search finds a part.
        self._part_starts = np.concatenate([[0], np.cumsum(arrays["part_sizes"])])
        self._name_blob, self._name_starts = arrays["names"], arrays["name_starts"]

    def _learnt(self, which: int) -> Known:
        archive = self.archives[which]
        return remembered(self._memory, "tar-2", archive.parts, partial(_index, archive))

    def _each(self) -> list[Mapping[str, np.ndarray]]:
        return [self._learnt(which)[0] for which in range(len(self.archives))]

    def __getstate__(self) -> dict[str, object]:
        if self._memory is None:
            return self.__dict__
        return {"archives": self.archives, "_memory": self._memory}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._memory is not None:
            self._open()

    @property
    def label(self) -> str:
        """What messages call the archives."""
        first = self.archives[0].name
        return first if len(self.archives) == 1 else f"{first} and {len(self.archives) - 1} more"

    def __len__(self) -> int:
        return len(self._arrays["offsets"])

    def name(self, i: int) -> str:
        return self._raw_name(i).decode("utf-8", "surrogateescape")

    def length(self, i: int) -> int:
        return int(self._arrays["lengths"][i])

    def part(self, i: int) -> int:
        """Which of `parts` the content of member `i` begins in."""
        found = int(np.searchsorted(self._part_starts, int(self._arrays["offsets"][i]), side="right")) - 1
        return min(found, len(self.parts) - 1)  # an empty member may begin where everything ends

    def archive(self, i: int) -> int:
        """Which of `archives` member `i` stands in."""
        return int(np.searchsorted(self._arrays["first_members"], i, side="right")) - 1

    def members_of(self, archive: int) -> range:
        first = [*self._arrays["first_members"].tolist(), len(self)]
        return range(first[archive], first[archive + 1])

    def named(self, name: str) -> list[int]:
        """All members with this name, in order."""
        key = hashable(plain_name(name))
        wanted = np.uint64(name_hash(key))
        hashes = self._arrays["hashes"]
        first = int(np.searchsorted(hashes, wanted, side="left"))
        found = []
        while first < len(hashes) and hashes[first] == wanted:
            i = int(self._arrays["order"][first])
            if self._raw_name(i) == key:
                found.append(i)
            first += 1
        return sorted(found)

    def ref(self, i: int) -> MediaRef:
        """Where the bytes of member `i` are.

        Raises:
            DataError: a link, a device, a sparse file, or more than `MAX_MEMBER_BYTES`.
        """
        kind, length = int(self._arrays["kinds"][i]), self.length(i)
        label = f"the member {self.name(i)} of {self.archives[self.archive(i)].name}"
        if kind != FILE:
            raise DataError(
                f"{label} is {KINDS[kind]}", expected="a plain file", remedy="Make the tar with --dereference."
            )
        if length > MAX_MEMBER_BYTES:
            raise DataError(f"{label} has {length:,} bytes", expected=f"at most {MAX_MEMBER_BYTES:,}")
        position, part = int(self._arrays["offsets"][i]), self.part(i)
        pieces = []
        while True:
            here = min(length, int(self._part_starts[part + 1]) - position)
            pieces.append((self.parts[part], position - int(self._part_starts[part]), here))
            position, length, part = position + here, length - here, part + 1
            if not length:
                break
        (path, offset, first), *more = pieces
        return MediaRef(path=path, offset=offset, length=first, more=tuple(more))

    def _raw_name(self, i: int) -> bytes:
        return self._name_blob[int(self._name_starts[i]) : int(self._name_starts[i + 1])].tobytes()


def _index(archive: Archive) -> Known:
    return _known([index_tar(archive.parts, archive.name)])


def _known(each: Sequence[Mapping[str, np.ndarray]]) -> Known:
    """The arrays of some archives as those of one, and their digest."""
    arrays = _joined(each)
    digest = hashlib.blake2b(digest_size=16)
    for name in ("names", "name_starts", "offsets", "lengths", "kinds", "part_sizes"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return arrays, {"digest": digest.hexdigest()}


def _joined(each: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of several archives as those of one, offsets and names counted through; with the order of hashes.

    Adds hashes: uint64 (n,), sorted; order: int64 (n,), the members in that order; first_members: int64 (archives,).
    """
    bytes_before = np.cumsum([0, *(int(arrays["part_sizes"].sum()) for arrays in each)])
    names_before = np.cumsum([0, *(len(arrays["names"]) for arrays in each)])
    members_before = np.cumsum([0, *(len(arrays["offsets"]) for arrays in each)])
    joined = {key: np.concatenate([a[key] for a in each]) for key in ("names", "lengths", "kinds", "part_sizes")}
    joined["offsets"] = np.concatenate([a["offsets"] + before for a, before in zip(each, bytes_before, strict=False)])
    ends = [a["name_starts"][1:] + before for a, before in zip(each, names_before, strict=False)]
    joined["name_starts"] = np.concatenate([np.zeros(1, np.int64), *ends])
    joined["first_members"] = members_before[:-1].astype(np.int64)
    blob, starts = joined["names"].tobytes(), joined["name_starts"].tolist()
    count = len(starts) - 1
    hashes = np.fromiter((name_hash(blob[starts[i] : starts[i + 1]]) for i in range(count)), np.uint64, count)
    joined["order"] = np.argsort(hashes, kind="stable")
    joined["hashes"] = hashes[joined["order"]]
    return joined


class TarRoot:
    """Media paths of a source are names of members; see `rows.paths.Root`.

    An absolute path is read as if the archive had been unpacked beside itself.
    """

    def __init__(self, members: Members) -> None:
        self.members = members

    @property
    def digest(self) -> str:
        return self.members.digest

    def locate(self, name: str) -> MediaRef:
        """The reference behind a member's name or a ``data:`` URI.

        Raises:
            DataError: a web address, a name with ``..``, no such member, several, or one that is no file.
        """
        if name[:5].lower() == "data:":
            return inline(name)
        wanted = self._relative(without_file_scheme(name))
        found = self.members.named(wanted)
        if not found:
            raise self._missing(name, wanted)
        if len(found) > 1:
            owners = [self.members.archives[self.members.archive(i)].name for i in found]
            places = " and in ".join(dict.fromkeys(owners)) if len(set(owners)) > 1 else f"{owners[0]}, more than once"
            raise DataError(
                f"the member {name} stands in {places}",
                remedy="Name fewer archives in `root`, or give each source its own, so that one is meant.",
            )
        return self.members.ref(found[0])

    def _relative(self, name: str) -> str:
        if not name or "\0" in name:
            raise DataError("a path is empty" if not name else f"the path {name!r} holds a zero byte")
        if ".." in name.split("/"):
            raise DataError(f"the path {name} holds `..`", expected=f"the name of a member of {self.members.label}")
        if not os.path.isabs(name):
            return name
        for archive in self.members.archives:
            folder = os.path.dirname(archive.parts[0]).rstrip("/") + "/"
            if name.startswith(folder):
                return name.removeprefix(folder)
        raise DataError(
            f"the path {name} is absolute",
            expected=f"the name of a member of {self.members.label}, as {self.members.name(0)}",
            remedy="`replace_prefix` of the source takes the beginning away.",
        )

    def _missing(self, name: str, wanted: str) -> DataError:
        """Names that differ in their folders are tried, which costs a few look-ups however many members there are."""
        first, tail = self.members.name(0), plain_name(wanted).split("/")
        folders = first.split("/")[:-1]
        near = ["/".join(tail[i:]) for i in range(1, len(tail))]
        near += ["/".join([*folders[: i + 1], *tail]) for i in range(len(folders))]
        near.append("/".join([*folders, tail[-1]]))
        meant = next((f"; did you mean {other}?" for other in near if self.members.named(other)), "")
        count = f"{len(self.members):,} member{'' if len(self.members) == 1 else 's'}, the first is {first}"
        return DataError(
            f"there is no member {name} in {self.members.label} ({count}){meant}",
            remedy="Correct the name in the row, or its beginning by `replace_prefix` of the source.",
        )


def names_archives(root: str) -> bool:
    """Whether an entry of `root` means archives rather than a folder."""
    return not os.path.isdir(root) and (is_pattern(root) or is_archive(root))
