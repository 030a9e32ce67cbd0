"""Rows per second of `vlmtune check --quick`: rows, marks and picture headers, without tokens.

Made-up LLaVA rows (one 640×480 JPEG out of a pool of 5,000 files, about 150 text tokens); every row opens its file.

    python benchmarks/quick.py
    python benchmarks/quick.py --rows 20000 --workers 1 --times 1
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from made import machine, write_llava, write_pictures, write_rows

from vlmtune.config.sources import SourceConfig
from vlmtune.data.checks.quick import look_over
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.models.load import open_folder


def processor_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=3, help="measurements, of which the median is printed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_pictures(folder / "pictures", options.pictures, (640, 480))
        write_rows(folder / "rows.jsonl", options.rows, names)
        opened = open_folder(write_llava(folder / "model", hidden_size=64, layers=2))
        corpus = open_corpus([SourceConfig(path=str(folder / "rows.jsonl"), root=str(folder / "pictures"))])
        seconds, processor = [], []
        for _ in range(options.times):
            start, used = time.perf_counter(), processor_seconds()
            measured = look_over(corpus, opened, workers=options.workers)
            seconds.append(time.perf_counter() - start)
            processor.append(processor_seconds() - used)
            if measured.bad:
                raise SystemExit(f"the benchmark's own rows are bad: {measured.bad[0]}")
    took, worked = statistics.median(seconds), statistics.median(processor)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
    print(f"{options.rows:,} rows, {options.workers} workers")
    print(f"{'rows per second':<40}{options.rows / took:>10,.0f}")
    print(f"{'processor time per row':<40}{1e6 * worked / options.rows:>10,.0f} µs")
    print(f"{'rows per second and undisturbed core':<40}{options.rows / worked:>10,.0f}")


if __name__ == "__main__":
    main()
