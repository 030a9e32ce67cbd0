"""Repeats are exact, orders are drawn from the seed alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.mixture import Mixture, exact_count, make_mixture
from vlmtune.errors import ConfigError, DataError


def mixture(sizes: list[int], repeats: list[float], usable: np.ndarray | None = None, seed: int = 0) -> Mixture:
    usable = np.ones(sum(sizes), bool) if usable is None else usable
    return make_mixture(usable, sizes, repeats, [f"s{i}" for i in range(len(sizes))], seed)


@pytest.mark.parametrize(
    ("factor", "rows", "count"),
    [(3.5, 1000, 3500), (0.0999, 1000, 100), (1.001, 1000, 1001), (1.005, 1000, 1005), (0.1, 30, 3), (0.5, 3, 2)],
)
def test_counts_are_exact_decimals_rounded_half_up(factor: float, rows: int, count: int) -> None:
    assert exact_count(factor, rows) == count


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_every_row_comes_as_often_as_promised(
    sources: list[tuple[int, int]], seed: int, epoch: int, data: st.DataObject
) -> None:
    sizes = [size for size, _ in sources]
    repeats = [hundredths / 100 for _, hundredths in sources]
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    borders = np.concatenate([[0], np.cumsum(sizes)])
    promised = []
    for i, (_, hundredths) in enumerate(sources):
        num = int(usable[borders[i] : borders[i + 1]].sum())
        promised.append(int(Fraction(hundredths, 100) * num + Fraction(1, 2)))
        if num and not promised[-1]:
            with pytest.raises(ConfigError, match="less than half a row"):
                mixture(sizes, repeats, usable, seed)
            return
    if not usable.any():
        with pytest.raises(DataError, match="no row is left"):
            mixture(sizes, repeats, usable, seed)
        return
    order = mixture(sizes, repeats, usable, seed).epoch(epoch)
    assert usable[order].all()
    counts = Counter(order.tolist())
    for i in range(len(sizes)):
        rows = [row for row in range(borders[i], borders[i + 1]) if usable[row]]
        own = [counts[row] for row in rows]
        assert sum(own) == promised[i]
        assert not own or max(own) - min(own) <= 1


def test_order_follows_seed_and_epoch() -> None:
    plan = mixture([200, 100], [1.5, 0.3])
    first, again = plan.epoch(0), mixture([200, 100], [1.5, 0.3]).epoch(0)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plan.epoch(1))
    assert not np.array_equal(first, mixture([200, 100], [1.5, 0.3], seed=1).epoch(0))
    drawn = [set(plan.epoch(epoch)[plan.epoch(epoch) >= 200]) for epoch in range(2)]
    assert all(len(rows) == 30 for rows in drawn) and drawn[0] != drawn[1], "the part is drawn anew each epoch"


def test_the_part_of_each_source_is_drawn_for_itself() -> None:
    plan = mixture([100, 100], [0.5, 0.5])
    order = plan.epoch(0)
    assert set(order[order < 100]) != {row - 100 for row in order[order >= 100]}


def test_shuffle_is_fair() -> None:
    plan = mixture([10], [1.0])
    firsts = Counter(int(plan.epoch(epoch)[0]) for epoch in range(2000))
    assert all(140 < firsts[row] < 260 for row in range(10))
