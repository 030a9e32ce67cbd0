"""Random access to the rows of all sources of a run.

A source is what one entry under `data.sources` names. What kind of file it is decides which `Rows` reads it; after that
nothing but its origin tells a row of a tar from a line of a .jsonl file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from vlmtune.config.schema import AnySource, HubSource, Mixed, SourceConfig
from vlmtune.data.rows.adapters import check_columns, to_sample
from vlmtune.data.rows.archives import Members, TarRoot, archives_of, is_archive, names_archives
from vlmtune.data.rows.folders import settled
from vlmtune.data.rows.hub import fetched
from vlmtune.data.rows.json_rows import JsonRows
from vlmtune.data.rows.lists import Listed, expand
from vlmtune.data.rows.paths import MediaRoot, RenamedRoot, Root
from vlmtune.data.rows.patterns import PICKLED, files_of
from vlmtune.data.rows.tables import TableRows, is_table
from vlmtune.data.rows.webdataset import WebDatasetRows
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, UsageError


class Rows(Protocol):
    """The rows of one source in a fixed order. Read-only, and picklable without open files."""

    @property
    def files(self) -> tuple[str, ...]:
        """Absolute paths of the files that hold the rows; an origin begins with the name of one of them."""
        ...

    @property
    def digest(self) -> str:
        """A hash of what the rows say, independent of where the files lie."""
        ...

    def __len__(self) -> int: ...

    def place(self, i: int) -> tuple[int, str]:
        """Which of `files` holds row `i`, and what follows the file's name in its origin (`124`, a member's name)."""
        ...

    def find(self, file: int, label: str) -> int | None:
        """The row with this place, or None."""
        ...

    def read(self, i: int, origin: str) -> object:
        """Row `i` as JSON would say it; a picture that lies in the row itself stands there as a `MediaRef`.

        Raises:
            DataError: the row cannot be read; `origin` is its place.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One entry of the sources, opened."""

    name: str
    """What tables call it: its file's name, or what the configuration says where it has several."""
    names: tuple[str, ...]
    """What origins call each of its files: the name, with as many folders as tell it from all others."""
    rows: Rows
    media: Root
    options: Mixed

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, i: int) -> str:
        """Where row `i` of this source stands."""
        file, label = self.rows.place(i)
        return f"{self.names[file]}:{label}"

    def adapt(self, row: object, origin: str) -> Sample:
        """Raises DataError: see `adapters.to_sample`."""
        return to_sample(row, origin=origin, locate=self.media.locate, options=self.options)


@dataclass(eq=False)
class Corpus:
    """All rows of a list of sources, in the order of the sources. Read-only and picklable; rows are numbered from 0."""

    sources: tuple[Source, ...]
    borders: np.ndarray = field(init=False, repr=False)
    """int64 (sources + 1,): the first row of each source, and the number of all rows."""

    def __post_init__(self) -> None:
        self.borders = np.concatenate([[0], np.cumsum(self.source_sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.borders[-1])

    @property
    def source_sizes(self) -> list[int]:
        return [len(source) for source in self.sources]

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def source_of(self, i: int) -> int:
        """The source that row `i` belongs to."""
        return self.split(i)[0]

    def split(self, i: int) -> tuple[int, int]:
        """The source that row `i` belongs to, and the row's number in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        which = int(np.searchsorted(self.borders, i, side="right")) - 1
        return which, i - int(self.borders[which])

    def origin(self, i: int) -> str:
        """`coco.jsonl:124` (line), `coco.json:124` (row, from 1), `x.parquet:124`, `shard.tar:name`."""
        which, local = self.split(i)
        return self.sources[which].origin(local)

    def sample(self, i: int) -> Sample:
        """Row `i` as a sample.

        Raises:
            DataError: with the origin, whatever is wrong with the row.
        """
        which, local = self.split(i)
        source = self.sources[which]
        origin = source.origin(local)
        return source.adapt(source.rows.read(local, origin), origin)

    def find(self, text: str) -> int:
        """The row with the origin `text` (``coco.jsonl:124``), or with the place `text` when there is one file.

        Raises:
            UsageError: no such row, or a place alone with several files.
        """
        files = [(which, file) for which, source in enumerate(self.sources) for file in range(len(source.names))]
        for which, file in files:
            name = self.sources[which].names[file]
            label = text.removeprefix(f"{name}:") if text.startswith(f"{name}:") else text if len(files) == 1 else None
            local = None if label is None else self.sources[which].rows.find(file, label)
            if local is not None:
                return int(self.borders[which]) + local
        known = [f"{self.sources[which].names[file]}:N" for which, file in files[:5]]
        last = f" (the last row is {self.origin(len(self) - 1)})" if len(files) == 1 else ""
        raise UsageError(f"no row is called {text!r}{last}", expected=" or ".join(known))

    def digest(self) -> str:
        """A hash of what all sources say, in order; independent of where the files lie."""
        whole = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            whole.update(f"{source.rows.digest} {len(source)}\n".encode())
        return whole.hexdigest()


def open_corpus(sources: Sequence[AnySource], *, allow: Sequence[str] = (), memory: Path | None = None) -> Corpus:
    """Open the files of `sources`; their paths and `allow` are absolute (`config.load` sees to it).

    Args:
        memory: the folder of prepared rows, where the index of an unchanged file is found again.

    Raises:
        DataError: a missing or foreign file, a `root` that is no folder, a list that is not closed, a list of sources
            that contradicts its files.
    """
    listed = expand(sources)
    settled_sources = [_settled(entry) for entry in listed]
    for source in settled_sources:
        check_columns(source.columns)
    opened = [_listed_rows(entry, source, memory) for entry, source in zip(listed, settled_sources, strict=True)]
    names = iter(_names([file for rows in opened for file in rows.files]))
    configured = [entry.source.hub if isinstance(entry.source, HubSource) else entry.source.path for entry in listed]
    patterns = iter(_names([path for path, rows in zip(configured, opened, strict=True) if len(rows.files) > 1]))
    found = []
    for entry, source, rows in zip(listed, settled_sources, opened, strict=True):
        own = tuple(next(names) for _ in rows.files)
        name = own[0] if len(own) == 1 else next(patterns)
        if entry.num_rows is not None and entry.num_rows != len(rows):
            raise DataError(
                f"the list says `length` {entry.num_rows:,}, but {own[0]} has {len(rows):,} "
                f"row{'' if len(rows) == 1 else 's'}",
                where=entry.where,
                remedy="Look whether the file is whole; if it is, correct `length` or take it out.",
            )
        media = _open_root(source, rows, name, allow, memory)
        found.append(Source(name=name, names=own, rows=rows, media=media, options=source))
    return Corpus(tuple(found))


def _settled(entry: Listed) -> SourceConfig:
    """A source whose path is a file or a pattern of files, or one folder that `save_to_disk` wrote."""
    source = entry.source
    if isinstance(source, HubSource):
        return fetched(source)
    try:
        found = settled(source) if os.path.isdir(source.path) else source
    except DataError as error:
        _name_line(error, entry)
        raise
    if found.split is not None:
        raise DataError(
            f"`split` is {found.split!r}, but there is one split only",
            where=os.path.basename(source.path),
            expected="`split` for dataset folders that have several",
            remedy="Take it out.",
        )
    return found


def _listed_rows(entry: Listed, source: SourceConfig, memory: Path | None) -> Rows:
    try:
        return _open_rows(source, memory)
    except DataError as error:
        _name_line(error, entry)
        raise


def _name_line(error: DataError, entry: Listed) -> None:
    """Puts the line of the list that names the file, where there is one, in front of the error's own place."""
    error.where = ": ".join(place for place in (entry.where, error.where) if place)


def _open_rows(source: SourceConfig, memory: Path | None) -> Rows:
    """The rows of a source, by the kind of its files."""
    files = files_of(source.path)
    first = os.path.basename(files[0])
    if os.path.splitext(first)[1].lower() in PICKLED:
        raise DataError(
            "files of this kind run code when they are opened, so they are not read",
            where=first,
            expected=".jsonl, .json, .parquet, .tar or a folder of `datasets`",
            remedy="Save the rows as .jsonl with the tool that wrote them.",
        )
    if is_table(files[0]):
        return TableRows(files, memory)
    if is_archive(files[0]):
        return WebDatasetRows(Members(archives_of(files), memory), memory)
    if len(files) > 1:
        raise DataError(
            f"the pattern means {len(files)} files, {first} and others",
            where=source.path,
            expected="several .parquet or .tar files, or one .jsonl",
            remedy="Make each .jsonl a source of its own.",
        )
    return JsonRows(files[0], first, memory)


def _open_root(source: SourceConfig, rows: Rows, name: str, allow: Sequence[str], memory: Path | None) -> Root:
    """Where the media of a source are; `name` is what messages call its file."""
    root = _root_of(source, rows, name, (*allow, *filter(None, source.replace_prefix.values())), memory)
    return RenamedRoot(root, source.replace_prefix) if source.replace_prefix else root


def _root_of(source: SourceConfig, rows: Rows, name: str, allow: tuple[str, ...], memory: Path | None) -> Root:
    given = () if source.root is None else source.root
    roots = (given,) if isinstance(given, str) else given
    if roots and all(names_archives(root) for root in roots):
        return TarRoot(Members(archives_of(roots), memory))
    for folder in roots:
        if not os.path.isdir(folder):
            raise DataError(
                f"the media root {folder} is not a folder",
                where=name,
                expected="folders, or tar files",
                remedy="Correct `root` of this source.",
            )
    if roots:
        return MediaRoot(roots[0], why="`root` of the source", more=roots[1:], allow=allow)
    if isinstance(rows, WebDatasetRows):
        return TarRoot(rows.members)
    folder = os.path.dirname(os.path.abspath(rows.files[0]))
    return MediaRoot(folder, why=f"the folder of {name}, as the source has no `root`", allow=allow)


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell different files apart."""
    parts = {path: path.strip("/").split("/") for path in paths}
    named: dict[str, str] = {}
    pending, depth = set(parts), 1
    while pending:
        ends: dict[str, list[str]] = {}
        for path in pending:
            ends.setdefault("/".join(parts[path][-depth:]), []).append(path)
        taken = set(named.values())
        for end, owners in ends.items():
            if len(owners) == 1 and end not in taken:
                named[owners[0]] = end
            else:
                named.update({path: path for path in owners if depth >= len(parts[path])})
        pending -= set(named)
        depth += 1
    return [named[path] for path in paths]
