"""Progress of long work, on stderr: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import errno
import time
from collections.abc import Generator, Iterable, Iterator
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0

_muted = False


class Screen(Console):
    """A rich console that leaves it to its caller what happens when the reader has gone: rich's own ends with 1."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, "the reader has gone")


def mute() -> None:
    """Show no progress from now on in this process: `cli` calls it on every rank but the first."""
    global _muted
    _muted = True


def track(iterable: Iterable[T], *, total: int, label: str) -> Generator[T, None, None]:
    """Yield the items of `iterable` and show how many of `total` went by.

    Without a terminal (a log file, a pipe) a line is written every ten seconds, so quick work writes nothing.
    """
    if _muted:
        yield from iterable
        return
    console = Screen(stderr=True)
    if console.is_terminal:
        yield from _bar(iterable, total, label, console)
    else:
        yield from _lines(iterable, total, label, console)


def _bar(iterable: Iterable[T], total: int, label: str, console: Console) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        for item in iterable:
            yield item
            progress.advance(task)


def _lines(iterable: Iterable[T], total: int, label: str, console: Console) -> Iterator[T]:
    started = last = time.monotonic()
    spoke = False
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last, spoke = now, True
            left = (now - started) / done * max(total - done, 0)
            _say(console, f"{label}: {done}/{total} ({_share(done, total)}), about {left:.0f} s left")
    if spoke:
        _say(console, f"{label}: {done}/{total} in {time.monotonic() - started:.0f} s")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _share(done: int, total: int) -> str:
    return f"{100 * done // total} %" if total else "…"
