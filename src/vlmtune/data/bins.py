"""Bin packing: rows of known length into packs of a capacity. No randomness: equal lengths give equal packs."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

_CELLS = 1 << 22  # of the table of free room that `count_first_fit` works on at a time


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


def deal(lengths: Sequence[int], num_packs: int, capacity: int) -> list[list[int]]:
    """Rows into exactly `num_packs` packs of nearly equal length, the longest pack first; packs may stay empty.

    The longest row goes to the emptiest pack, and so on down. Where that overflows a pack, first-fit-decreasing is
    taken instead, which is tighter and less even.

    Returns:
        The positions in `lengths` of each pack's rows, ascending.

    Raises:
        ValueError: the rows do not fit.
    """
    falling = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    emptiest = [(0, pack) for pack in range(num_packs)]
    for i in falling:
        load, pack = heapq.heappop(emptiest)
        if load + lengths[i] > capacity:
            packs = _first_fit_packs(falling, lengths, num_packs, capacity)
            break
        packs[pack].append(i)
        heapq.heappush(emptiest, (load + lengths[i], pack))
    packs.sort(key=lambda pack: -sum(lengths[i] for i in pack))
    return [sorted(pack) for pack in packs]


def _first_fit_packs(falling: Sequence[int], lengths: Sequence[int], num_packs: int, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [capacity] * num_packs
    for i in falling:
        for pack in range(num_packs):
            if room[pack] >= lengths[i]:
                packs[pack].append(i)
                room[pack] -= lengths[i]
                break
        else:
            raise ValueError(f"{len(lengths)} rows do not fit {num_packs} packs of {capacity}")
    return packs


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows, in falling order of length, into as few packs as best-fit-decreasing needs.

    Returns:
        The positions in `lengths` of each pack's rows; packs in the order in which they were opened.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, pack), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            room, pack = free.pop(at)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        insort(free, (room - lengths[i], pack))
    return packs
