"""Rows that lie in tars together with their pictures, by WebDataset's rule of names.

Members whose paths agree up to the first dot of the last part are one row: ``000/17.jpg``, ``000/17.json``. A row's
place is its shard and its text's member: ``shard-003.tar:000/17.json``. Hidden members (``._17.jpg``, which macOS puts
beside each file) are no data.

=====================================  ==============================================================================
`.json`                                the row; its pictures are the row's members, in the order of the archive
`.txt`, `.caption`                     a caption, beside the row's picture (the source's `prompt` asks for it)
`.jpg`, `.png`, `.webp`, …             a picture (`image`), or several (`images`): `.0.jpg`, `.1.jpg`
`.mp4`, `.webm`, …                     a video (`video`)
anything else (`.cls`, `.npy`, …)      is not read; it stands in the row as a key that nobody knows, and is counted so
=====================================  ==============================================================================
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmtune.data.media import pictures
from vlmtune.data.rows.archives import Members
from vlmtune.data.rows.formats import FORMAT_KEYS
from vlmtune.data.rows.json_rows import MAX_ROW_BYTES, parse_row
from vlmtune.data.rows.remember import Known, remembered
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError
from vlmtune.progress import track

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"})
VIDEOS = frozenset({"mp4", "webm", "mov", "mkv", "avi", "m4v"})
_CAPTIONS = frozenset({"txt", "caption"})
_JSON = "json"


class WebDatasetRows:
    """See `rows.corpus.Rows`."""

    def __init__(self, members: Members, memory: Path | None = None) -> None:
        """
        Raises:
            DataError: see `tar_index.index_tar`.
        """
        self.members = members
        self.files = members.parts
        self._memory = memory
        self._open()

    def _open(self) -> None:
        arrays, notes = remembered(self._memory, "webdataset-1", self.files, lambda: _grouped(self.members))
        # Pictures are offsets, so rows in an archive that was packed anew are others, whatever they say.
        self.digest = hashlib.blake2b(f"{notes['digest']} {self.members.digest}".encode(), digest_size=16).hexdigest()
        # The members of row i are order[starts[i]:starts[i + 1]], the one that names it first.
        self._order, self._starts = arrays["order"], arrays["starts"]

    def __getstate__(self) -> dict[str, object]:
        kept = ("members", "files", "_memory")
        return self.__dict__ if self._memory is None else {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._memory is not None:
            self._open()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def place(self, i: int) -> tuple[int, str]:
        first = int(self._order[self._starts[i]])
        return self.members.part(first), self.members.name(first)

    def find(self, file: int, label: str) -> int | None:
        """By the name of any member of the row, or by its key, in the archive that `file` is part of."""
        archive = next(a for a, parts in enumerate(self._parts_before()) if file < parts)
        for name in (label, f"{label}.json", f"{label}.txt"):
            for member in self.members.named(name):
                places = np.flatnonzero(self._order == member)
                if self.members.archive(member) == archive and len(places):
                    return int(np.searchsorted(self._starts, places[0], side="right")) - 1
        return None

    def read(self, i: int, origin: str) -> object:
        """Row `i`, its pictures and videos as `MediaRef`.

        Raises:
            DataError: no text, broken JSON, a name in the JSON that is no member of the row, a link as a member.
        """
        try:
            return self._row(self._group(i), origin)
        except DataError as error:
            error.where = error.where or origin
            raise

    def _parts_before(self) -> list[int]:
        """How many files stand up to the end of each archive."""
        return np.cumsum([len(archive.parts) for archive in self.members.archives]).tolist()

    def _group(self, i: int) -> dict[str, int]:
        """Endings and members of row `i`, in the order of the archive."""
        found: dict[str, int] = {}
        for member in sorted(self._order[int(self._starts[i]) : int(self._starts[i + 1])].tolist()):
            name = self.members.name(member)
            if name.startswith("/") or ".." in name.split("/"):
                raise DataError(f"the member {name} leads out of the archive", expected="a name without `..`")
            ending = key_and_ending(name)[1]
            if ending in found:
                raise DataError(f"the row has two members .{ending}", remedy="Give its members different endings.")
            found[ending] = member
        return found

    def _row(self, group: Mapping[str, int], origin: str) -> object:
        images = {ending: member for ending, member in group.items() if _kind(ending) in PICTURES}
        videos = {ending: member for ending, member in group.items() if _kind(ending) in VIDEOS}
        caption = next((ending for ending in group if _kind(ending) in _CAPTIONS), None)
        if _JSON not in group and caption is None:
            raise DataError(
                f"the row has no text (its members: {', '.join('.' + ending for ending in group)})",
                expected="a .json with the turns, or a .txt with a caption",
            )
        row: object = parse_row(self._text(group[_JSON]), origin) if _JSON in group else {}
        if not isinstance(row, dict):
            return row  # the adapter says what is wrong with it
        read = {_JSON, *images, *videos}
        if caption is not None and not any(row.get(key) for key in FORMAT_KEYS):
            row["caption"] = self._caption(group[caption])
            read.add(caption)
        self._put(row, "image", images)
        self._put(row, "video", videos)
        for ending in group.keys() - read:
            row.setdefault(ending, f"({self.members.length(group[ending]):,} bytes that are not read)")
        return row

    def _put(self, row: dict[str, object], key: str, media_members: Mapping[str, int]) -> None:
        """The row's media where its text names them, else as the list of all."""
        refs = {ending: self.members.ref(member) for ending, member in media_members.items()}
        if not refs:
            return
        names = {name: ref for ending, ref in refs.items() for name in self._names(media_members[ending], ending)}
        if _name_in_parts(row, names, key):
            return
        plural = f"{key}s"
        given = next((row[name] for name in (key, plural) if row.get(name) not in (None, "", [])), None)
        chosen = list(refs.values()) if given is None else self._chosen(given, names, list(refs.values()), key)
        row.pop(key, None)
        row.pop(plural, None)
        row |= {key: chosen[0]} if len(chosen) == 1 else {plural: chosen}

    def _names(self, member: int, ending: str) -> list[str]:
        """What a row may call one of its media: the member's name, its last part, its ending, or the row's key."""
        name = self.members.name(member)
        key = key_and_ending(name)[0]
        return [name, name.rsplit("/", 1)[-1], ending, key, key.rsplit("/", 1)[-1]]

    def _chosen(
        self, given: object, names: Mapping[str, MediaRef], refs: Sequence[MediaRef], key: str
    ) -> list[MediaRef | object]:
        """What the JSON names, among the row's members; a single medium is meant whatever it was called before."""
        wanted = given if isinstance(given, list) else [given]
        if len(wanted) == len(refs) == 1 and isinstance(wanted[0], str | dict):
            return [refs[0]]
        return [_named(name, names, key) if isinstance(name, str) else name for name in wanted]

    def _caption(self, member: int) -> str:
        try:
            return self._text(member).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {error.start + 1} of the caption {self.members.name(member)} is not UTF-8"
            ) from error

    def _text(self, member: int) -> bytes:
        length = self.members.length(member)
        if length > MAX_ROW_BYTES:
            raise DataError(
                f"the member {self.members.name(member)} has {length:,} bytes", expected=f"at most {MAX_ROW_BYTES:,}"
            )
        return pictures.read_bytes(self.members.ref(member))


def key_and_ending(name: str) -> tuple[str, str]:
    """``a/b.c/17.seg.PNG`` -> ``a/b.c/17``, ``seg.png``."""
    folder, slash, last = name.rpartition("/")
    base, _, ending = last.partition(".")
    return folder + slash + base, ending.lower()


def _kind(ending: str) -> str:
    return ending.rpartition(".")[2]


def _named(name: str, names: Mapping[str, MediaRef], key: str) -> MediaRef:
    found = names.get(name.removeprefix("./")) or names.get(name.rsplit("/", 1)[-1])
    if found is None:
        raise DataError(f"`{key}` names {name}, which is no member of the row", expected="a member's name or ending")
    return found


def _name_in_parts(row: Mapping[str, object], names: Mapping[str, MediaRef], key: str) -> bool:
    """Put media into the parts of `messages` that name them; whether there was one.

    OpenAI's parts carry their pictures themselves, ``{"type": "image_url", "image_url": {"url": "17.jpg"}}``.
    """
    turns = row.get("messages")
    found = False
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in (key, f"{key}_url"):
                continue
            holder, slot = _slot(part, key)
            if slot is not None and isinstance(name := holder[slot], str):
                found = True
                if name[:5].lower() != "data:":
                    holder[slot] = _named(name, names, key)
    return found


def _slot(part: dict[str, object], key: str) -> tuple[dict[str, object], str | None]:
    """Where in a part its medium is named."""
    slot = next((name for name in (f"{key}_url", key, "url", "path") if part.get(name) is not None), None)
    inner = part[slot] if slot is not None else None
    return (inner, "url" if "url" in inner else None) if isinstance(inner, dict) else (part, slot)


def _grouped(members: Members) -> Known:
    """The members of each row, and a hash of what the rows say.

    Rows are in the order in which they first appear; members of a row need not be neighbours, but lie in one archive.
    Returned: order, int64 (n,): members by row; starts, int64 (rows + 1,).
    """
    digest = hashlib.blake2b(digest_size=16)
    order, starts = array("q"), array("q", [0])
    archives = range(len(members.archives))
    for archive in track(archives, total=len(archives), label=f"Rows of {members.label}"):
        groups: dict[str, list[int]] = {}
        for member in members.members_of(archive):
            name = members.name(member)
            if not name.rpartition("/")[2].startswith("."):
                groups.setdefault(key_and_ending(name)[0], []).append(member)
        for group in groups.values():
            texts = [member for member in group if _is_text(members, member)]
            for member in group:
                digest.update(f"{members.name(member)} {members.length(member)}\n".encode("utf-8", "surrogateescape"))
            for member in texts:
                digest.update(_content(members, member))
            first = min(texts, key=lambda member: not members.name(member).lower().endswith(".json"), default=group[0])
            order.extend([first, *(member for member in group if member != first)])
            starts.append(len(order))
    arrays = {"order": np.array(order, np.int64), "starts": np.array(starts, np.int64)}
    return arrays, {"digest": digest.hexdigest()}


def _is_text(members: Members, member: int) -> bool:
    return _kind(key_and_ending(members.name(member))[1]) in {_JSON, *_CAPTIONS}


def _content(members: Members, member: int) -> bytes:
    """The bytes of a text, or nothing where reading its row will be refused."""
    if members.length(member) > MAX_ROW_BYTES:
        return b""
    try:
        return pictures.read_bytes(members.ref(member))
    except DataError:
        return b""
