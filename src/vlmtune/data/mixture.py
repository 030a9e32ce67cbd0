"""Which rows an epoch takes from each source, and in which order: a function of (row numbers, repeats, seed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise

import numpy as np

from vlmtune.errors import ConfigError, DataError

_SAMPLE, _SHUFFLE = 0, 1  # separate random streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The rows of every epoch.

    rows: int64, the usable row numbers of each source. counts: rows that an epoch takes from each source; every row of
    the source comes ``counts // len(rows)`` times, and some, drawn anew each epoch without replacement, once more.
    """

    rows: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    seed: int

    @property
    def epoch_size(self) -> int:
        return sum(self.counts)

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 (epoch_size,): the row numbers of one epoch in training order."""
        parts = []
        for source, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            whole, more = divmod(count, len(rows)) if len(rows) else (0, 0)
            parts.append(np.tile(rows, whole))
            if more:
                drawn = self._random(epoch, _SAMPLE, source).permutation(len(rows))[:more]
                parts.append(rows[np.sort(drawn)])
        return self._random(epoch, _SHUFFLE).permutation(np.concatenate(parts))

    def _random(self, epoch: int, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, *stream])))


def make_mixture(
    usable: np.ndarray, sizes: Sequence[int], repeats: Sequence[float], names: Sequence[str], seed: int
) -> Mixture:
    """Lay down the mixture of the rows that can be trained.

    Args:
        usable: boolean (n,), over all rows in the order of the sources.
        sizes, repeats, names: of each source; the sizes add up to n.

    Raises:
        DataError: no row is left. ConfigError: a `repeat` so small that it rounds to no row at all.
    """
    borders = np.concatenate([[0], np.cumsum(sizes)])
    rows = tuple(np.flatnonzero(usable[start:end]) + start for start, end in pairwise(borders))
    if not sum(map(len, rows)):
        raise DataError("no row is left to train on", remedy="Run `vlmtune check` to see why the rows were dropped.")
    counts = tuple(exact_count(repeat, len(own)) for repeat, own in zip(repeats, rows, strict=True))
    for count, own, repeat, name in zip(counts, rows, repeats, names, strict=True):
        if len(own) and not count:
            raise ConfigError(
                f"repeat {repeat:g} of {len(own)} row{'' if len(own) == 1 else 's'} of {name} is less than half a row",
                where="data.sources",
                remedy="Raise `repeat`, or take the source out.",
            )
    return Mixture(rows=rows, counts=counts, seed=seed)


def exact_count(factor: float, num_rows: int) -> int:
    """factor · num_rows as decimals, rounded half up: 3.5 · 1000 = 3500, 0.0999 · 1000 = 100, 1.005 · 1000 = 1005."""
    return int((Decimal(str(factor)) * num_rows).quantize(Decimal(1), rounding=ROUND_HALF_UP))
