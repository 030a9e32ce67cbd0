"""Pages -> embedding files: which pages there are, what is still to do, and what was done.

An output is written beside its place and renamed, so one that is there is whole. It is kept if it has the form that
would be written now, and neither its picture nor its JSON is younger. The settings of all outputs of a folder stand in
`SETTINGS`; other settings are refused there rather than mixed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from vlmtune.config.schema import MediaOptions
from vlmtune.embed.encoder import EncodedRegions, RegionEncoder, crops_of
from vlmtune.embed.pages import Source
from vlmtune.embed.regions import Page, SquareRule, at, read_page
from vlmtune.errors import DataError, UsageError, WeightsError
from vlmtune.files import write_atomic
from vlmtune.progress import track
from vlmtune.weights import pickles
from vlmtune.weights.shards import dtype_name, read_header

SETTINGS = "embed.json"
TENSOR = "embedding"
"""Name of the only tensor in a .safetensors file."""
Suffix = Literal[".safetensors", ".pt"]


@dataclass(frozen=True, slots=True)
class Job:
    """out: the file that the page's rows go to."""

    page: Page
    out: Path


@dataclass(kw_only=True)
class Outcome:
    """What a person wants to know afterwards.

    rows: by output file, how many rows it has; those that were kept included.
    kept: outputs that were there already.
    failed: messages on pages without an output.
    """

    rows: dict[Path, int] = field(default_factory=dict)
    kept: int = 0
    regions: int = 0
    dropped: int = 0
    failed: list[str] = field(default_factory=list)


def read_pages(
    sources: Sequence[Source], media: MediaOptions, rule: SquareRule
) -> tuple[list[tuple[Source, Page]], list[str]]:
    """The pages that have regions to encode, and messages on those that cannot be read."""
    pages, failed = [], []
    for source in track(sources, total=len(sources), label="Reading the pages"):
        try:
            pages.append((source, read_page(source.json, source.picture, media, rule)))
        except DataError as error:
            failed.append(str(error))
    return pages, failed


def encode(jobs: Sequence[Job], encoder: RegionEncoder, dtype: torch.dtype, *, keep: bool = True) -> Outcome:
    """Encodes pages, and writes one file for each.

    keep: only those that have no whole output yet.
    A page that cannot be decoded, or of which no row is left, has no output and is told in `Outcome.failed`.
    """
    outcome = Outcome()
    todo = []
    for job in jobs:
        found = rows_of(job, encoder.codebook.dim, dtype) if keep else None
        if found is None:
            todo.append(job)
        else:
            outcome.rows[job.out] = found
            outcome.kept += 1
    for group in _groups(track(todo, total=len(todo), label="Encoding"), encoder.batch_size):
        _encode_group(group, encoder, dtype, outcome)
    return outcome


def _groups(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Pages that together have about `size` regions: those of small pages share the tower's batches."""
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if sum(len(one.page.regions) for one in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _encode_group(group: Sequence[Job], encoder: RegionEncoder, dtype: torch.dtype, outcome: Outcome) -> None:
    opened = []
    for job in group:
        try:
            opened.append((job, crops_of(job.page.open(), job.page.regions)))
        except DataError as error:
            outcome.failed.append(str(error))
    if not opened:
        return
    try:
        parts = _encoded(opened, encoder)
    except DataError as error:  # of one region; which page's, the pages tell one by one
        if len(opened) == 1:
            outcome.failed.append(str(at(error, opened[0][0].page.picture)))
            return
        for job, _ in opened:
            _encode_group([job], encoder, dtype, outcome)
        return
    for (job, crops), rows in zip(opened, parts, strict=True):
        try:
            write_rows(job.out, rows, dtype)
        except DataError as error:
            outcome.failed.append(str(at(error, job.page.picture)))
            continue
        outcome.rows[job.out] = len(rows)
        outcome.regions += len(crops)
        outcome.dropped += len(crops) * encoder.resampler.shape.num_learns - len(rows)


def _encoded(opened: Sequence[tuple[Job, Sequence[Any]]], encoder: RegionEncoder) -> list[torch.Tensor]:
    """The rows of each page."""
    found: EncodedRegions = encoder.encode_crops([crop for _, crops in opened for crop in crops])
    counts = iter(found.counts)
    sizes = [sum(next(counts) for _ in crops) for _, crops in opened]
    return list(found.rows.split(sizes))


def write_rows(out: Path, rows: torch.Tensor, dtype: torch.dtype) -> None:
    """Rows (n, d) as a file of its suffix: a safetensors file with the tensor `embedding`, or a bare tensor in a .pt.

    Raises:
        DataError: no rows; numbers that `dtype` cannot hold.
    """
    if not len(rows):
        raise DataError(
            "no row is left: every vector of every region is nearest to the padding token",
            remedy="The encoder does not know such regions. Leave the page out, or keep all rows with --keep-padding.",
        )
    ready = rows.to(dtype).contiguous().clone()  # a view would bring its whole storage along
    if not ready.isfinite().all():
        raise DataError(f"{str(dtype).removeprefix('torch.')} is too small for the vectors", remedy="Write float32.")
    if out.suffix == ".safetensors":
        write_atomic(out, save({TENSOR: ready}, metadata={"format": "pt"}))
        return
    stream = io.BytesIO()
    torch.save(ready, stream)
    write_atomic(out, stream.getvalue())


def rows_of(job: Job, dim: int, dtype: torch.dtype) -> int | None:
    """How many rows an output has that need not be written again; None if it must be."""
    if not job.out.is_file():
        return None
    made = job.out.stat().st_mtime_ns
    if any(file.stat().st_mtime_ns > made for file in (job.page.picture, job.page.json)):
        return None
    try:
        shape, found = _form(job.out)
    except WeightsError:
        return None
    whole = len(shape) == 2 and shape[0] > 0 and shape[1] == dim and found == str(dtype).removeprefix("torch.")
    return shape[0] if whole else None


def _form(file: Path) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the tensor in an output, from its header where it has one."""
    if file.suffix == ".safetensors":
        infos = read_header(file)
        if [info.name for info in infos] != [TENSOR]:
            return (), ""
        return infos[0].shape, dtype_name(infos[0].dtype)
    held = pickles.load(file)
    return (tuple(held.shape), str(held.dtype).removeprefix("torch.")) if isinstance(held, torch.Tensor) else ((), "")


def claim(folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Notes the settings that the outputs of a folder have in common.

    Args:
        overwrite: the outputs of these pages are deleted first.

    Raises:
        UsageError: the folder has outputs of other settings, or of unknown ones.
    """
    file = folder / SETTINGS
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    there = sum(job.out.exists() for job in jobs)
    found = ""
    if not isinstance(known, dict):
        found = f"{there} of the files that would be written are there, and nothing tells how they were made"
    elif differ := [key for key in settings if known.get(key) != settings[key]]:
        found = f"the folder holds embeddings of other settings ({', '.join(differ)})"
    if found and there and not overwrite:
        raise UsageError(
            found, where=str(folder), remedy="Choose another folder, or encode everything again with --overwrite."
        )
    if overwrite:
        for job in jobs:
            job.out.unlink(missing_ok=True)
    write_atomic(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
