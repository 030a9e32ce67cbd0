"""Work in several processes ends with the call, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time

import pytest

from vlmtune.data.prepared.pool import in_processes
from vlmtune.errors import DataError


def square(number: int) -> int:
    return number * number


def fail_first(number: int) -> int:
    if number == 0:
        raise DataError("it is odd", where="a.jsonl:1")
    time.sleep(60)
    return number


def quick_then_slow(number: int) -> int:
    time.sleep(60 * bool(number))
    return number


def test_results_come_in_order_and_nothing_outlives_the_call() -> None:
    """A pool that outlives its call ends in the middle of Python's own end, which then says "Bad file descriptor"."""
    threads = threading.active_count()
    assert list(in_processes(square, range(20), 2)) == [number * number for number in range(20)]
    assert threading.active_count() == threads and not multiprocessing.active_children()


def test_an_error_comes_through_at_once_and_ends_all_workers() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^a\.jsonl:1: it is odd"):
        list(in_processes(fail_first, range(20), 2))
    assert time.monotonic() - start < 20 and not multiprocessing.active_children()


def test_a_caller_who_stops_asking_does_not_wait_for_what_is_in_work() -> None:
    start = time.monotonic()
    with contextlib.closing(in_processes(quick_then_slow, range(20), 2)) as results:
        assert next(results) == 0
    assert time.monotonic() - start < 20 and not multiprocessing.active_children()
