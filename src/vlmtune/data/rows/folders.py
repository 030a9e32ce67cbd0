"""A dataset folder as a source: which of its files hold rows, which of those are of the split, and where media are.

==================================  =================================================================================
`dataset_dict.json`, `state.json`   written by `save_to_disk`: the folder of the split
`metadata.jsonl`, `.csv`            an "imagefolder": rows that name their pictures in `file_name` or `file_names`
`*.parquet`                         all files of the split
`*.jsonl`, `*.json`                 the one file of the split; tars in the folder hold its media
`*.tar`, parts of tars              WebDataset shards, all of the split
==================================  =================================================================================

The first kind that is there counts. A file is of a split when a part of its path says so: ``data/train-00000-of-00004
.parquet``, ``val.jsonl``, ``test/metadata.jsonl``.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Sequence

from vlmtune.config.schema import SourceConfig
from vlmtune.data.rows.archives import is_archive
from vlmtune.data.rows.tables import column_names
from vlmtune.errors import DataError

_DICT, _STATE = "dataset_dict.json", "state.json"
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NO_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", _DICT, _STATE})
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}


def settled(source: SourceConfig, files: Sequence[str] | None = None) -> SourceConfig:
    """`source`, whose path is a folder, as a source of the files in it.

    Args:
        files: the paths to look at, relative to the folder; all when None.

    Raises:
        DataError: no rows, several files where one is needed, an unknown split.
    """
    folder = source.path
    if os.path.isfile(os.path.join(folder, _DICT)):
        return source.model_copy(update={"path": _saved_split(folder, source.split), "split": None})
    if os.path.isfile(os.path.join(folder, _STATE)):
        return source
    everything = _files_under(folder) if files is None else sorted(files)
    metadata = [file for file in everything if os.path.basename(file) in _METADATA]
    tables = [file for file in everything if file.lower().endswith(".parquet")]
    texts = [file for file in everything if file.lower().endswith((".jsonl", ".json"))]
    texts = [file for file in texts if os.path.basename(file) not in _NO_ROWS]
    tars = [file for file in everything if is_archive(file)]
    if metadata:
        return _imagefolder(source, _only(metadata, source))
    if tables:
        return source.model_copy(update={"path": _joined(folder, _of_split(tables, source)), "split": None})
    if texts:
        update: dict[str, object] = {"path": os.path.join(folder, _only(texts, source)), "split": None}
        if tars and source.root is None:
            update["root"] = tuple(os.path.join(folder, tar) for tar in tars)
        return source.model_copy(update=update)
    if tars:
        return source.model_copy(update={"path": _joined(folder, _of_split(tars, source)), "split": None})
    kinds = sorted({os.path.splitext(file)[1] or "no ending" for file in everything})
    raise DataError(
        f"the folder holds no file with rows (it holds {', '.join(kinds[:6]) or 'nothing'})",
        where=_label(source),
        expected=".parquet, .jsonl, .json or .tar files, or what `save_to_disk` writes",
        remedy="A folder of pictures needs a metadata.jsonl, or a .jsonl as `path` and the folder as `root`.",
    )


def _files_under(folder: str) -> list[str]:
    """All files, as paths from `folder`; hidden folders and files are none of the data's."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.relpath(os.path.join(here, name), folder) for name in names if not name.startswith(".")]
    return sorted(found)


def _saved_split(folder: str, split: str | None) -> str:
    """The folder of one split of a saved `DatasetDict`."""
    where = os.path.basename(folder)
    try:
        with open(os.path.join(folder, _DICT), encoding="utf-8") as stream:
            splits = json.load(stream)["splits"]
        names = [name for name in splits if isinstance(name, str) and os.path.basename(name) == name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{_DICT} cannot be read ({error})", where=where) from error
    return os.path.join(folder, _one_split(names, split, where))


def _one_split(names: Sequence[str], split: str | None, where: str) -> str:
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in names:
        raise DataError(
            f"there is no split {wanted!r} (there are: {', '.join(names) or 'none'})",
            where=where,
            remedy="Say which one: `split` of the source.",
        )
    return wanted


def _of_split(files: Sequence[str], source: SourceConfig) -> list[str]:
    """The files whose paths name the split; all of them when none names one and none is asked for."""
    words = {file: {_SPLIT_OF.get(word, word) for word in re.split(r"[/._\- ]+", file.lower())} for file in files}
    known = sorted({split for found in words.values() for split in found if split in _SPLITS})
    if source.split is None and not known:
        return list(files)
    asked = None if source.split is None else _SPLIT_OF.get(source.split.lower(), source.split.lower())
    if asked is not None and asked not in _SPLITS:
        known = sorted({*known, *(asked for found in words.values() if asked in found)})
    split = _one_split(known, asked, _label(source))
    without = [file for file in files if not words[file] & set(known)]
    if without and asked is None:
        raise DataError(
            f"the file {without[0]} belongs to no split, while others belong to {', '.join(known)}",
            where=_label(source),
            remedy="Say which split: `split` of the source; or name the files as `path`.",
        )
    return [file for file in files if split in words[file]]


def _only(files: Sequence[str], source: SourceConfig) -> str:
    found = _of_split(files, source)
    if len(found) > 1:
        raise DataError(
            f"the folder holds {len(found)} files with rows: {', '.join(found[:4])}{', …' if len(found) > 4 else ''}",
            where=_label(source),
            expected="one, or one of each split",
            remedy="Make each of them a source of its own.",
        )
    return found[0]


def _joined(folder: str, files: Sequence[str]) -> str:
    """One path or pattern for some files of a folder."""
    if len(files) == 1:
        return os.path.join(folder, files[0])
    odd = next((file for file in files if re.search(r"[{},]", file)), None)
    if odd is not None:
        raise DataError(f"the name {odd!r} holds a brace or a comma", where=os.path.basename(folder))
    return os.path.join(folder, "{" + ",".join(glob.escape(file) for file in files) + "}")


def _imagefolder(source: SourceConfig, metadata: str) -> SourceConfig:
    """`file_name` is the row's picture; it starts from the folder of the metadata, as any source's paths do."""
    path = os.path.join(source.path, metadata)
    names = _names_in(path)
    named = {"image": "file_name", "images": "file_names"}
    columns = {key: name for key, name in named.items() if name in names}
    if not columns:
        raise DataError("there is no `file_name`", where=metadata, expected="the picture of each row in `file_name`")
    return source.model_copy(update={"path": path, "columns": {**columns, **source.columns}, "split": None})


def _names_in(path: str) -> list[str]:
    """The names of a metadata file's columns."""
    try:
        if path.endswith(".parquet"):
            return column_names(path)
        with open(path, encoding="utf-8-sig", newline="") as stream:
            if path.endswith(".csv"):
                return next(csv.reader(stream), [])
            row = json.loads(stream.readline() or "null")
            return list(row) if isinstance(row, dict) else []
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"the file cannot be read ({error})", where=os.path.basename(path)) from error


def _label(source: SourceConfig) -> str:
    return os.path.basename(source.path)
