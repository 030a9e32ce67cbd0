"""The same work on many pieces of data, in this process or in several, with results in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from vlmtune.errors import VlmtuneError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(job: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Generator[Result, None, None]:
    """`job` of every item, in the order of `items`.

    Args:
        job: picklable; forked workers share its memory.
        workers: processes; fewer than 2 work in this one.

    Raises:
        VlmtuneError: a worker was killed. What `job` raises comes through.
    """
    workers = min(workers, len(items), 4 * (os.cpu_count() or 1))
    if workers < 2:
        yield from map(job, items)
        return
    # Forked workers share the tokenizer and the row index instead of loading them again (seconds each).
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    stop, stopper = context.Pipe(duplex=False)
    with stop, stopper, ProcessPoolExecutor(workers, context, _start_worker, (job, stop)) as pool:
        finished = False
        try:
            yield from pool.map(_work, items)
            finished = True
        except BrokenProcessPool as error:
            raise VlmtuneError(
                "a process that reads rows was killed (out of memory?)", remedy="Use fewer of them: data.workers."
            ) from error
        finally:
            if not finished:
                stopper.send_bytes(b"stop")  # nobody wants the pieces that are in work
            # A pool that ends after the caller has gone on may end in the middle of Python's own end.
            pool.shutdown(wait=True, cancel_futures=True)


_job: Callable[[Any], Any] | None = None  # of a worker process


def _start_worker(job: Callable[[Any], Any], stop: Connection) -> None:
    global _job
    _job = job
    gc.freeze()  # what the libraries brought is not searched for garbage again and again
    # Ctrl-C reaches the whole process group; the parent answers it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(), stop), daemon=True).start()


def _end_with(parent: int, stop: Connection) -> None:
    """Ends this worker when its parent says so, or was killed: it would wait for the next rows for ever."""
    while os.getppid() == parent and not stop.poll(1.0):
        pass
    os._exit(1)


def _work(item: Any) -> Any:
    assert _job is not None  # set by _start_worker
    return _job(item)
