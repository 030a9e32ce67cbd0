"""Bin packing: rows of known length into packs of a capacity. Equal lengths and seeds give equal packs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CELLS = 1 << 22  # of the table of free room that `count_first_fit` works on at a time

_LARGE = 3  # rows longer than 1/3 of a pack begin one, the longest first
_KEPT = 2.5  # mean lengths of room that are left to the rows that are chosen
_LEADS = 5  # rows that are tried as a third one when two do not fill a pack
_LOOKS = 6  # upcoming rows that are preferred as one of two
_VISUAL = 0.1  # what evenness in visual tokens weighs beside evenness in length when a step is dealt
_GOOD = 256  # a pack is full enough when less than 1/256 of it is free


def count_first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """How many packs first-fit-decreasing needs, for many groups of rows at once.

    Args:
        lengths: (S, G), S groups of G rows; zeros fill up smaller groups. None is longer than `capacity`.

    Returns:
        int64 (S,).
    """
    num_groups, size = lengths.shape
    counts = np.zeros(num_groups, np.int64)
    if not num_groups or not size:
        return counts
    # Any two packs of first-fit hold more than one capacity together, which bounds their number.
    most = min(size, int(2 * lengths.sum(axis=1, dtype=np.int64).max() // capacity) + 1)
    chunk = max(1, _CELLS // most)
    for start in range(0, num_groups, chunk):
        counts[start : start + chunk] = _first_fit(lengths[start : start + chunk], capacity, most)
    return counts


def _first_fit(lengths: np.ndarray, capacity: int, most: int) -> np.ndarray:
    """One step per place in the (sorted) groups; all groups take the step together."""
    falling = np.sort(lengths.astype(np.int32), axis=1)[:, ::-1]
    groups = np.arange(len(falling))
    room = np.full((len(falling), most), capacity, np.int32)
    used = np.zeros(len(falling), np.int64)
    for place in range(falling.shape[1]):
        length = falling[:, place]
        if not length.any():
            break
        first = (room >= length[:, None]).argmax(axis=1)
        room[groups, first] -= length
        used = np.where(length > 0, np.maximum(used, first + 1), used)
    return used


def deal(lengths: np.ndarray, visual: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Rows into exactly `num_packs` packs of nearly equal length and nearly equal visual tokens; packs may stay empty.

    The longest row goes first, each to the pack that has least of what the row brings: there load · length and, with
    less weight, visual load · visual tokens (all as shares of the totals) are smallest together. Where that leaves a
    row without room, first-fit-decreasing is taken instead, which is tighter and less even.

    Args:
        lengths, visual: (n,), tokens of each row and how many of them are visual.

    Returns:
        The positions of each pack's rows, ascending; see `by_work` for the order of the packs.

    Raises:
        ValueError: the rows do not fit.
    """
    share = lengths / max(1, int(lengths.sum()))
    visual_share = visual / max(1, int(visual.sum()))
    falling = np.argsort(-lengths, kind="stable")
    room = np.full(num_packs, capacity)
    load, visual_load = np.zeros(num_packs), np.zeros(num_packs)
    pack_of = np.empty(len(lengths), np.int64)
    for i in falling.tolist():
        cost = load * share[i] + _VISUAL * visual_load * visual_share[i]
        cost[room < lengths[i]] = np.inf
        pack = int(cost.argmin()) if num_packs else 0
        if not num_packs or room[pack] < lengths[i]:
            pack_of = _first_fit_packs(lengths, num_packs, capacity)
            break
        pack_of[i] = pack
        room[pack] -= lengths[i]
        load[pack] += share[i]
        visual_load[pack] += visual_share[i]
    order = by_work(np.bincount(pack_of, lengths, num_packs).astype(np.int64), np.bincount(pack_of, visual, num_packs))
    return [np.flatnonzero(pack_of == pack).tolist() for pack in order.tolist()]


def by_work(lengths: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """The order of packs in a step: falling work (length and visual tokens, as shares of the step's), empty ones last.

    Neighbours are computed side by side, one on each rank. So ranks wait least for each other in every round, and over
    all rounds no rank has more than one pack's difference to do than another, whatever the number of ranks.
    """
    work = lengths / max(1, int(lengths.sum())) + visual / max(1, int(visual.sum()))
    return np.lexsort((-work, lengths == 0))


def _first_fit_packs(lengths: np.ndarray, num_packs: int, capacity: int) -> np.ndarray:
    pack_of = np.empty(len(lengths), np.int64)
    room = [capacity] * num_packs
    for i in np.argsort(-lengths, kind="stable").tolist():
        for pack in range(num_packs):
            if room[pack] >= lengths[i]:
                pack_of[i] = pack
                room[pack] -= int(lengths[i])
                break
        else:
            raise ValueError(f"{len(lengths)} rows do not fit {num_packs} packs of {capacity}")
    return pack_of


class _Stock:
    """Lengths that still wait for a pack. Sets of lengths are bits of whole numbers: bit L stands for length L."""

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int) -> None:
        present = np.unique(lengths).tolist()
        self.capacity = capacity
        self.count = np.bincount(lengths, minlength=capacity + 1).tolist()
        self.left = len(lengths)
        self.tokens = int(lengths.sum())
        self.longest: int = present[-1]
        random = np.random.Generator(np.random.PCG64(seed))
        # Sorted first: which packs there are must not depend on the order in which the lengths are given.
        self.queue: list[int] = [*random.permutation(np.sort(lengths)).tolist(), *[0] * (_LEADS + _LOOKS)]
        self.at = 0
        self._skipped = [0] * (capacity + 1)  # rows of a length that went out of turn, by length
        self._there = sum(1 << length for length in present)
        self._mirrored = sum(1 << capacity - length for length in present)
        self._no_pair = 0  # totals that no two lengths add up to; lengths only vanish, so this only grows

    def take(self, length: int) -> int:
        """Takes a row of this length out of turn."""
        self._skipped[length] += 1
        return self._take(length)

    def take_longest(self) -> int:
        return self.take(self.longest)

    def draw(self, room: int) -> int:
        """Takes the next row of the random order; 0 if it is longer than `room`."""
        while self._skipped[self.queue[self.at]]:
            self._skipped[self.queue[self.at]] -= 1
            self.at += 1
        length = self.queue[self.at]
        if length > room:
            return 0
        self.at += 1
        return self._take(length)

    def _take(self, length: int) -> int:
        self.count[length] -= 1
        self.left -= 1
        self.tokens -= length
        if not self.count[length]:
            self._there ^= 1 << length
            self._mirrored ^= 1 << self.capacity - length
            while self.left and not self.count[self.longest]:
                self.longest -= 1
        return length

    def filling(self, room: int) -> tuple[int, ...]:
        """One, two or three lengths that together come as near to `room` as was found; () if none fits."""
        best = self._one_or_two(room, 0, self.at)
        for place in range(self.at, self.at + _LEADS):
            if room - sum(best) <= self.capacity // _GOOD:
                break
            lead = self.queue[place]
            if 0 < lead <= room and self.count[lead]:
                found = (lead, *self._one_or_two(room - lead, lead, place + 1))
                best = max(best, found, key=sum)
        return best

    def _one_or_two(self, room: int, lead: int, place: int) -> tuple[int, ...]:
        """The same for one or two lengths beside `lead`; of pairs that are equally good, one with an upcoming row."""
        there = self._there & (2 << room) - 1
        if lead and self.count[lead] == 1:
            there &= ~(1 << lead)
        single = there.bit_length() - 1
        best: tuple[int, ...] = (single,) if single > 0 else ()
        totals = (2 << room) - 1 & ~self._no_pair
        while (total := totals.bit_length() - 1) > max(single, 0):
            pairs = self._there & self._mirrored >> self.capacity - total
            if not pairs:
                self._no_pair |= 1 << total
            elif pair := self._pair(pairs, total, lead, place):
                return pair
            totals ^= 1 << total
        return best

    def _pair(self, pairs: int, total: int, lead: int, place: int) -> tuple[int, ...]:
        """Two lengths of `pairs` (bits of lengths whose partner is there): common ones, so that rare ones last."""
        best: tuple[int, ...] = ()
        most = 0
        for one in (*self.queue[place : place + _LOOKS], (pairs & -pairs).bit_length() - 1):
            other = total - one
            if one and other > 0 and pairs >> one & 1 and self.count[other] > most:
                needed = (one, other, lead)
                if all(self.count[length] >= needed.count(length) for length in (one, other)):
                    best, most = (one, other), self.count[other]
        return best


def fill(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths into few packs, each filled as far as it goes.

    Long rows begin packs, the longest first, because they are hard to place. Then rows come in random order, so that
    what is left keeps the mix of lengths it had; the last two or three rows of a pack are chosen to fill it exactly.
    (Best-fit-decreasing is as good where short rows are many, and loses 4 % where every row holds a picture.)

    Args:
        lengths: (n,), 1 … `capacity`.

    Returns:
        The lengths, pack by pack, and int64 (packs + 1,), where each pack begins in them; packs in falling order of
        their longest row as long as that is more than a third of the capacity. The order of `lengths` changes nothing.
    """
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    stock = _Stock(np.asarray(lengths, np.int64), capacity, seed)
    filled: list[int] = []
    starts = [0]
    while stock.left:
        room = capacity
        if stock.longest * _LARGE > capacity:
            filled.append(stock.take_longest())
            room -= filled[-1]
        while stock.left and room * stock.left > _KEPT * stock.tokens:
            length = stock.draw(room)
            if not length:
                break
            filled.append(length)
            room -= length
        while chosen := stock.filling(room):
            for length in chosen:
                filled.append(stock.take(length))
                room -= length
        starts.append(len(filled))
    return np.array(filled, np.int64), np.array(starts, np.int64)


def place_rows(lengths: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """int64 (n,): positions in `lengths`, so that ``lengths[result] == filled``; equal lengths keep their order."""
    positions = np.empty(len(filled), np.int64)
    positions[np.argsort(filled, kind="stable")] = np.argsort(lengths, kind="stable")
    return positions


def packs_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The positions of each pack's rows, packs by falling longest row and rows by falling length."""
    table = np.asarray(lengths, np.int64)
    filled, starts = fill(table, capacity, seed=0)
    packs = [
        sorted(pack.tolist(), key=lambda i: (-table[i], i))
        for pack in np.split(place_rows(table, filled), starts[1:-1])
        if len(pack)
    ]
    return sorted(packs, key=lambda pack: (-table[pack[0]], pack[0]))
