"""From what a YAML says about files (`shards/*.tar`, `part_{aa,ab}`, `x-{000..012}.tar`) to files, in order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator

from vlmtune.errors import DataError

PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may run code when they are opened."""

MAX_FILES = 1_000_000  # more is a slip in a range of braces
_WILD = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_pattern(path: str) -> bool:
    """Whether `path` stands for several files; a file with just this name is meant itself."""
    return _WILD.search(path) is not None and not os.path.lexists(path)


def refuse_special(path: str) -> None:
    """
    Raises:
        DataError: `path` is a pipe, a device or a socket; opening one may wait for ever, and nothing can be read twice.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(
            f"{path} is no regular file, but a pipe or a device",
            where=os.path.basename(path),
            expected="a file or a folder",
            remedy="Save what comes out of it as a file, and give its path.",
        )


def files_of(path: str) -> tuple[str, ...]:
    """The files that `path` stands for: itself, or what its braces and `*`, `?`, `[…]`, `**` match, sorted by name.

    Braces come first, in the order in which they are written; each alternative has to match something.

    Raises:
        DataError: nothing matches, a file of a range is missing, or `path` is a pipe or a device.
    """
    if not is_pattern(path):
        refuse_special(path)
        return (path,)
    found: list[str] = []
    for alternative in _expand_braces(path):
        wild = re.search(r"[*?\[]", alternative) is not None and not os.path.lexists(alternative)
        matches = sorted(glob.glob(alternative, recursive=True)) if wild else [alternative]
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            raise DataError(
                f"no file matches {alternative}" if wild else f"there is no file {alternative}",
                where=path if alternative != path else "",
                remedy="Correct the path in the YAML (a relative one starts from the YAML's own folder).",
            )
        found += files
    return tuple(dict.fromkeys(found))


def _expand_braces(path: str) -> Iterator[str]:
    """``a{0..2}`` -> a0 a1 a2, ``{x,y}`` -> x y; other braces are kept as they are."""
    for braces in _BRACES.finditer(path):
        choices = _choices(braces[1], path)
        if choices is not None:
            before, rests = path[: braces.start()], list(_expand_braces(path[braces.end() :]))
            yield from (before + choice + rest for choice in choices for rest in rests)
            return
    yield path


def _choices(inside: str, path: str) -> list[str] | None:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else None
    first, last = int(span[1]), int(span[2])
    if last < first or last - first >= MAX_FILES:
        raise DataError(f"the range {{{inside}}} has no order or is too long", where=path, expected="{000..012}")
    width = len(span[1]) if span[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
