"""Seconds to plan an epoch of a million rows, and how full the packs are.

Made-up lengths like those of LLaVA's mix: 94 % of the rows hold a picture of 576 tokens and some text, the others are
text alone. Planned for 1 and 8 ranks, with the global batch in rows and in tokens; the time ends when the first micro
batch of the second epoch's first step is known. The lower bound is the number of packs that the tokens would fill to
the brim; no packing can go below it.

    python benchmarks/plan.py
    python benchmarks/plan.py --rows 100000 --times 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from made import machine

from vlmtune.config.schema import RunConfig
from vlmtune.config.sources import Mixed
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.data.prepared.measure import COLUMNS, Measured

MAX_LENGTH = 4096
BATCHES = ({"global_batch_size": 128}, {"global_batch_size": 512}, {"global_batch_tokens": 64 * MAX_LENGTH})


class Rows:
    """As much of a corpus as a plan asks for: one source."""

    def __init__(self, size: int) -> None:
        self.source_sizes = [size]
        self.names = ["made.jsonl"]
        self.sources = [SimpleNamespace(name="made.jsonl", options=Mixed())]

    def __len__(self) -> int:
        return self.source_sizes[0]


def lengths(rows: int) -> Measured:
    random = np.random.default_rng(0)
    has_picture = random.random(rows) < 0.94
    short = 576 + np.clip(random.lognormal(5.0, 0.7, rows), 20, MAX_LENGTH - 576)
    long = np.clip(random.lognormal(6.6, 0.8, rows), 50, MAX_LENGTH)
    columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()}
    columns["num_tokens"][:] = np.where(has_picture, short, long)
    columns["num_visual"][:] = np.where(has_picture, 576, 0)
    return Measured(**columns, bad=[])


def planned(measured: Measured, batch: dict[str, int], world: int) -> tuple[TrainPlan, float]:
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"sources": {"path": "made.jsonl"}, "max_length": MAX_LENGTH},
            "train": {"epochs": 2, **batch},
        }
    )
    corpus: Any = Rows(len(measured.num_tokens))
    start = time.perf_counter()
    plan = make_plan(measured, corpus, config, world=world, packed=True)
    plan.rows(plan.steps_per_epoch * plan.micro_batches_per_step)
    return plan, time.perf_counter() - start


def imbalance(plan: TrainPlan, steps: int = 200) -> tuple[float, float]:
    """Of the packs that are computed side by side: visual tokens and tokens of the largest ÷ those of the mean."""
    largest, mean = np.zeros(2), np.zeros(2)
    for step in range(min(steps, plan.steps_per_epoch - 1)):
        n = plan.micro_batches_per_step
        packs = [list(plan.rows(step * n + j)) for j in range(n)]
        table = np.array([[column[pack].sum() for column in (plan.num_visual, plan.num_tokens)] for pack in packs])
        rounds = table.reshape(-1, plan.world, 2)
        largest += rounds.max(axis=1).sum(axis=0)
        mean += rounds.mean(axis=1).sum(axis=0)
    visual, tokens = (largest / mean).tolist()
    return visual, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=3, help="measurements, of which the median is printed")
    options = parser.parse_args()
    measured = lengths(options.rows)
    total = int(measured.num_tokens.sum(dtype=np.int64))
    print(machine())
    print(f"{options.rows:,} rows, {total / options.rows:.0f} tokens each, packs of {MAX_LENGTH}, two epochs")
    print(f"{'a step':<28}{'ranks':>6}{'seconds':>9}{'packs':>10}{'fill':>8}{'of bound':>10}{'side by side':>18}")
    for batch in BATCHES:
        for world in (1, 8):
            results = [planned(measured, batch, world) for _ in range(options.times)]
            plan, seconds = results[0][0], statistics.median(result[1] for result in results)
            bound = -(-total // MAX_LENGTH)
            (name, size), packs = next(iter(batch.items())), plan.packs_per_epoch
            visual, tokens = imbalance(plan)
            beside = f"{visual:.3f} {tokens:.3f}" if world > 1 else ""
            print(
                f"{name + ' ' + str(size):<28}{world:>6}{seconds:>9.2f}{packs:>10,}{plan.arithmetic()['fill']:>8.3f}"
                f"{bound / packs:>10.3f}{beside:>18}"
            )
    print("side by side: visual tokens, and tokens, of the fullest of 8 packs that run together ÷ their mean")


if __name__ == "__main__":
    main()
