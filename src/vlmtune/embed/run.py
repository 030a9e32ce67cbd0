"""Pages -> embedding files: which pages there are, what is still to do, and what was done.

An output is written beside its place and renamed, so one that is there is whole. It is kept if its rows have the
width of the model, and neither its picture nor its JSON is younger. The settings of all outputs of a folder stand in
`SETTINGS`; other settings are refused there rather than mixed.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import save

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import embedding
from vlmtune.data.sample import MediaRef
from vlmtune.embed.encoder import RegionEncoder, crops_of
from vlmtune.embed.pages import Source
from vlmtune.embed.regions import Page, SquareRule, at, read_page
from vlmtune.errors import DataError, UsageError
from vlmtune.files import write_atomic
from vlmtune.progress import track

SETTINGS = "embed.json"
TENSOR = "embedding"
"""Name of the only tensor in a .safetensors file."""
SUFFIXES = (".safetensors", ".pt")


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
        found = rows_of(job, encoder.codebook.dim) if keep else None
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
    readable: list[Job] = []
    try:
        found = encoder.encode_crops(_crops(group, readable, outcome))
    except DataError as error:
        # Of one of the pages, or none can be read; which one, they tell one by one.
        if len(readable) == 1:
            outcome.failed.append(str(at(error, readable[0].page.picture)))
        elif readable:
            for job in readable:
                _encode_group([job], encoder, dtype, outcome)
        return
    counts = iter(found.counts)
    sizes = [sum(itertools.islice(counts, len(job.page.regions))) for job in readable]
    for job, rows in zip(readable, found.rows.split(sizes), strict=True):
        try:
            write_rows(job.out, rows, dtype)
        except DataError as error:
            outcome.failed.append(str(at(error, job.page.picture)))
            continue
        outcome.rows[job.out] = len(rows)
        outcome.regions += len(job.page.regions)
        outcome.dropped += len(job.page.regions) * encoder.resampler.shape.num_learns - len(rows)


def _crops(group: Sequence[Job], readable: list[Job], outcome: Outcome) -> Iterator[PIL.Image.Image]:
    """The regions of pages, one page in memory at a time; those that can be decoded are noted in `readable`."""
    for job in group:
        try:
            picture = job.page.open()
        except DataError as error:
            outcome.failed.append(str(error))
            continue
        readable.append(job)
        yield from crops_of(picture, job.page.regions)


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


def rows_of(job: Job, dim: int) -> int | None:
    """How many rows an output has that need not be written again; None if it must be."""
    if not job.out.is_file():
        return None
    made = job.out.stat().st_mtime_ns
    if any(file.stat().st_mtime_ns > made for file in (job.page.picture, job.page.json)):
        return None
    try:
        width, count = embedding.shape(MediaRef(path=str(job.out.absolute())))
    except DataError:
        return None
    return count if width == dim else None


def claim(folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Notes the settings that the outputs of a folder have in common.

    Args:
        overwrite: the outputs of these pages are deleted first.

    Raises:
        UsageError: the folder has outputs of other settings, or of unknown ones; those of other pages stay as they are
            whatever `overwrite` says, so other settings are refused beside them.
    """
    file = folder / SETTINGS
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    there = 0 if overwrite else sum(job.out.exists() for job in jobs)
    remedy = "Choose another folder, or encode everything again with --overwrite."
    found = ""
    if not isinstance(known, dict) and there:
        found = f"{there} of the files that would be written are there, and nothing tells how they were made"
    elif isinstance(known, dict) and (differ := [key for key in settings if known.get(key) != settings[key]]):
        others = _others(folder, jobs)
        if there or others:
            found = f"the folder holds embeddings of other settings ({', '.join(differ)})"
        if others:
            found += f", {len(others):,} of them not of these pages and this suffix, such as {others[0]}"
            remedy = "Choose another folder."
    if found:
        raise UsageError(found, where=str(folder), remedy=remedy)
    if overwrite:
        for job in jobs:
            job.out.unlink(missing_ok=True)
    write_atomic(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _others(folder: Path, jobs: Sequence[Job]) -> list[Path]:
    """The embedding files below a folder, relative to it, that these jobs do not write."""
    ours = {job.out for job in jobs}
    found = (file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}") if file not in ours)
    return sorted(file.relative_to(folder) for file in found)
