"""Packs against brute force and against one-by-one first-fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.bins import best_fit, count_first_fit, deal


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        for pack in range(len(room)):
            if room[pack] >= length:
                room[pack] -= length
                break
        else:
            room.append(capacity - length)
    return len(room)


groups = st.lists(st.lists(st.integers(1, 100), min_size=0, max_size=12), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(groups=groups, capacity=st.integers(100, 180))
def test_counting_many_groups_equals_counting_one_by_one(groups: list[list[int]], capacity: int) -> None:
    table = np.zeros((len(groups), 12), np.int32)
    for row, group in zip(table, groups, strict=True):
        row[: len(group)] = group
    assert count_first_fit(table, capacity).tolist() == [first_fit_decreasing(group, capacity) for group in groups]


def test_counting_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).integers(1, 100, (50, 16))
    whole = count_first_fit(table, 120)
    monkeypatch.setattr("vlmtune.data.bins._CELLS", 64)
    assert np.array_equal(whole, count_first_fit(table, 120))
    assert count_first_fit(np.zeros((0, 4), int), 10).shape == (0,)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=30), capacity=st.integers(100, 180), more=st.integers(0, 3))
def test_dealt_packs_hold_everything_and_never_overflow(lengths: list[int], capacity: int, more: int) -> None:
    num = first_fit_decreasing(lengths, capacity) + more
    packs = deal(lengths, num, capacity)
    assert len(packs) == num
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(load <= capacity for load in loads)
    assert loads == sorted(loads, reverse=True)
    assert all(pack == sorted(pack) for pack in packs)


def test_dealing_is_even_where_it_can_be() -> None:
    assert deal([10, 10, 10, 10], 2, 100) == [[0, 1], [2, 3]] or deal([10] * 4, 2, 100) == [[0, 2], [1, 3]]
    loads = [sum(pack) for pack in deal(list(range(1, 31)), 5, 1000)]
    assert max(loads) - min(loads) < 40
    with pytest.raises(ValueError, match="do not fit"):
        deal([60, 60, 60], 2, 100)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=40), capacity=st.integers(100, 180))
def test_best_fit(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert len(packs) <= 2 * sum(lengths) // capacity + 1
