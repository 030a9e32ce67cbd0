"""Rows of tables, read by the `datasets` library (the extra `datasets`): parquet, csv, and what `save_to_disk` wrote.

Nothing is decoded: a picture in a cell stays the bytes that it is. Parquet cannot be read row by row, so `datasets`
copies each file once into its own cache of mapped Arrow files (`HF_DATASETS_CACHE`, which other tools share), where a
row costs its own bytes. What `save_to_disk` wrote is mapped as it lies. No network, no code from the data, no pickles.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.rows.remember import Known, remembered
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError
from vlmtune.progress import track

_STATE = "state.json"


class TableRows:
    """See `rows.corpus.Rows`. A row's label is its number in its file, from 1."""

    def __init__(self, files: Sequence[str], memory: Path | None = None) -> None:
        """
        Args:
            files: .parquet or .csv files, or folders that `save_to_disk` wrote; all their rows in order.

        Raises:
            DataError: `datasets` is not installed; a file that cannot be read; no rows.
        """
        _require_datasets(files[0])
        self.files = tuple(files)
        self._opened: dict[int, Any] = {}
        content = [path for file in self.files for path in _contents(file)]
        arrays, notes = remembered(memory, "table-1", content, self._learn)
        self.digest = str(notes["digest"])
        # Row 0 of file k is row starts[k].
        self._starts = np.concatenate([[0], np.cumsum(arrays["num_rows"])]).astype(np.int64)
        if not len(self):
            raise DataError("the table holds no rows", where=os.path.basename(files[0]))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}  # the process that unpickles opens its own

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, i: int) -> tuple[int, str]:
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return file, str(i - int(self._starts[file]) + 1)

    def find(self, file: int, label: str) -> int | None:
        if not label.isdecimal():
            return None
        i = int(self._starts[file]) + int(label) - 1
        return i if self._starts[file] <= i < self._starts[file + 1] else None

    def read(self, i: int, origin: str) -> object:
        """Row `i`; bytes stand there as a `MediaRef`, and a cell of pictures that are files as their paths."""
        file, label = self.place(i)
        try:
            (row,) = self._table(file)[int(label) - 1].to_pylist()
        except _mistakes() as error:
            raise DataError(f"the row cannot be read ({_line(error)})", where=origin) from error
        return {key: _as_json(value, f"`{key}`") for key, value in row.items()}

    def _learn(self) -> Known:
        """Number of rows of each file, and a hash of the files' bytes. Opening them fills the cache of `datasets`."""
        digest = hashlib.blake2b(digest_size=16)
        num_rows = []
        numbers = range(len(self.files))
        for file in track(numbers, total=len(numbers), label=f"Tables, from {os.path.basename(self.files[0])}"):
            for path in _contents(self.files[file]):
                with _opened(path) as stream:
                    digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
            table = self._table(file)
            if os.path.isdir(self.files[file]):
                _validate(table, self.files[file])
            num_rows.append(len(table))
        return {"num_rows": np.array(num_rows, np.int64)}, {"digest": digest.hexdigest()}

    def _table(self, file: int) -> Any:
        if file not in self._opened:
            self._opened[file] = _open(self.files[file])
        return self._opened[file]


def is_table(path: str) -> bool:
    """Whether a path is that of a parquet file, of an imagefolder's table, or a folder that `save_to_disk` wrote."""
    table = path.lower().endswith(".parquet") or os.path.basename(path) == "metadata.csv"
    return table or os.path.isfile(os.path.join(path, _STATE))


def column_names(path: str) -> list[str]:
    """The columns of a parquet file, from its last bytes.

    Raises:
        DataError: `datasets` is not installed.
        OSError, ValueError: the file cannot be read.
    """
    _require_datasets(path)
    import pyarrow.parquet

    return list(pyarrow.parquet.read_schema(path).names)


def _require_datasets(file: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            "this kind of source needs the library `datasets`, which is not installed",
            where=os.path.basename(file),
            remedy='Install it: pip install "vlmtune[datasets]".',
        )


def _contents(file: str) -> list[str]:
    """The files that hold the rows: `file` itself, or the Arrow files of a folder, in their order."""
    if not os.path.isdir(file):
        return [file]
    where = os.path.basename(file)
    try:
        with open(os.path.join(file, _STATE), encoding="utf-8") as stream:
            entries = json.load(stream)["_data_files"]
        names = [entry["filename"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{_STATE} cannot be read ({_line(error)})", where=where, expected="a folder written by `save_to_disk`"
        ) from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise DataError(
                f"{_STATE} names the file {name!r}", where=where, expected="Arrow files in the folder itself"
            )
    return [os.path.join(file, name) for name in names]


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"the source {path} cannot be read ({error.strerror or error})",
            where=os.path.basename(path),
            remedy="Correct `path` under data.sources.",
        ) from error


def _open(file: str) -> Any:
    """The table as `datasets.Dataset` whose rows are Arrow, so that no cell is decoded."""
    import datasets
    import pyarrow.parquet

    datasets.disable_progress_bars()
    try:
        if os.path.isdir(file):
            table = datasets.Dataset.load_from_disk(file)
        elif file.lower().endswith(".csv"):
            table = datasets.Dataset.from_csv(file)
        elif pyarrow.parquet.read_metadata(file).num_rows == 0:  # `datasets` has no name for such a file
            return ()
        else:
            table = datasets.Dataset.from_parquet(file)
        return table.with_format("arrow")
    except _mistakes() as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` wraps what happened in what it was doing
            cause = cause.__cause__
        full = isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError)
        raise DataError(
            f"the table cannot be opened ({_line(cause)})",
            where=os.path.basename(file),
            remedy="Its rows are copied into a cache: HF_DATASETS_CACHE may name a folder with more room."
            if full
            else "Look whether the file is whole; fetch or write it again.",
        ) from error


def _validate(table: Any, folder: str) -> None:
    """Arrow believes the offsets that a mapped file holds, so a damaged one would end the process when it is read."""
    try:
        table.data.validate(full=True)
    except _mistakes() as error:
        raise DataError(
            f"the Arrow files are damaged ({_line(error)})",
            where=os.path.basename(folder),
            remedy="Copy or write the folder again.",
        ) from error


def _mistakes() -> tuple[type[Exception], ...]:
    """What reading a damaged or foreign table raises."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    ours = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, NotImplementedError)
    return (*ours, pyarrow.ArrowException, DatasetsError)


def _as_json(value: object, place: str) -> object:
    """Bytes as a reference, alone or as ``{"bytes": …, "path": …}``, the form of a cell of pictures."""
    if isinstance(value, bytes):
        return MediaRef(path=f"{place} ({len(value):,} bytes in the row)", inline=value)
    if isinstance(value, list):
        return [_as_json(item, place) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            content, path = value["bytes"], value["path"]
            return _as_json(content, str(path or place)) if content is not None else path
        return {key: _as_json(item, f"`{key}`") for key, item in value.items()}
    return value


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
