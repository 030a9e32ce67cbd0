"""Rows per second and peak memory of the pass over the data that `check` and `train` begin with.

200,000 made-up LLaVA rows (one 640×480 JPEG out of a pool of 5,000 files, about 150 text tokens), each of which is
read, adapted, tokenised with labels and counted from the picture's header; every row opens its file. Memory is the sum
of PSS over the process tree at its peak, minus the same tree after its imports.

    python benchmarks/data.py
    python benchmarks/data.py --rows 20000 --workers 1
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from made import machine, write_llava, write_pictures, write_rows

from vlmtune.config.schema import SourceConfig
from vlmtune.data.measure import measure
from vlmtune.data.sources import open_corpus
from vlmtune.models.load import open_folder


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def resident() -> int:
    """Bytes: sum of the proportional set sizes of this process tree."""
    total = 0
    for pid in tree(os.getpid()):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it ended in between
        total += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


class Peak:
    """Samples `resident` while a block runs."""

    def __enter__(self) -> Peak:
        self.base = self.highest = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.highest = max(self.highest, resident())

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.highest - self.base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pictures", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_pictures(folder / "pictures", options.pictures, (640, 480))
        rows = folder / "rows.jsonl"
        write_rows(rows, options.rows, names)
        opened = open_folder(write_llava(folder / "model", hidden_size=64, layers=2))
        with Peak() as peak:
            start = time.perf_counter()
            corpus = open_corpus([SourceConfig(path=str(rows), root=str(folder / "pictures"))])
            indexed = time.perf_counter()
            measured = measure(corpus, opened, workers=options.workers)
            done = time.perf_counter()
        if measured.bad:
            raise SystemExit(f"the benchmark's own rows are bad: {measured.bad[0]}")
        print(machine())
        tokens = int(measured.num_tokens.sum())
        print(f"{options.rows:,} rows, {tokens / options.rows:.0f} tokens each, {options.workers} workers")
        print(f"{'index':<28}{indexed - start:>8.1f} s")
        print(f"{'check and count':<28}{done - indexed:>8.1f} s{options.rows / (done - indexed):>12,.0f} rows/s")
        print(f"{'peak memory over imports':<28}{peak.grown / 2**20:>8,.0f} MiB")


if __name__ == "__main__":
    main()
