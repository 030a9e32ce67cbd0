"""Thousands of embedding files as one store: a safetensors file that is mapped, with one tensor per file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import SourceConfig
from vlmtune.data.encode import with_origin
from vlmtune.data.media import embedding
from vlmtune.data.rows.corpus import Source, open_corpus
from vlmtune.data.sample import MediaRef
from vlmtune.embed.pages import below
from vlmtune.embed.rows import write_rows_file
from vlmtune.errors import DataError, UsageError, VlmtuneError
from vlmtune.progress import track
from vlmtune.weights.places import SINGLE
from vlmtune.weights.shards import TensorInfo, dtype_code, write_shards

if TYPE_CHECKING:
    import torch

_KEYS = ("embedding", "embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """rows: written. files: distinct ones in the store. vectors, num_bytes: of all of them."""

    rows: int
    files: int
    vectors: int
    num_bytes: int


def gather(rows: Path, store: Path, out: Path, *, root: Path | None = None, overwrite: bool = False) -> Gathered:
    """Writes the files that the rows name into `store`, and the same rows to `out`, naming the tensors there.

    A tensor is called as its file is in the rows, and keeps its numbers. `out` is written once `store` is whole.

    Args:
        rows: .json or .jsonl; out: with one of these suffixes.
        root: folder that paths in the rows start from, above `store`; the folder of `rows` if left out.
        overwrite: replace `store` and `out` where they are there.

    Raises:
        DataError: rows that cannot be read, or name no embedding; a file that is no floating (n, d) tensor or has NaN
            or infinity in it, with the origin of its first row. Nothing is written then.
        UsageError: `store` does not lie below the root; `store` or `out` is there.
        VlmtuneError: `store` or `out` cannot be written.
    """
    root = (root or rows.parent).absolute()
    (name,) = below(root, [store])
    for file in (store, out):
        if file.exists() and not overwrite:
            raise UsageError(
                "is there", where=str(file), remedy="Choose another name, or replace what is there with --overwrite."
            )
    (source,) = open_corpus([SourceConfig(path=str(rows.absolute()), root=str(root))]).sources
    refs: dict[str, tuple[MediaRef, str]] = {}  # name in the rows -> its file, and the first row that names it
    changed = [_with_store(source, i, name, refs) for i in range(len(source))]
    if not refs:
        raise DataError("no row names an embedding", where=str(rows), expected="`embedding` in some of them")
    plan = [_info(file, *found) for file, found in refs.items()]
    _write(store, plan, refs)
    write_rows_file(out, changed)
    return Gathered(
        rows=len(changed),
        files=len(plan),
        vectors=sum(info.shape[0] for info in plan),
        num_bytes=sum(info.num_bytes for info in plan),
    )


def _with_store(source: Source, i: int, store: str, refs: dict[str, tuple[MediaRef, str]]) -> dict[str, Any]:
    """The row with the names that its embeddings have in the store."""
    origin = source.origin(i)
    row = source.rows.read(i, origin)
    if not isinstance(row, dict):
        raise DataError("the row is no object", where=origin, expected="{ … }")
    changed = dict(row)
    for key in _KEYS:
        value = row.get(key)
        files = value if isinstance(value, list) else [value] if value else []
        for file in files:
            if not isinstance(file, str):
                raise DataError(f"`{key}` holds something else than paths", where=origin, expected="a path, or a list")
            refs.setdefault(file, (_located(source, file, origin), origin))
        named = [f"{store}#{file}" for file in files]
        if files:
            changed[key] = named if isinstance(value, list) else named[0]
    return changed


def _located(source: Source, name: str, origin: str) -> MediaRef:
    path, key = embedding.split_name(name)
    try:
        ref = source.media.locate(path)
    except DataError as error:
        raise with_origin(error, origin) from error
    return MediaRef(path=ref.path, key=key)


def _info(file: str, ref: MediaRef, origin: str) -> TensorInfo:
    tensor = _loaded(ref, origin)
    return TensorInfo(file, dtype_code(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))


def _loaded(ref: MediaRef, origin: str) -> torch.Tensor:
    try:
        return embedding.load(ref)
    except DataError as error:
        raise with_origin(error, origin) from error


def _write(store: Path, plan: list[TensorInfo], refs: dict[str, tuple[MediaRef, str]]) -> None:
    def advance(infos: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
        return track(infos, total=len(plan), label="gathering")

    whole = sum(info.num_bytes for info in plan)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.parent, prefix=f".{store.name}.") as draft:
            write_shards(Path(draft), plan, lambda file: _loaded(*refs[file]), max_shard_bytes=whole, advance=advance)
            os.replace(Path(draft) / SINGLE, store)
    except OSError as error:
        raise VlmtuneError(
            f"cannot be written ({error.strerror or error})",
            where=str(store),
            remedy="Free some space, or choose another folder.",
        ) from error
