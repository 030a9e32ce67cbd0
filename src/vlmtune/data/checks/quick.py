"""`vlmtune check --quick`: rows, marks and the headers of media, without a tokenizer at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmtune.data.encode import look_at, with_origin
from vlmtune.data.media.planned import decode
from vlmtune.data.prepared.measure import COLUMNS, BadRow, Measured, seen
from vlmtune.data.prepared.pool import in_processes
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.adapters import unread_keys
from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder
from vlmtune.progress import track

_CHUNK = 512  # rows that a worker takes at a time
_SEEN = tuple(COLUMNS)[2:]  # what `measure.seen` gives


def look_over(corpus: Corpus, opened: OpenedFolder, *, workers: int, decode: bool = False) -> Measured:
    """What can be known about the rows without their tokens: `num_tokens` and `num_trained` stay 0.

    Args:
        workers: processes; 0 works in this one.
        decode: also decode every picture.

    Raises:
        VlmtuneError: a worker was killed. A bad row never raises: it is listed in `bad`.
    """
    columns = {name: np.zeros(len(corpus), dtype) for name, dtype in COLUMNS.items()}
    measured = Measured(**columns, bad=[], unknown_keys=Counter())
    job = _Job(RowEncoder(corpus, opened), decode)
    without_tokens = [columns[name] for name in _SEEN]
    for _ in track(_looked(measured, without_tokens, job, workers), total=len(corpus), label="looking at rows"):
        pass
    return measured


def _looked(measured: Measured, columns: Sequence[np.ndarray], job: _Job, workers: int) -> Iterator[int]:
    """Every row number, once what its worker found out is stored."""
    n = len(measured.num_tokens)
    spans = [range(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    for span, result in zip(spans, in_processes(job, spans, workers), strict=True):
        for found, column in zip(result.columns, columns, strict=True):
            column[span.start : span.stop] = found
        measured.bad.extend(result.bad)
        measured.unknown_keys.update(result.unknown_keys)
        yield from span


@dataclass(slots=True)
class _Result:
    """What a worker found out about one chunk; `columns` as `measure.seen` gives them, zeros for a bad row."""

    columns: list[np.ndarray]
    bad: list[BadRow] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Job:
    encoder: RowEncoder
    decode: bool

    def __call__(self, rows: Sequence[int]) -> _Result:
        bad: list[BadRow] = []
        unknown_keys: Counter[str] = Counter()
        table = []
        for i in rows:
            which, local = self.encoder.corpus.split(i)
            source = self.encoder.corpus.sources[which]
            origin = source.origin(local)
            try:
                row = source.rows.read(local, origin)
                unknown_keys.update(unread_keys(row, source.options))
                table.append(self._seen(source.adapt(row, origin), self.encoder.opened_for(which)))
            except DataError as error:
                table.append((0,) * len(_SEEN))
                bad.append(BadRow(origin, with_origin(error, "").reason, i))
        columns = [np.array(own, COLUMNS[name]) for own, name in zip(zip(*table, strict=True), _SEEN, strict=True)]
        return _Result(columns, bad, unknown_keys)

    def _seen(self, sample: Sample, opened: OpenedFolder) -> tuple[int, ...]:
        found = look_at(sample, opened)
        if self.decode:
            decode(found, opened.media)
        return seen(sample, found)
