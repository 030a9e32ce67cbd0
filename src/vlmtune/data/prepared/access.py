"""Random access to rows that were prepared; see `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmtune.data.encode import build, look_at
from vlmtune.data.prepared.store import Shard
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import Encoded, Laid, Planned
from vlmtune.errors import DataError


@dataclass(frozen=True, slots=True)
class Task:
    """One shard: rows `start` … `stop` of the corpus, which belong to one source."""

    source: int
    number: int
    start: int
    stop: int
    folder: Path
    found: Path | None = None


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

    def _ask_row(self, i: int) -> Callable[[], Planned]:
        return lambda: look_at(self.corpus.sample(i), self.encoder.opened(i))


def media_base(corpus: Corpus, source: int) -> str:
    """The folder that the store keeps a source's media paths relative to."""
    rows = corpus.sources[source].rows
    return str(Path(rows.files[0]).parent)
