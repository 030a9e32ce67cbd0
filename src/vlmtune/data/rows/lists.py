"""Lists of sources in the forms of other tools, taken apart: one source per file, with how often its rows come.

=========================  ============================================================================================
XTuner's three lists       `data_paths`, `image_folders`, `repeat_times` in the YAML: `repeat` per file
InternVL's meta .json      ``{name: {root, annotation, repeat_time, …}}``, known by its content: `repeat` per entry
XComposer's .txt           ``<path> <number>`` per line: thousands of rows (`choose`), or ratios (`repeat`)
=========================  ============================================================================================

What stands on the configured source holds for each of its files; its `repeat` multiplies theirs.

Relative paths in a list start from the first folder that has all the files of the list: the `root` of its source, the
list's own folder, or one above it. The tools that the lists come from start them from the folder they are run in, which
usually is above the list.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from vlmtune.config.schema import AnySource, HubSource, ImageOptions, Read, SourceConfig, XTunerLists
from vlmtune.config.section import MAX_TILES
from vlmtune.config.sources import MAX_CHOOSE, MAX_REPEAT
from vlmtune.data.counts import exact_count
from vlmtune.data.rows.formats import cut
from vlmtune.data.rows.json_rows import no_key_twice, parse_row
from vlmtune.data.rows.paths import renamed
from vlmtune.data.rows.patterns import files_of, is_pattern, refuse_special
from vlmtune.errors import DataError

MAX_LIST_BYTES = 16 << 20  # a list of files; anything larger is something else
MAX_PATH = 4096  # of Linux
_META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_WITH_ENDING = re.compile(r"\.(json|jsonl|parquet|tar)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Listed:
    """One source to open. `where`, `num_rows`: its place in the list that names it, and the rows it should have."""

    source: SourceConfig | HubSource
    where: str = ""
    num_rows: int | None = None


def expand(sources: Sequence[AnySource]) -> list[Listed]:
    """The sources that rows are read from, in order; their paths are absolute.

    Raises:
        DataError: a list that cannot be read, with its line or entry.
    """
    return [listed for source in sources for listed in _expand_one(source)]


def _expand_one(source: AnySource) -> list[Listed]:
    if isinstance(source, XTunerLists):
        return _xtuner(source)
    if isinstance(source, HubSource):
        return [Listed(source)]
    if source.path.lower().endswith(".txt"):
        return _xcomposer(source)
    meta = _meta_of(source.path)
    return [Listed(source)] if meta is None else _internvl(source, meta)


def _xtuner(lists: XTunerLists) -> list[Listed]:
    count = len(lists.data_paths)
    folders = lists.image_folders or (None,) * count
    repeats = lists.repeat_times or (1.0,) * count
    how = {name: value for name, value in lists if name in Read.model_fields}
    return [
        Listed(SourceConfig(path=path, root=folder, repeat=repeat, **how))
        for path, folder, repeat in zip(lists.data_paths, folders, repeats, strict=True)
    ]


# InternVL


def _meta_of(path: str) -> Mapping[str, Any] | None:
    """The entries of an InternVL meta file; None when the file is something else, which its reader will judge."""
    if not path.lower().endswith(".json"):
        return None
    raw = _read(path, begins_with=b"{")
    if raw is None:
        return None
    name = os.path.basename(path)

    try:
        meta = json.loads(raw.decode("utf-8"), object_pairs_hook=no_key_twice)
    except DataError as error:
        error.where = name
        raise
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        if b'"annotation"' in raw and "Extra data" not in str(error):
            parse_row(raw, name)  # says what is broken, and where
        return None
    entries = [entry for entry in meta.values() if isinstance(entry, dict)]
    return meta if any({"annotation", "repeat_time", "data_augment"} & set(entry) for entry in entries) else None


def _internvl(source: SourceConfig, meta: Mapping[str, Any]) -> list[Listed]:
    label = os.path.basename(source.path)
    _only_repeat(source, label)
    places = [f"{label}: {cut(name, 100)}" for name in meta]
    entries = [_checked_entry(entry, where) for entry, where in zip(meta.values(), places, strict=True)]
    entries = [_renamed(entry, source.replace_prefix) for entry in entries]
    base = _base(source, [(where, entry["annotation"]) for entry, where in zip(entries, places, strict=True)])
    return [_entry_source(source, entry, where, base) for entry, where in zip(entries, places, strict=True)]


def _checked_entry(entry: object, where: str) -> dict[str, Any]:
    """An entry whose keys are known and of the right kind; its numbers are positive."""
    if not isinstance(entry, dict):
        raise DataError(
            "the entry is no object", where=where, expected='{"root": …, "annotation": …, "repeat_time": 1}'
        )
    for key in entry:
        if key not in _META_KEYS:
            near = difflib.get_close_matches(key.lower(), _META_KEYS, n=1, cutoff=0.6)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise DataError(
                f"the entry has the unknown key `{cut(key, 100)}`{meant}", where=where, expected=", ".join(_META_KEYS)
            )
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("annotation", str, "the path of a .jsonl or .json file"),
        ("root", str, "a folder"),
        ("data_augment", bool, "true or false"),
        ("repeat_time", (int, float), "a number"),
        ("length", int, "the number of its rows"),
        ("max_dynamic_patch", int, "a whole number"),
    )
    for key, kind, expected in kinds:
        value = entry.get(key)
        if value is None and key != "annotation":
            continue
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise DataError(f"`{key}` is {json.dumps(value)[:60]}", where=where, expected=expected)
    if not entry["annotation"]:
        raise DataError("`annotation` is empty", where=where, expected="the path of a .jsonl or .json file")
    repeat, tiles = entry.get("repeat_time"), entry.get("max_dynamic_patch")
    if repeat is not None and not 0 < repeat < float("inf"):
        raise DataError(
            f"`repeat_time` is {cut(str(repeat), 40)}",
            where=where,
            expected="more than 0",
            remedy="Take the entry out of the list if none of its rows is wanted.",
        )
    if tiles is not None and not 1 <= tiles <= MAX_TILES:
        raise DataError(
            f"`max_dynamic_patch` is {cut(str(tiles), 40)}", where=where, expected=f"from 1 to {MAX_TILES:,}"
        )
    return entry


def _renamed(entry: dict[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """An entry whose paths are those of this machine."""
    paths = {key: renamed(entry[key], prefixes) for key in ("annotation", "root") if entry.get(key)}
    return {**entry, **paths}


def _entry_source(source: SourceConfig, entry: Mapping[str, Any], where: str, base: str) -> Listed:
    root, augment, tiles = entry.get("root"), entry.get("data_augment"), entry.get("max_dynamic_patch")
    image = source.image
    if tiles is not None:
        image = (image or ImageOptions()).model_copy(update={"max_tiles": tiles})
    repeat = _times(entry.get("repeat_time") or 1, source.repeat, f"{where}: `repeat_time`")
    changed = {
        "path": os.path.join(base, entry["annotation"]),
        "root": source.root if root is None else os.path.normpath(os.path.join(base, root)),
        "repeat": repeat,
        "image": image,
        "data_augment": source.data_augment if augment is None else augment,
    }
    return Listed(source.model_copy(update=changed), where, entry.get("length"))


# XComposer


def _xcomposer(source: SourceConfig) -> list[Listed]:
    label = os.path.basename(source.path)
    _only_repeat(source, label)
    numbered = _numbered_paths(source.path, label)
    lines = {where: (renamed(path, source.replace_prefix), number) for where, (path, number) in numbered.items()}
    without = [where for where, (_, number) in lines.items() if number is None]
    if without and len(without) < len(lines):
        raise DataError(
            "the line has no number, but others have",
            where=without[0],
            expected="a number on every line, or on none (then every row comes once)",
        )
    base = _base(source, [(where, path) for where, (path, _) in lines.items()])
    found = []
    for where, (path, number) in lines.items():
        file = os.path.normpath(os.path.join(base, path))
        root = source.root if source.root is not None else _media_folders(file, base)
        found.append(
            Listed(source.model_copy(update={"path": file, "root": root, **_mixing(source, number, where)}), where)
        )
    return found


def _media_folders(file: str, base: str) -> tuple[str, ...] | None:
    """Where media of rows in JSON are: in the file's folder, then in the list's; None if that is the same."""
    folder = os.path.dirname(file)
    return (folder, base) if file.lower().endswith((".json", ".jsonl")) and folder != base else None


def _numbered_paths(path: str, label: str) -> dict[str, tuple[str, str | None]]:
    """`data.txt:3` -> path and number, of every line that says something; `#` begins a comment line."""
    raw = _read(path)
    assert raw is not None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte 0x{raw[error.start]:02X} is not UTF-8", where=f"{label}:{number}", remedy="Save the file as UTF-8."
        ) from None
    found: dict[str, tuple[str, str | None]] = {}
    for i, line in enumerate(text.split("\n")):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        where = f"{label}:{i + 1}"
        *before, last = words.rsplit(None, 1)
        if _NUMBER.fullmatch(last):
            if not before:
                raise DataError(
                    f"the line holds the number {cut(last, 40)} only", where=where, expected="<path> <number>"
                )
            found[where] = (before[0], last)
        elif before and _WITH_ENDING.search(before[0]) and not _WITH_ENDING.search(last):
            raise DataError(
                f"{cut(repr(last), 100)} is not a number", where=where, expected="<path> <number>, as in `a.json 10`"
            )
        else:
            found[where] = (words, None)
    if not found:
        raise DataError("the list is empty", where=label, expected="lines like `path/to/vl_data.json 10`")
    return found


def _mixing(source: SourceConfig, number: str | None, where: str) -> dict[str, Any]:
    """What the number of a line means: rows per epoch in thousands, or a ratio."""
    if number is None:
        return {"repeat": source.repeat}
    if not Decimal(number) > 0:
        raise DataError(
            f"the number is {cut(number, 40)}", where=where, expected="more than 0", remedy="Take the line out."
        )
    if not source.given_num:
        return {"repeat": _times(number, source.repeat, where)}
    thousands = Decimal(number) * _decimal(source.repeat)
    if thousands * 1000 > MAX_CHOOSE:
        raise DataError(
            f"{cut(number, 40)} thousand rows are too many", where=where, expected=f"at most {MAX_CHOOSE:,} rows"
        )
    count = exact_count(thousands, 1000)
    if not count:
        raise DataError(
            f"{cut(number, 40)} thousand is less than half a row",
            where=where,
            expected="at least 0.0005",
            remedy="If the numbers are ratios, say `given_num: false` at this source.",
        )
    return {"choose": count, "repeat": None}


# Both


def _only_repeat(source: SourceConfig, label: str) -> None:
    for key, value in (("choose", source.choose), ("weight", source.weight)):
        if value is not None:
            raise DataError(
                f"the source is a list of files that says how often each comes, but has `{key}` as well",
                where=label,
                expected="no such key, or `repeat`, which multiplies what the list says",
            )


def _decimal(number: float | str | None) -> Decimal:
    return Decimal(1 if number is None else str(number))


def _times(number: float | str, factor: float | None, where: str) -> float:
    product = _decimal(number) * _decimal(factor)
    if product > MAX_REPEAT:
        raise DataError(f"every row would come {product:.3g} times", where=where, expected=f"at most {MAX_REPEAT:,}")
    return float(product)


def _base(source: SourceConfig, paths: Sequence[tuple[str, str]]) -> str:
    """The folder that the relative `paths` (place in the list, path) start from; see the module's docstring."""
    for where, path in paths:
        if "\0" in path or len(path) > MAX_PATH:
            found = "holds a zero byte" if "\0" in path else f"has {len(path):,} characters"
            raise DataError(
                f"the path {found}", where=where, expected=f"at most {MAX_PATH:,} characters, none of them 0"
            )
    tried = [source.root] if isinstance(source.root, str) else []
    tried.append(os.path.dirname(source.path))
    while os.path.dirname(tried[-1]) != tried[-1]:
        tried.append(os.path.dirname(tried[-1]))
    for where, path in paths:
        if os.path.isabs(path) and not _is_there("", path):
            raise DataError(
                f"there is no file {cut(path, 300)}",
                where=where,
                remedy="If it is another machine's path, say at the source where its files are here: "
                f"`replace_prefix: {{{cut(os.path.dirname(path), 200)}/: data/}}`; else correct it in the list.",
            )
    relative = [(where, path) for where, path in paths if not os.path.isabs(path)]
    for folder in tried:
        if all(_is_there(folder, path) for _, path in relative):
            return folder
    where, path, best = _first_missing(tried, relative)
    root = f"{source.root} (`root` of the source), " if isinstance(source.root, str) else ""
    raise DataError(
        f"there is no file {cut(path, 300)} under {best}; the relative paths of the list were looked for in "
        f"{root}{os.path.dirname(source.path)} and the folders above",
        where=where,
        remedy="Correct the path, or set `root` of this source to the folder that the paths of the list start from.",
    )


def _first_missing(folders: Sequence[str], paths: Sequence[tuple[str, str]]) -> tuple[str, str, str]:
    """Place and path of the first file that is missing in the folder that has most of them."""
    best = max(folders, key=lambda folder: sum(_is_there(folder, path) for _, path in paths))
    where, path = next((where, path) for where, path in paths if not _is_there(best, path))
    return where, path, best


def _is_there(folder: str, path: str) -> bool:
    found = os.path.join(folder, path)
    if not is_pattern(found):
        return os.path.exists(found)
    try:
        return bool(files_of(found))
    except DataError:
        return False


def _read(path: str, begins_with: bytes = b"") -> bytes | None:
    """The whole of a list; None when it does not begin as it should, or cannot be one, which its reader will judge."""
    name = os.path.basename(path)
    refuse_special(path)
    try:
        with open(path, "rb") as stream:
            if begins_with:
                if stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != begins_with:
                    return None
                stream.seek(0)
            raw = stream.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        if begins_with:
            return None
        raise DataError(
            f"the list {path} cannot be read ({error.strerror or error})",
            where=name,
            remedy="Correct `path` under data.sources.",
        ) from error
    if len(raw) > MAX_LIST_BYTES:
        if begins_with:
            return None
        raise DataError(f"the list has more than {MAX_LIST_BYTES:,} bytes", where=name, expected="one file per line")
    return raw.removeprefix(b"\xef\xbb\xbf") if begins_with else raw
