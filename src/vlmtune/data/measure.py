"""Every row's length, before anything is decoded or trained: the first pass over the data, in parallel.

Training needs the lengths to plan its epochs; `check` shows them. Both learn about *all* bad rows here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy as np

from vlmtune.config.schema import DataConfig
from vlmtune.data import media
from vlmtune.data.adapters import KNOWN_KEYS, MARK
from vlmtune.data.encode import encode
from vlmtune.data.sample import Encoded, Sample
from vlmtune.data.sources import Corpus
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.models.family import OpenedFolder
from vlmtune.progress import track

Kind = Literal["row", "length"]

SMALL_SIDE = 8  # pixels; a picture below this is suspicious

_SHORTER = "Raise it, set data.too_long: drop, or shorten the row."
_SHORTER_WITH_PICTURES = "Raise it, set data.too_long: drop, or allow smaller pictures under model.image."

_CHUNK = 64  # rows that a worker takes at a time


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained. `kind`: "row" for what it says, "length" for more tokens than `max_length`."""

    origin: str
    reason: str
    index: int
    kind: Kind = "row"


@dataclass(slots=True, kw_only=True)
class Measured:
    """What is known about the n rows of a corpus without their pixels.

    num_tokens, num_trained, num_images: int32 (n,); zeros for a bad row.
    """

    num_tokens: np.ndarray
    num_trained: np.ndarray
    num_images: np.ndarray
    bad: list[BadRow] = field(default_factory=list)
    id_hash: np.ndarray
    """uint64 (n,), of the row's `id`; 0 without one."""
    answer_hash: np.ndarray
    """uint64 (n,), of all answers of the row together; 0 for a bad row."""
    marks_in_answers: np.ndarray
    """int32 (n,), `<image>` marks that stand in answers and count as text there."""
    smallest_side: np.ndarray
    """int32 (n,), in pixels, over the row's pictures; 0 without any."""
    unknown_keys: Counter[str] = field(default_factory=Counter)
    """Top-level keys of rows that nothing reads, and how many rows have them."""


def measure(corpus: Corpus, opened: OpenedFolder, *, workers: int, decode: bool = False) -> Measured:
    """Encode every row without its pixels, and count.

    Args:
        workers: processes; 0 works in this one.
        decode: also decode every picture, which finds truncated files.

    Raises:
        VlmtuneError: a worker was killed. A bad row never raises: it is listed in `bad`.
    """
    n = len(corpus)
    measured = Measured(
        num_tokens=np.zeros(n, np.int32),
        num_trained=np.zeros(n, np.int32),
        num_images=np.zeros(n, np.int32),
        id_hash=np.zeros(n, np.uint64),
        answer_hash=np.zeros(n, np.uint64),
        marks_in_answers=np.zeros(n, np.int32),
        smallest_side=np.zeros(n, np.int32),
    )
    job = _Job(corpus, opened, decode)
    for _ in track(_filled(measured, job, workers), total=n, label="reading rows"):
        pass
    return measured


def too_long(measured: Measured, corpus: Corpus, data: DataConfig) -> list[BadRow]:
    """The rows with more than `max_length` tokens; the caller looks at `data.too_long`."""
    return [
        BadRow(
            corpus.origin(int(i)),
            f"the row has {int(measured.num_tokens[i]):,} tokens; expected at most {data.max_length:,} "
            f"(data.max_length). {_SHORTER_WITH_PICTURES if measured.num_images[i] else _SHORTER}",
            int(i),
            "length",
        )
        for i in np.flatnonzero(measured.num_tokens > data.max_length)
    ]


def usable_rows(measured: Measured, corpus: Corpus, data: DataConfig) -> np.ndarray:
    """Boolean (n,): the rows that a run trains on, over-long ones left out if the config says drop.

    Raises:
        DataError: naming the first bad row, if there is any (over-long ones included unless they are dropped).
    """
    bad = measured.bad + (too_long(measured, corpus, data) if data.too_long == "refuse" else [])
    if bad:
        first = min(bad, key=lambda row: row.index)
        others = len(bad) - 1
        more = f"{others:,} more {'row is' if others == 1 else 'rows are'} bad; `vlmtune check` lists all of them."
        raise DataError(first.reason, where=first.origin, remedy=more if others else "")
    return measured.num_tokens <= data.max_length


@dataclass(slots=True)
class _Result:
    """What a worker found out about one chunk: `counts` int64 (rows, 7) in the order of `Measured`'s arrays."""

    counts: np.ndarray
    bad: list[BadRow] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Job:
    corpus: Corpus
    opened: OpenedFolder
    decode: bool

    def __call__(self, rows: Sequence[int]) -> _Result:
        result = _Result(np.zeros((len(rows), 7), np.uint64))
        for place, i in enumerate(rows):
            try:
                row = self.corpus.row(i)
                if isinstance(row, dict):
                    result.unknown_keys.update(str(key) for key in row if key not in KNOWN_KEYS)
                result.counts[place] = self._counts(self.corpus.adapt(i, row))
            except DataError as error:
                result.bad.append(BadRow(self.corpus.origin(i), error.reason, i))
        return result

    def _counts(self, sample: Sample) -> tuple[int, ...]:
        encoded = encode(sample, self.opened)
        if not encoded.num_trained:
            raise DataError("the row has no trained token", where=sample.origin, expected="an answer with some text")
        if self.decode:
            for image in sample.images:
                media.open_image(image.ref, self.opened.media)
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        return (
            encoded.num_tokens,
            encoded.num_trained,
            len(sample.images),
            _hash(sample.id) if sample.id is not None else 0,
            _hash("\0".join(answers)),
            sum(len(MARK.findall(answer)) for answer in answers),
            _smallest_side(encoded),
        )


def _smallest_side(encoded: Encoded) -> int:
    return min((min(plan.size) for _, plan in encoded.media), default=0)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def _filled(measured: Measured, job: _Job, workers: int) -> Iterator[int]:
    """Every row number, once what its worker found out is stored."""
    n = len(job.corpus)
    spans = [range(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    for span, result in zip(spans, _results(job, spans, workers), strict=True):
        _store(measured, span, result)
        yield from span


def _store(measured: Measured, span: range, result: _Result) -> None:
    arrays = (
        measured.num_tokens,
        measured.num_trained,
        measured.num_images,
        measured.id_hash,
        measured.answer_hash,
        measured.marks_in_answers,
        measured.smallest_side,
    )
    for column, array in enumerate(arrays):
        array[span.start : span.stop] = result.counts[:, column].astype(array.dtype)
    measured.bad.extend(result.bad)
    measured.unknown_keys.update(result.unknown_keys)


_job: _Job | None = None  # of a worker process


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    # Ctrl-C reaches the whole process group; the parent answers it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this worker when its parent was killed: it would wait for the next rows for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(rows: range) -> _Result:
    assert _job is not None  # set by _start_worker
    return _job(rows)


def _results(job: _Job, spans: Sequence[range], workers: int) -> Iterator[_Result]:
    workers = min(workers, len(spans), 4 * (os.cpu_count() or 1))
    if workers < 2:
        yield from map(job, spans)
        return
    # Forked workers share the tokenizer and the row index instead of loading them again (seconds each).
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            yield from pool.map(_work, spans)
        except BrokenProcessPool as error:
            raise VlmtuneError(
                "a process that reads rows was killed (out of memory?)", remedy="Use fewer of them: data.workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
