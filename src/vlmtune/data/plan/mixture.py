"""Which rows an epoch takes from each source, and in which order: a function of (row numbers, ways to mix, seed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from vlmtune.config.sources import Mixed
from vlmtune.data.counts import exact_count
from vlmtune.errors import ConfigError, DataError

_TURN, _SHUFFLE, _PACKS, _LENGTHS = 0, 1, 2, 3  # separate random streams

# As in transformers' LengthGroupedSampler, so that neither many nor few rows always meet the same others.
_STEPS_TOGETHER = 50
_FEWEST_WINDOWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The rows of every epoch.

    rows: int64, the usable row numbers of each source. counts: rows that an epoch takes from each source; every row of
    the source comes ``counts // len(rows)`` times, and ``counts % len(rows)`` rows once more. Whose turn that is goes
    round one random order of the source, over the ends of epochs too: no row comes a second time before all came once.
    """

    rows: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    seed: int

    @property
    def epoch_size(self) -> int:
        return sum(self.counts)

    @property
    def is_even(self) -> bool:
        """Whether every epoch takes the same rows: each source a whole number of times."""
        return all(count % len(rows) == 0 for rows, count in zip(self.rows, self.counts, strict=True))

    def taken(self, epoch: int) -> np.ndarray:
        """int64 (epoch_size,): the row numbers of one epoch, source by source."""
        parts = []
        for source, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            whole, more = divmod(count, len(rows))
            parts.append(np.tile(rows, whole))
            if more:
                turn = self._random(_TURN, source).permutation(rows)
                parts.append(turn[(epoch * more + np.arange(more)) % len(rows)])
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 (epoch_size,): the row numbers of one epoch in training order."""
        return self._random(_SHUFFLE, epoch).permutation(self.taken(epoch))

    def order_of_packs(self, epoch: int, num_packs: int) -> np.ndarray:
        """int64 (num_packs,): the packs of one epoch in training order."""
        return self._random(_PACKS, epoch).permutation(num_packs)

    def order_by_length(self, epoch: int, lengths: np.ndarray, batch_size: int) -> np.ndarray:
        """int64 (n,): where the rows of a shuffled epoch go so that each step holds rows of like length.

        The epoch is cut into windows of up to 50 steps, and at least 4 of them; the rows of a window are sorted by
        length and cut into steps, and the steps of the whole epoch are shuffled. Rows beyond the last whole step stay
        where they are: which rows these are must not depend on their lengths.

        Args:
            lengths: (n,), of the rows of the epoch in their shuffled order.
            batch_size: rows of a step.
        """
        steps = len(lengths) // batch_size
        per_window = min(_STEPS_TOGETHER, max(1, steps // _FEWEST_WINDOWS))
        grouped = np.arange(steps * batch_size)
        window = grouped // (per_window * batch_size)
        grouped = np.lexsort((-lengths[grouped], window))  # stable: rows of one length stay in their random order
        turn = self._random(_LENGTHS, epoch).permutation(steps)
        whole = grouped.reshape(steps, batch_size)[turn].reshape(-1)
        return np.concatenate([whole, np.arange(steps * batch_size, len(lengths))])

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *stream])))


def make_mixture(
    usable: np.ndarray, sizes: Sequence[int], options: Sequence[Mixed], names: Sequence[str], seed: int
) -> Mixture:
    """Lay down the mixture of the rows that can be trained.

    Args:
        usable: boolean (n,), over all rows in the order of the sources.
        sizes, options, names: of each source; the sizes add up to n.

    Raises:
        DataError: a source has no row left. ConfigError: a way to mix that comes to no row at all.
    """
    borders = np.concatenate([[0], np.cumsum(sizes)])
    rows = tuple(np.flatnonzero(usable[start:end]) + start for start, end in pairwise(borders))
    if not sum(map(len, rows)):
        raise DataError("no row is left to train on", remedy="Run `vlmtune check` to see why the rows were dropped.")
    for own, size, name in zip(rows, sizes, names, strict=True):
        if not len(own):
            found = f"none of its {size:,} rows can be trained" if size else "the source holds no row"
            raise DataError(found, where=name, remedy="Take the source out, or see with `vlmtune check` what is wrong.")
    counts = epoch_counts([len(own) for own in rows], options)
    for count, own, option, name in zip(counts, rows, options, names, strict=True):
        if not count:
            raise ConfigError(_comes_to_nothing(option, len(own), name), where="data.sources", remedy=_MORE)
    return Mixture(rows=rows, counts=counts, seed=seed)


def epoch_counts(sizes: Sequence[int], options: Sequence[Mixed]) -> tuple[int, ...]:
    """Rows that an epoch takes from each source, given how many it has.

    `repeat` r takes r · n rows (1 when nothing is said), `choose` k takes k. The sources with a `weight` are one group:
    together they give as many rows as they hold, divided by their weights with the largest remainders rounded up (the
    earlier source first where remainders are equal).
    """
    weighted = [i for i, option in enumerate(options) if option.weight is not None]
    total = sum(sizes[i] for i in weighted)
    shares = dict(zip(weighted, _largest_remainder(total, [_exact(options[i].weight) for i in weighted]), strict=True))
    counts = []
    for i, (size, option) in enumerate(zip(sizes, options, strict=True)):
        if i in shares:
            counts.append(shares[i])
        elif option.choose is not None:
            counts.append(option.choose if size else 0)
        else:
            counts.append(exact_count(1.0 if option.repeat is None else option.repeat, size))
    return tuple(counts)


def mixing_text(option: Mixed) -> str:
    """How a source is mixed, in two or three words."""
    if option.weight is not None:
        return f"weight {option.weight:g}"
    if option.choose is not None:
        return f"choose {option.choose:,}"
    return f"repeat {option.repeat:g}" if option.repeat is not None else "repeat 1"


def _exact(weight: float | None) -> Fraction:
    return Fraction(str(weight))


def _largest_remainder(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` in whole parts as the weights say."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


_MORE = "Raise it, or take the source out."


def _comes_to_nothing(option: Mixed, num_rows: int, name: str) -> str:
    if option.weight is not None:
        return f"weight {option.weight:g} of {name} comes to no row beside the other weights"
    return f"{mixing_text(option)} of {num_rows} row{'' if num_rows == 1 else 's'} of {name} is less than half a row"
