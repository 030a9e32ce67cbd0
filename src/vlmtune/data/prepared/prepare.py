"""Rows prepared once: laid down, tokenised and counted into shards that every later command maps and reads.

    <folder>/<source>-<key>/00000-<crc>.safetensors …   the shards of one source
    <folder>/<source>-<key>/manifest.json               written when they are complete
    <folder>/index/                                     see `remember`

The key is a hash of everything that decides the shards: the rows, tokenizer, chat template, picture settings and
versions. A changed file therefore gets new shards (and its old ones are removed), an unchanged one none. A shard is a
function of its rows alone, so work that was killed goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.config.schema import RunConfig
from vlmtune.data.prepared.access import PreparedRows, Task, media_base
from vlmtune.data.prepared.job import Look, Outcome, ShardJob
from vlmtune.data.prepared.key import ENCODING, key_of
from vlmtune.data.prepared.measure import COLUMNS, BadRow, Measured
from vlmtune.data.prepared.pool import in_processes
from vlmtune.data.prepared.store import SHARDS, Shard, find_shards
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.corpus import Corpus
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.files import in_use, remove_drafts, write_atomic
from vlmtune.models.family import OpenedFolder
from vlmtune.progress import track

MANIFEST = "manifest.json"
_LARGEST, _SMALLEST, _PARTS = 8192, 256, 64  # rows of a shard; shards of a source that is neither small nor large


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The prepared rows of a corpus; see `open_prepared`. Picklable: the shards are mapped again where it arrives.

    num_made, num_kept: rows that this call prepared, and that were prepared before.
    """

    rows: PreparedRows
    measured: Measured
    folders: tuple[Path, ...]
    num_made: int
    num_kept: int


def prepared_folder(config: RunConfig) -> Path:
    """Where the prepared rows of a run are: `data.prepared`, or `.prepared` beside the run folder."""
    if config.data.prepared is not None:
        return Path(config.data.prepared)
    if config.train.output_dir is None:
        raise ValueError("the configuration was not loaded with load_config")
    return Path(config.train.output_dir).parent / ".prepared"


def prepare(corpus: Corpus, opened: OpenedFolder, *, into: Path, workers: int, look: Look = "no") -> Prepared:
    """Prepare what is not prepared yet.

    Args:
        into: the folder of prepared rows.
        workers: processes; 0 works in this one.
        look: at the media of rows that were prepared before (at headers in any case where the file of rows lay
            elsewhere then: a copy of it may have other pictures beside it); a shard whose media changed is made again.
            Rows whose pixels cannot be decoded are bad from then on, until their media are mended.

    Raises:
        VlmtuneError: a worker was killed, the disk is full. A bad row never raises: it is listed in `measured.bad`.
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=True)
    outcomes = _work(encoder, tasks, workers, "headers" if look == "no" and _moved(corpus, tasks) else look)
    paths = [outcomes[task].path if task in outcomes else _found(task) for task in tasks]
    made = sum(task.stop - task.start for task, outcome in outcomes.items() if outcome.made)
    # A folder that may only be read serves as it is.
    with contextlib.nullcontext() if made else contextlib.suppress(VlmtuneError):
        _complete(encoder, tasks, paths)
    return _gathered(encoder, tasks, paths, made)


def prepare_share(
    corpus: Corpus, opened: OpenedFolder, *, into: Path, workers: int, part: int, parts: int
) -> tuple[int, int]:
    """Prepare shard number `part`, `part` + `parts`, … (counted from 1): one job of an array.

    Returns:
        (rows of the share, rows of it that this call prepared).
    """
    encoder = RowEncoder(corpus, opened)
    tasks = list(_once(_with_found(_tasks(encoder, into), verify=True)).values())[part - 1 :: parts]
    outcomes = _work(encoder, tasks, workers, "no")
    made = sum(task.stop - task.start for task, outcome in outcomes.items() if outcome.made)
    return sum(task.stop - task.start for task in tasks), made


def open_prepared(corpus: Corpus, opened: OpenedFolder, into: Path) -> Prepared:
    """The prepared rows that `prepare` left, believed to be whole.

    Raises:
        DataError: shards are missing; says which rows.
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=False)
    return _gathered(encoder, tasks, [_found(task) for task in tasks], 0)


def merge(corpus: Corpus, opened: OpenedFolder, into: Path) -> Prepared:
    """Check that the jobs of an array prepared every row, and finish their work.

    Raises:
        DataError: shards are missing or damaged; says which rows.
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=True)
    paths = [_found(task) for task in tasks]
    _complete(encoder, tasks, paths)
    return _gathered(encoder, tasks, paths, 0)


def shard_rows(num_rows: int) -> int:
    """Rows of a shard for a source of `num_rows`; a function of nothing else, so that shards are found again."""
    wanted = 1 << math.ceil(math.log2(max(num_rows / _PARTS, 1)))
    return min(max(wanted, _SMALLEST), _LARGEST)


def _tasks(encoder: RowEncoder, into: Path) -> list[Task]:
    tasks: list[Task] = []
    first = 0
    homes: dict[Path, list[str]] = {}
    for number, source in enumerate(encoder.corpus.sources):
        key = key_of(source, encoder.opened_for(number))
        folder = into / f"{Path(source.names[0]).stem[:60]}-{key}"
        # Two files that say the same may have different pictures beside them.
        places = homes.setdefault(folder, [])
        if (base := media_base(encoder.corpus, number)) not in places:
            places.append(base)
        if base != places[0]:
            folder = folder.with_name(f"{folder.name}-{places.index(base) + 1}")
        size, step = len(source), shard_rows(len(source))
        for k, start in enumerate(range(0, size, step)):
            tasks.append(Task(number, k, first + start, first + min(start + step, size), folder))
        first += size
    return tasks


def _with_found(tasks: Sequence[Task], *, verify: bool) -> list[Task]:
    numbers: dict[Path, set[int]] = {}
    for task in tasks:
        numbers.setdefault(task.folder, set()).add(task.number)
    shards = {folder: find_shards(folder, wanted, verify=verify) for folder, wanted in numbers.items()}
    return [replace(task, found=shards[task.folder].get(task.number)) for task in tasks]


def _found(task: Task) -> Path:
    if task.found is None:
        raise DataError(
            f"rows {task.start + 1:,} to {task.stop:,} are not prepared (shard {task.number})",
            where=str(task.folder),
            remedy="Run `vlmtune prepare` with the same configuration; every machine must see the same folder.",
        )
    return task.found


def _work(encoder: RowEncoder, tasks: Sequence[Task], workers: int, look: Look) -> dict[Task, Outcome]:
    busy = [task for task in tasks if task.found is None or look != "no" or Shard(task.found, "").bad]
    once = _once(busy)
    with _working_in({task.folder for task in busy}):
        done = dict(zip(once, _worked(ShardJob(encoder, look), list(once.values()), workers), strict=True))
    return {task: done[task.folder, task.number] for task in busy}


def _once(tasks: Sequence[Task]) -> dict[tuple[Path, int], Task]:
    """One task per shard: a file that is listed twice has its shards once."""
    return {(task.folder, task.number): task for task in tasks}


def _moved(corpus: Corpus, tasks: Sequence[Task]) -> bool:
    """Whether shards were made from a file of rows in another place."""
    sources = {task.folder: corpus.sources[task.source].rows.files[0] for task in tasks}
    known = {folder: _manifest(folder) for folder in sources}
    return any(known[folder].get("source", source) != source for folder, source in sources.items())


def _worked(job: ShardJob, tasks: Sequence[Task], workers: int) -> list[Outcome]:
    def rows() -> Iterator[int]:
        for task, outcome in zip(tasks, in_processes(job, tasks, workers), strict=True):
            outcomes.append(outcome)
            yield from range(task.start, task.stop)

    outcomes: list[Outcome] = []
    for _ in track(rows(), total=sum(task.stop - task.start for task in tasks), label="preparing rows"):
        pass
    return outcomes


def _gathered(encoder: RowEncoder, tasks: Sequence[Task], paths: Sequence[Path], made: int) -> Prepared:
    columns = {name: np.zeros(len(encoder.corpus), dtype) for name, dtype in COLUMNS.items()}
    bad: list[BadRow] = []
    unknown_keys: Counter[str] = Counter()
    for task, path in zip(tasks, paths, strict=True):
        shard = Shard(path, "")
        for name, column in columns.items():
            column[task.start : task.stop] = shard.arrays[name]
        for local, reason in shard.bad:
            bad.append(BadRow(encoder.corpus.origin(task.start + local), reason, task.start + local))
        unknown_keys.update(shard.unknown_keys)
    return Prepared(
        rows=PreparedRows(encoder, tasks, paths),
        measured=Measured(**columns, bad=bad, unknown_keys=unknown_keys),
        folders=tuple(dict.fromkeys(task.folder for task in tasks)),
        num_made=made,
        num_kept=len(encoder.corpus) - made,
    )


def _complete(encoder: RowEncoder, tasks: Sequence[Task], paths: Sequence[Path]) -> None:
    """Write each source's manifest, and remove the shards that its file had before it changed."""
    whole: dict[Path, list[Path]] = {}
    for task, path in zip(tasks, paths, strict=True):
        whole.setdefault(task.folder, []).append(path)
    sources = {task.folder: encoder.corpus.sources[task.source] for task in tasks}
    changed: dict[str, str] = {}
    for folder, own in whole.items():
        source = sources[folder]
        manifest = {
            "version": 1,
            "source": source.rows.files[0],
            "rows": len(source),
            "digest": source.rows.digest,
            "encoding": ENCODING,
            "shards": sorted({path.name for path in own}),
        }
        for path in set(folder.glob(SHARDS)).difference(own):  # damaged, or replaced when this was killed
            with contextlib.suppress(OSError):
                path.unlink()
        if _manifest(folder) != manifest:
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
            changed[source.rows.files[0]] = source.rows.digest
    if changed:
        _remove_outdated(tasks[0].folder.parent, changed)


def _remove_outdated(into: Path, changed: Mapping[str, str]) -> None:
    """changed: the digest of each file that has new shards. Old ones that a run still uses stay."""
    for path in into.glob(f"*/{MANIFEST}"):
        theirs = _manifest(path.parent)
        source = str(theirs.get("source"))
        if source in changed and theirs.get("digest") != changed[source]:
            with in_use(path.parent) as alone:
                if alone():
                    shutil.rmtree(path.parent, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says; nothing without one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _working_in(folders: Collection[Path]) -> Iterator[None]:
    """Drafts of killed work are removed before and after, unless another process works in the folder as well."""
    with contextlib.ExitStack() as stack:
        alone = {folder: stack.enter_context(in_use(folder)) for folder in folders}

        def clean() -> None:
            for folder, is_alone in alone.items():
                if is_alone():
                    remove_drafts(folder)

        clean()
        try:
            yield
        finally:
            clean()
