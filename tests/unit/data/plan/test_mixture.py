"""Counts are exact, orders are drawn from the seed alone, and every row comes as evenly as it can."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.sources import Mixed
from vlmtune.data.counts import exact_count
from vlmtune.data.plan.mixture import Mixture, epoch_counts, make_mixture, mixing_text
from vlmtune.errors import ConfigError, DataError


def mixture(sizes: list[int], ways: list[dict[str, Any]], usable: np.ndarray | None = None, seed: int = 0) -> Mixture:
    usable = np.ones(sum(sizes), bool) if usable is None else usable
    options = [Mixed(**way) for way in ways]
    return make_mixture(usable, sizes, options, [f"s{i}" for i in range(len(sizes))], seed)


def repeated(sizes: list[int], *repeats: float, seed: int = 0) -> Mixture:
    return mixture(sizes, [{"repeat": repeat} for repeat in repeats], seed=seed)


@pytest.mark.parametrize(
    ("factor", "rows", "count"),
    [(3.5, 1000, 3500), (0.0999, 1000, 100), (1.001, 1000, 1001), (1.005, 1000, 1005), (0.1, 30, 3), (0.5, 3, 2)],
)
def test_counts_are_exact_decimals_rounded_half_up(factor: float, rows: int, count: int) -> None:
    assert exact_count(factor, rows) == count


way = st.one_of(
    st.just({}),
    st.integers(1, 400).map(lambda hundredths: {"repeat": hundredths / 100}),
    st.integers(1, 120).map(lambda k: {"choose": k}),
    st.integers(1, 500).map(lambda tenths: {"weight": tenths / 10}),
)


def promised(sizes: list[int], ways: list[dict[str, Any]]) -> list[int]:
    """The counts by the words of the schema, with fractions and a sort of its own."""
    group = {i: Fraction(str(w["weight"])) for i, w in enumerate(ways) if "weight" in w}
    total = sum(sizes[i] for i in group)
    shares = {i: total * weight / sum(group.values()) for i, weight in group.items()}
    floors = {i: share.numerator // share.denominator for i, share in shares.items()}
    lucky = sorted(group, key=lambda i: (floors[i] - shares[i], i))[: total - sum(floors.values())]
    counts = []
    for i, (size, one) in enumerate(zip(sizes, ways, strict=True)):
        if i in group:
            counts.append(floors[i] + (i in lucky))
        elif "choose" in one:
            counts.append(one["choose"])
        else:
            exact = Fraction(str(one.get("repeat", 1))) * size + Fraction(1, 2)
            counts.append(exact.numerator // exact.denominator)
    return counts


@settings(max_examples=300, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 40), way), min_size=1, max_size=4), seed=st.integers(0, 3), data=st.data()
)
def test_every_row_comes_as_often_as_promised_in_every_epoch_and_over_all_of_them(
    sources: list[tuple[int, dict[str, Any]]], seed: int, data: st.DataObject
) -> None:
    sizes, ways = [size for size, _ in sources], [one for _, one in sources]
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    borders = np.concatenate([[0], np.cumsum(sizes)])
    own = [[row for row in range(borders[i], borders[i + 1]) if usable[row]] for i in range(len(sizes))]
    if not all(own):
        with pytest.raises(DataError, match=r"no row is left" if not any(own) else r"^s\d: none of its [\d]+ rows can"):
            mixture(sizes, ways, usable, seed)
        return
    counts = promised([len(rows) for rows in own], ways)
    if not all(counts):
        with pytest.raises(ConfigError, match=r"^data\.sources: .*(less than half a row|beside the other weights)"):
            mixture(sizes, ways, usable, seed)
        return
    plan = mixture(sizes, ways, usable, seed)
    whole: Counter[int] = Counter()
    for epoch in range(data.draw(st.integers(1, 7))):
        order = plan.epoch(epoch)
        assert len(order) == plan.epoch_size == sum(counts)
        one = Counter(order.tolist())
        whole.update(one)
        for rows, count in zip(own, counts, strict=True):
            assert sum(one[row] for row in rows) == count
            for often in (one, whole):
                times = [often[row] for row in rows]
                assert max(times) - min(times) <= 1
        assert plan.is_even == all(count % len(rows) == 0 for count, rows in zip(counts, own, strict=True))
        assert np.array_equal(np.sort(order), np.sort(plan.taken(epoch)))


def test_nothing_comes_twice_before_everything_came_once() -> None:
    plan = mixture([10], [{"choose": 3}])
    seen = np.concatenate([plan.epoch(epoch) for epoch in range(10)])
    assert sorted(seen[:9].tolist()) == sorted(set(seen[:9].tolist()))
    assert Counter(seen.tolist()) == dict.fromkeys(range(10), 3)
    up = mixture([4], [{"choose": 10}])
    assert sorted(Counter(up.epoch(0).tolist()).values()) == [2, 2, 3, 3]
    assert set(Counter(np.concatenate([up.epoch(0), up.epoch(1)]).tolist()).values()) == {5}


def test_order_follows_seed_and_epoch() -> None:
    plan = repeated([200, 100], 1.5, 0.3)
    first = plan.epoch(0)
    assert np.array_equal(first, repeated([200, 100], 1.5, 0.3).epoch(0))
    assert not np.array_equal(first, plan.epoch(1))
    assert not np.array_equal(first, repeated([200, 100], 1.5, 0.3, seed=1).epoch(0))
    drawn = [set(plan.epoch(epoch)[plan.epoch(epoch) >= 200]) for epoch in range(3)]
    assert all(len(rows) == 30 for rows in drawn) and len(drawn[0] | drawn[1] | drawn[2]) == 90, "each row in its turn"


def test_the_part_of_each_source_is_drawn_for_itself() -> None:
    order = repeated([100, 100], 0.5, 0.5).epoch(0)
    assert set(order[order < 100]) != {row - 100 for row in order[order >= 100]}


def test_shuffle_is_fair() -> None:
    plan = repeated([10], 1.0)
    firsts = Counter(int(plan.epoch(epoch)[0]) for epoch in range(2000))
    assert all(140 < firsts[row] < 260 for row in range(10))


def test_weights_divide_what_their_sources_hold_and_leave_the_others_alone() -> None:
    ways = [{"weight": 1}, {"choose": 7}, {"weight": 2}, {"repeat": 0.5}, {"weight": 0.5}]
    counts = epoch_counts([10, 1, 10, 9, 15], [Mixed(**one) for one in ways])
    assert counts == (10, 7, 20, 5, 5)
    assert epoch_counts([1, 1, 1], [Mixed(weight=weight) for weight in (1, 1, 1)]) == (1, 1, 1)
    assert epoch_counts([5, 6], [Mixed(weight=1), Mixed(weight=1)]) == (6, 5), "of equal remainders the first"
    assert [mixing_text(Mixed(**one)) for one in [*ways, {}]] == [
        "weight 1", "choose 7", "weight 2", "repeat 0.5", "weight 0.5", "repeat 1"
    ]  # fmt: skip


def test_a_weight_that_comes_to_nothing_and_an_empty_source() -> None:
    with pytest.raises(ConfigError, match=r"weight 0\.001 of s1 comes to no row beside the other weights\. Raise it"):
        mixture([10, 10], [{"weight": 1}, {"weight": 0.001}])
    with pytest.raises(DataError, match=r"^s1: the source holds no row"):
        mixture([10, 0], [{}, {"choose": 5}])
    usable = np.array([True] * 10 + [False] * 3)
    with pytest.raises(DataError, match=r"^s1: none of its 3 rows can be trained"):
        mixture([10, 3], [{"weight": 1}, {"weight": 1}], usable)
