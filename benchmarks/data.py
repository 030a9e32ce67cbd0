"""Preparing rows: speed against its ceiling and against the usual pipeline, memory, and opening what was prepared.

Made-up LLaVA rows (one 640×480 JPEG out of a pool of 5,000 files, about 140 text tokens), each of which is read,
adapted, laid down with its chat template and labels, tokenised, and counted from its picture's header; every row opens
its file. In the same call, taken in turns:

- the ceiling: `tokenizers.encode_batch` alone on the texts of the same rows, with as many threads as workers;
- the usual pipeline: json → `datasets.map` (template and tokenizer, as many processes) → `save_to_disk`.

Memory is the sum of PSS over the process tree at its peak, minus the same tree after its imports.

    python benchmarks/data.py
    python benchmarks/data.py --rows 1000000 --only-memory
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from made import machine, write_llava, write_pictures, write_rows

from vlmtune.config.schema import SourceConfig
from vlmtune.data.prepared.prepare import open_prepared, prepare
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.models.family import OpenedFolder
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


def resident(field: str = "Pss:", pids: Iterator[int] | None = None) -> int:
    """Bytes: a field of smaps_rollup, summed over this process tree."""
    total = 0
    for pid in pids or tree(os.getpid()):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it ended in between
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))
    return total


def unique() -> int:
    """Bytes that this process alone holds (USS)."""
    return sum(resident(field, iter([os.getpid()])) for field in ("Private_Clean:", "Private_Dirty:"))


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


class Case:
    """The made-up rows and model of one run of this script."""

    def __init__(self, folder: Path, rows: int, pictures: int) -> None:
        names = write_pictures(folder / "pictures", pictures, (640, 480))
        self.file = folder / "rows.jsonl"
        write_rows(self.file, rows, names)
        self.source = SourceConfig(path=str(self.file), root=str(folder / "pictures"))
        self.opened: OpenedFolder = open_folder(write_llava(folder / "model", hidden_size=64, layers=2))
        self.into = folder / "prepared"
        self.rows = rows

    def corpus(self) -> Corpus:
        return open_corpus([self.source], memory=self.into)

    def prepare(self, workers: int) -> None:
        shutil.rmtree(self.into, ignore_errors=True)
        prepared = prepare(self.corpus(), self.opened, into=self.into, workers=workers)
        if prepared.measured.bad:
            raise SystemExit(f"the benchmark's own rows are bad: {prepared.measured.bad[0]}")


def ceiling(case: Case, workers: int) -> Callable[[], None]:
    """`encode_batch` on the same texts; reading them is not counted."""
    texts = ["\n".join(turn["value"] for turn in json.loads(line)["conversations"]) for line in case.file.open()]
    tokenizer = case.opened.tokenizer.backend_tokenizer
    os.environ["RAYON_RS_NUM_CPUS"] = os.environ["RAYON_NUM_THREADS"] = str(workers)

    def run() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        for start in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    return run


def usual(case: Case, workers: int, folder: Path) -> Callable[[], None]:
    """What most trainers do before they train: `datasets.map` over template and tokenizer, then `save_to_disk`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = case.opened.tokenizer

    def tokenised(row: dict[str, Any]) -> dict[str, Any]:
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": [{"type": "text", "text": turn["value"]}],
            }
            for turn in row["conversations"]
        ]
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = found["assistant_masks"]
        labels = [token if kept else -100 for token, kept in zip(found["input_ids"], mask, strict=True)]
        return {"input_ids": found["input_ids"], "labels": labels}

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        rows = datasets.load_dataset("json", data_files=str(case.file), split="train", cache_dir=str(folder / "cache"))
        rows.map(tokenised, num_proc=workers, remove_columns=["conversations", "id"]).save_to_disk(str(folder / "out"))

    return run


def speeds(case: Case, workers: int, rounds: int, folder: Path) -> None:
    work = {
        "encode_batch alone": ceiling(case, workers),
        "vlmtune prepare": lambda: case.prepare(workers),
        "datasets.map, save_to_disk": usual(case, workers, folder / "usual"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: case.rows / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, high = case.rows / max(times), case.rows / min(times)
        print(f"{name:<32}{medians[name]:>10,.0f} rows/s   ({low:,.0f} … {high:,.0f})")
    ours = medians["vlmtune prepare"]
    print(f"{'of the ceiling':<32}{ours / medians['encode_batch alone']:>10.0%}")
    print(f"{'× the usual pipeline':<32}{ours / medians['datasets.map, save_to_disk']:>10.2f}")


def memory(case: Case, workers: int) -> None:
    with Peak() as peak:
        start = time.perf_counter()
        case.prepare(workers)
        seconds = time.perf_counter() - start
    print(f"{'prepare, peak over imports':<32}{peak.grown / 2**20:>10,.0f} MiB   ({case.rows / seconds:,.0f} rows/s)")
    size = sum(path.stat().st_size for path in case.into.rglob("*.safetensors"))
    print(f"{'prepared files':<32}{size / 2**20:>10,.0f} MiB   ({size / case.rows:,.0f} bytes a row)")
    before, start = unique(), time.perf_counter()
    opened = open_prepared(case.corpus(), case.opened, case.into)
    seconds = time.perf_counter() - start
    print(f"{'opening them for training':<32}{seconds:>10.2f} s, {(unique() - before) / 2**20:,.0f} MiB of its own")
    start = time.perf_counter()
    prepare(case.corpus(), case.opened, into=case.into, workers=workers)
    print(f"{'… and checking every byte':<32}{time.perf_counter() - start:>10.2f} s")
    count = min(case.rows, 5000)
    start = time.perf_counter()
    for i in range(count):
        opened.rows.encoded((i * 7919) % case.rows)
    print(f"{'a prepared row, at random':<32}{(time.perf_counter() - start) / count * 1e6:>10,.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        case = Case(Path(temporary), options.rows, options.pictures)
        print(machine())
        print(f"{options.rows:,} rows, {options.workers} workers, medians of {options.rounds} rounds")
        memory(case, options.workers)
        if not options.only_memory:
            speeds(case, options.workers, options.rounds, Path(temporary))


if __name__ == "__main__":
    main()
