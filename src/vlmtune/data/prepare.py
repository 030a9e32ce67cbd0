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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlmtune.config.schema import RunConfig
from vlmtune.data import video
from vlmtune.data.adapters import KNOWN_KEYS
from vlmtune.data.encode import build, lay_row, lay_rows, plan_media, with_origin
from vlmtune.data.measure import COLUMNS, BadRow, Measured, counts
from vlmtune.data.pool import in_processes
from vlmtune.data.prepared_key import ENCODING, key_of
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.sample import Encoded, Laid, Sample
from vlmtune.data.sources import Corpus, Source
from vlmtune.data.store import Media, Shard, ShardWriter, find_shards
from vlmtune.errors import DataError
from vlmtune.files import in_use, remove_drafts, write_atomic
from vlmtune.models.family import OpenedFolder
from vlmtune.progress import track

Look = Literal["no", "headers", "pixels"]
"""What is looked at in rows that are prepared already: nothing, the headers of their media, or all pixels."""

MANIFEST = "manifest.json"
_CHUNK = 128  # rows that are tokenised together
_LARGEST, _SMALLEST, _PARTS = 8192, 256, 64  # rows of a shard; shards of a source that is neither small nor large


@dataclass(frozen=True, slots=True)
class Task:
    """One shard: rows `start` … `stop` of the corpus, which belong to one source."""

    source: int
    number: int
    start: int
    stop: int
    folder: Path
    found: Path | None = None


@dataclass(frozen=True, slots=True)
class _Outcome:
    path: Path
    made: bool
    undecodable: list[BadRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The prepared rows of a corpus; see `open_prepared`. Picklable: the shards are mapped again where it arrives.

    num_made, num_kept: rows that this call prepared, and that were prepared before.
    undecodable: rows whose pictures could not be decoded, where pixels were looked at; they are not in `measured.bad`.
    """

    rows: PreparedRows
    measured: Measured
    folders: tuple[Path, ...]
    num_made: int
    num_kept: int
    undecodable: list[BadRow]


class PreparedRows:
    """Random access to prepared rows as the loader wants them."""

    def __init__(self, encoder: RowEncoder, tasks: Sequence[Task], paths: Sequence[Path]) -> None:
        self.encoder = encoder
        self._starts = np.array([task.start for task in tasks], np.int64)
        self._paths = list(paths)
        self._shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shards": {}}

    @property
    def corpus(self) -> Corpus:
        return self.encoder.corpus

    def encoded(self, i: int) -> Encoded:
        """Row `i`.

        Raises:
            DataError: a bad row, or media that lie in the row and cannot be read.
        """
        origin, opened = self.corpus.origin(i), self.encoder.opened(i)
        return build(self.laid(i), opened, origin=origin)

    def laid(self, i: int) -> Laid:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        shard = self._shards.get(number)
        if shard is None:
            base = media_base(self.corpus, self.corpus.source_of(i))
            shard = self._shards[number] = Shard(self._paths[number], base)
        laid = shard.laid(i - int(self._starts[number]), self._ask_row(i))
        if not len(laid.ids):
            local = i - int(self._starts[number])
            reason = next(reason for row, reason in shard.bad if row == local)
            raise DataError(reason.rstrip("."), where=self.corpus.origin(i))
        return laid

    def _ask_row(self, i: int) -> Callable[[], Media]:
        return lambda: plan_media(self.corpus.sample(i), self.encoder.opened(i))


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
        look: at the media of rows that were prepared before; a shard whose media changed is made again.

    Raises:
        VlmtuneError: a worker was killed, the disk is full. A bad row never raises: it is listed in `measured.bad`.
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=True)
    outcomes = _work(encoder, tasks, workers, look)
    paths = [outcomes[task].path if task in outcomes else _found(task) for task in tasks]
    _complete(encoder, tasks, paths)
    made = sum(task.stop - task.start for task, outcome in outcomes.items() if outcome.made)
    undecodable = [row for outcome in outcomes.values() for row in outcome.undecodable]
    return _gathered(encoder, tasks, paths, made, undecodable)


def prepare_share(
    corpus: Corpus, opened: OpenedFolder, *, into: Path, workers: int, part: int, parts: int
) -> tuple[int, int]:
    """Prepare shard number `part`, `part` + `parts`, … (counted from 1): one job of an array.

    Returns:
        (rows of the share, rows of it that this call prepared).
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=True)[part - 1 :: parts]
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
    return _gathered(encoder, tasks, [_found(task) for task in tasks], 0, [])


def merge(corpus: Corpus, opened: OpenedFolder, into: Path) -> Prepared:
    """Check that the jobs of an array prepared every row, and finish their work.

    Raises:
        DataError: shards are missing or damaged; says which rows.
    """
    encoder = RowEncoder(corpus, opened)
    tasks = _with_found(_tasks(encoder, into), verify=True)
    paths = [_found(task) for task in tasks]
    _complete(encoder, tasks, paths)
    return _gathered(encoder, tasks, paths, 0, [])


def media_base(corpus: Corpus, source: int) -> str:
    """The folder that the store keeps a source's media paths relative to."""
    rows = corpus.sources[source].rows
    return str(Path(rows.files[0]).parent)


def shard_rows(num_rows: int) -> int:
    """Rows of a shard for a source of `num_rows`; a function of nothing else, so that shards are found again."""
    wanted = 1 << math.ceil(math.log2(max(num_rows / _PARTS, 1)))
    return min(max(wanted, _SMALLEST), _LARGEST)


def _tasks(encoder: RowEncoder, into: Path) -> list[Task]:
    tasks: list[Task] = []
    first = 0
    for number, source in enumerate(encoder.corpus.sources):
        key = key_of(source, encoder.opened_for(number))
        folder = into / f"{Path(source.names[0]).stem[:60]}-{key}"
        size, step = len(source), shard_rows(len(source))
        for k, start in enumerate(range(0, size, step)):
            tasks.append(Task(number, k, first + start, first + min(start + step, size), folder))
        first += size
    return tasks


def _with_found(tasks: Sequence[Task], *, verify: bool) -> list[Task]:
    by_folder: dict[Path, dict[int, Path]] = {}
    for folder in {task.folder for task in tasks}:
        numbers = [task.number for task in tasks if task.folder == folder]
        by_folder[folder] = find_shards(folder, numbers, verify=verify)
    return [
        Task(task.source, task.number, task.start, task.stop, task.folder, by_folder[task.folder].get(task.number))
        for task in tasks
    ]


def _found(task: Task) -> Path:
    if task.found is None:
        raise DataError(
            f"rows {task.start + 1:,} to {task.stop:,} are not prepared (shard {task.number})",
            where=str(task.folder),
            remedy="Run `vlmtune prepare` with the same configuration; every machine must see the same folder.",
        )
    return task.found


def _work(encoder: RowEncoder, tasks: Sequence[Task], workers: int, look: Look) -> dict[Task, _Outcome]:
    busy = [task for task in tasks if task.found is None or look != "no" or Shard(task.found, "").bad]
    with _working_in({task.folder for task in busy}):
        return dict(zip(busy, _worked(_Job(encoder, look), busy, workers), strict=True))


def _worked(job: _Job, tasks: Sequence[Task], workers: int) -> list[_Outcome]:
    def rows() -> Iterator[int]:
        for task, outcome in zip(tasks, in_processes(job, tasks, workers), strict=True):
            outcomes.append(outcome)
            yield from range(task.start, task.stop)

    outcomes: list[_Outcome] = []
    for _ in track(rows(), total=sum(task.stop - task.start for task in tasks), label="preparing rows"):
        pass
    return outcomes


@dataclass(frozen=True, slots=True)
class _Job:
    """Makes a shard, or looks at one that is there; runs in a worker process."""

    encoder: RowEncoder
    look: Look

    def __call__(self, task: Task) -> _Outcome:
        shard = None if task.found is None else Shard(task.found, media_base(self.encoder.corpus, task.source))
        made = shard is None or not self._is_current(task, shard)
        path = self._make(task) if made or shard is None else shard.path
        if shard is not None and shard.path != path:
            shard.path.unlink(missing_ok=True)
        undecodable = self._undecodable(task, path) if self.look == "pixels" else []
        return _Outcome(path, made, undecodable)

    def _make(self, task: Task) -> Path:
        corpus = self.encoder.corpus
        opened = self.encoder.opened_for(task.source)
        source, first = corpus.sources[task.source], corpus.split(task.start)[1]
        writer = ShardWriter(media_base(corpus, task.source), wide=len(opened.tokenizer) > 1 << 16)
        for start in range(first, first + task.stop - task.start, _CHUNK):
            rows = range(start, min(start + _CHUNK, first + task.stop - task.start))
            read = [self._sample(source, i, writer) for i in rows]
            laid = iter(lay_rows([sample for sample in read if isinstance(sample, Sample)], opened))
            for sample in read:
                row = next(laid) if isinstance(sample, Sample) else sample
                self._add(writer, sample, row)
        return writer.write(task.folder, task.number)

    @staticmethod
    def _sample(source: Source, i: int, writer: ShardWriter) -> Sample | DataError:
        origin = source.origin(i)
        try:
            row = source.rows.read(i, origin)
            if isinstance(row, dict) and not row.keys() <= KNOWN_KEYS:
                writer.unknown_keys.update(str(key) for key in row.keys() - KNOWN_KEYS)
            return source.adapt(row, origin)
        except DataError as error:
            return error

    @staticmethod
    def _add(writer: ShardWriter, sample: Sample | DataError, laid: Laid | DataError) -> None:
        try:
            if isinstance(laid, DataError):
                raise laid
            assert isinstance(sample, Sample)
            writer.add(laid, counts(sample, laid))
        except DataError as error:
            writer.add_bad(error.reason)

    def _is_current(self, task: Task, shard: Shard) -> bool:
        """Whether making the shard again would give the same: its bad rows are bad for the same reason (a missing file
        may have come), and its media, where they are looked at, have the size that was planned with."""
        for local, reason in shard.bad:
            if self._reason(task.start + local) != reason:
                return False
        if self.look == "no":
            return True
        bad = {local for local, _ in shard.bad}
        return all(self._same_media(task.start + i, shard, i) for i in range(task.stop - task.start) if i not in bad)

    def _reason(self, i: int) -> str | None:
        """What is wrong with row `i` now."""
        try:
            sample = self.encoder.corpus.sample(i)
            counts(sample, lay_row(sample, self.encoder.opened(i)))
        except DataError as error:
            return error.reason
        return None

    def _same_media(self, i: int, shard: Shard, local: int) -> bool:
        opened = self.encoder.opened(i)
        try:
            planned = shard.laid(local, lambda: ()).media
            found = video.sizes([ref for ref, _ in planned], opened.media)
            return found == [plan.size for _, plan in planned]
        except DataError:
            return False

    def _undecodable(self, task: Task, path: Path) -> list[BadRow]:
        corpus = self.encoder.corpus
        rows = PreparedRows(self.encoder, [task], [path])
        bad = {task.start + local for local, _ in Shard(path, "").bad}
        found = []
        for i in range(task.start, task.stop):
            try:
                if i not in bad:
                    video.decode([ref for ref, _ in rows.laid(i).media], self.encoder.opened(i).media)
            except DataError as error:
                found.append(BadRow(corpus.origin(i), with_origin(error, "").reason, i))
        return found


def _gathered(
    encoder: RowEncoder, tasks: Sequence[Task], paths: Sequence[Path], made: int, undecodable: list[BadRow]
) -> Prepared:
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
        undecodable=undecodable,
    )


def _complete(encoder: RowEncoder, tasks: Sequence[Task], paths: Sequence[Path]) -> None:
    """Write each source's manifest, and remove the shards that its file had before it changed."""
    for number, source in enumerate(encoder.corpus.sources):
        own = [(task, path) for task, path in zip(tasks, paths, strict=True) if task.source == number]
        if not own:
            continue
        folder = own[0][0].folder
        manifest = {
            "version": 1,
            "source": source.rows.files[0],
            "rows": len(source),
            "digest": source.rows.digest,
            "encoding": ENCODING,
            "shards": [path.name for _, path in own],
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_text(encoding="utf-8") != text:
            write_atomic(folder / MANIFEST, text)
            _remove_outdated(folder, manifest)


def _remove_outdated(folder: Path, manifest: dict[str, object]) -> None:
    for other in folder.parent.glob(f"*/{MANIFEST}"):
        if other.parent == folder:
            continue
        try:
            theirs = json.loads(other.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if theirs.get("source") == manifest["source"] and theirs.get("digest") != manifest["digest"]:
            shutil.rmtree(other.parent, ignore_errors=True)


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
        yield
        clean()
