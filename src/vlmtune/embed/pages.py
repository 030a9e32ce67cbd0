"""Which pages there are: a picture with its JSON, or all of a folder; and where what belongs to them goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import DataError, UsageError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"})
"""Suffixes, in small letters, by which a file of a folder is taken for a picture."""


@dataclass(frozen=True, slots=True)
class Source:
    """stem: where it was found, below the folder and without suffix; outputs are named after it."""

    picture: Path
    json: Path
    stem: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """
    bare: pictures without a JSON beside them.
    orphans: JSON files without a picture beside them.
    """

    sources: tuple[Source, ...]
    bare: tuple[Path, ...] = ()
    orphans: tuple[Path, ...] = ()


def find_pages(place: Path, json: Path | None = None) -> Found:
    """The pages that `place` means: a picture, with the JSON of its name or `json`; or every such pair below a folder.

    Raises:
        UsageError: no such file; `json` with a folder.
        DataError: a picture without JSON; a folder without a page, or with two pictures for one JSON.
    """
    if place.is_dir():
        if json is not None:
            raise UsageError("--json belongs to one picture", where=str(place), remedy="Remove it, or name a picture.")
        return _in_folder(place)
    if not place.is_file():
        raise UsageError("no such picture or folder", where=str(place))
    beside = json or place.with_suffix(".json")
    if not beside.is_file():
        raise DataError(
            f"there is no {beside.name} beside it" if json is None else f"there is no file {json}", where=str(place),
            expected="a labelme JSON with the regions", remedy="Name it with --json FILE.",
        )  # fmt: skip
    return Found(sources=(Source(place, beside, Path(place.stem)),))


def _in_folder(folder: Path) -> Found:
    pictures: dict[Path, Path] = {}
    jsons: set[Path] = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            if name.startswith("."):
                continue
            if file.suffix == ".json":
                jsons.add(file)
            elif file.suffix.lower() in PICTURES:
                other = pictures.setdefault(file.with_suffix(""), file)
                if other != file:
                    raise DataError(
                        f"{other.name} and {file.name} would share one JSON and one embedding", where=parent,
                        remedy="Rename one of them.",
                    )  # fmt: skip
    paired = {bare for bare in pictures if bare.with_name(f"{bare.name}.json") in jsons}
    sources = tuple(
        Source(pictures[bare], bare.with_name(f"{bare.name}.json"), bare.relative_to(folder)) for bare in sorted(paired)
    )
    if not sources:
        raise DataError(
            f"no page is in this folder: {len(pictures)} pictures, {len(jsons)} JSON files, and no pair of one name",
            where=str(folder), expected="pictures with labelme JSON files of the same names beside them",
        )  # fmt: skip
    used = {source.json for source in sources}
    return Found(
        sources=sources,
        bare=tuple(pictures[bare] for bare in sorted(set(pictures) - paired)),
        orphans=tuple(sorted(jsons - used)),
    )


def below(root: Path, files: Sequence[Path]) -> list[str]:
    """The paths relative to `root`, as rows name their media.

    Raises:
        UsageError: one lies elsewhere, or has a name that is no text; such rows could not be read.
    """
    found = []
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"the name {str(file)!r} is not UTF-8, and rows are", where=str(root), remedy="Rename the file."
            ) from None
        relative = Path(os.path.relpath(file.absolute(), root.absolute()))
        if ".." in relative.parts:
            raise UsageError(
                f"{file} is not below it, and rows may not lead out of their folder", where=str(root),
                remedy="Write the rows to a folder above pictures and embeddings, or name that folder with --root and "
                "as the root of the source.",
            )  # fmt: skip
        found.append(relative.as_posix())
    return found
