"""Packs against brute force and against one-by-one first-fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.plan.bins import by_work, count_first_fit, deal, fill, packs_of, place_rows


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
    monkeypatch.setattr("vlmtune.data.plan.bins._CELLS", 64)
    assert np.array_equal(whole, count_first_fit(table, 120))
    assert count_first_fit(np.zeros((0, 4), int), 10).shape == (0,)


def table(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(length, share of it in percent) as lengths and visual tokens."""
    lengths = np.array([length for length, _ in rows], np.int64)
    return lengths, np.array([length * percent // 100 for length, percent in rows], np.int64)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 100), st.sampled_from([0, 0, 40, 90])), max_size=30),
    capacity=st.integers(100, 180),
    more=st.integers(0, 3),
)
def test_dealt_packs_hold_everything_and_never_overflow(rows: list[tuple[int, int]], capacity: int, more: int) -> None:
    lengths, visual = table(rows)
    num = first_fit_decreasing(lengths.tolist(), capacity) + more
    packs = deal(lengths, visual, num, capacity)
    assert len(packs) == num
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= capacity for pack in packs)
    work = [lengths[p].sum() / max(1, lengths.sum()) + visual[p].sum() / max(1, visual.sum()) for p in packs]
    assert work == pytest.approx(sorted(work, reverse=True))
    assert all(pack == sorted(pack) for pack in packs)


def test_dealing_is_even_where_it_can_be() -> None:
    def loads(lengths: list[int], visual: list[int], packs: int, capacity: int) -> list[tuple[int, int]]:
        dealt = deal(np.array(lengths), np.array(visual), packs, capacity)
        return sorted((sum(lengths[i] for i in pack), sum(visual[i] for i in pack)) for pack in dealt)

    assert loads([10] * 4, [0] * 4, 2, 100) == [(20, 0), (20, 0)]
    rising = [length for length, _ in loads(list(range(1, 31)), [0] * 30, 5, 1000)]
    assert rising[-1] - rising[0] < 40
    # Four rows with a picture and four without, all equally long: by length alone the pictures could lie together.
    assert loads([10] * 8, [8, 8, 8, 8, 0, 0, 0, 0], 4, 100) == [(20, 8)] * 4
    with pytest.raises(ValueError, match="do not fit"):
        deal(np.array([60, 60, 60]), np.zeros(3, int), 2, 100)


def test_packs_in_order_of_work_are_level_on_the_ranks() -> None:
    random = np.random.default_rng(0)
    visual = random.integers(0, 3000, 32)
    lengths = np.full(32, 4096)
    lengths[5] = visual[5] = 0
    order = by_work(lengths, visual)
    assert order[-1] == 5, "an empty one levels the end"
    for world in (2, 4, 8):
        rounds = visual[order].reshape(-1, world)
        chance = visual.reshape(-1, world)
        assert np.ptp(rounds, axis=1).mean() < np.ptp(chance, axis=1).mean() / 2
        assert np.ptp(rounds.sum(axis=0)) <= np.ptp(visual)


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest packs, by trying every way; for a few rows."""
    best = len(lengths)

    def place(rest: list[int], room: list[int]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if not rest:
            best = len(room)
            return
        for pack in range(len(room)):
            if room[pack] >= rest[0]:
                place(rest[1:], [*room[:pack], room[pack] - rest[0], *room[pack + 1 :]])
        place(rest[1:], [*room, capacity - rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=9), capacity=st.integers(100, 180), seed=st.integers(0, 3))
def test_filled_packs_are_few(lengths: list[int], capacity: int, seed: int) -> None:
    filled, starts = fill(np.array(lengths, np.int64), capacity, seed)
    packs = [filled[start:end].tolist() for start, end in pairwise(starts.tolist())]
    assert sorted(length for pack in packs for length in pack) == sorted(lengths)
    assert all(0 < sum(pack) <= capacity for pack in packs)
    assert len(packs) <= max(fewest(lengths, capacity), 1.5 * fewest(lengths, capacity) - 0.5)
    again = fill(np.array(lengths, np.int64), capacity, seed)
    assert np.array_equal(filled, again[0]) and np.array_equal(starts, again[1])


def mix(random: np.random.Generator, rows: int) -> np.ndarray:
    """A picture of 576 tokens and some text, and a few long rows of text alone."""
    short = 576 + np.clip(random.lognormal(5.0, 0.7, rows), 20, 3400)
    long = np.clip(random.lognormal(6.6, 0.8, rows), 50, 4096)
    return np.where(random.random(rows) < 0.94, short, long).astype(np.int64)


def test_packs_of_pictures_with_text_are_full() -> None:
    """Best-fit-decreasing reaches 0.958 of the bound here: it leaves the rows of one length to each other."""
    lengths = mix(np.random.default_rng(0), 20_000)
    _, starts = fill(lengths, 4096, 0)
    assert lengths.sum() / 4096 / (len(starts) - 1) > 0.99


@pytest.mark.parametrize(
    ("lengths", "least"),
    [
        (np.full(5000, 700), 5 * 700 / 4096),  # nothing better exists
        (np.where(np.arange(5000) % 2, 3000, 1000), 4000 / 4096),
        (np.random.default_rng(0).integers(1, 30, 5000), 0.999),
        (np.minimum(np.random.default_rng(0).lognormal(6.3, 0.8, 5000), 4096).astype(int), 0.998),
    ],
)
def test_other_mixes_are_as_full_as_they_can_be(lengths: np.ndarray, least: float) -> None:
    _, starts = fill(lengths, 4096, 0)
    packs = len(starts) - 1
    assert packs <= -(-int(lengths.sum()) // int(least * 4096)) + 2


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=40), capacity=st.integers(100, 180))
def test_rows_take_the_places_of_their_lengths(lengths: list[int], capacity: int) -> None:
    packs = packs_of(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    longest = [lengths[pack[0]] for pack in packs]
    assert longest == sorted(longest, reverse=True) and longest == [max(lengths[i] for i in pack) for pack in packs]
    filled, _ = fill(np.array(lengths, np.int64), capacity, 1)
    places = place_rows(np.array(lengths, np.int64), filled)
    assert np.array_equal(np.array(lengths, np.int64)[places], filled)
    for length in set(lengths):
        own = [int(i) for i in places if lengths[i] == length]
        assert own == sorted(own), "equal lengths keep their order"
