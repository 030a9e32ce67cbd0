"""Plans over lengths alone: as much of a corpus as a plan asks for."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlmtune.config.schema import RunConfig
from vlmtune.config.sources import Mixed
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.data.prepared.measure import COLUMNS, BadRow, Measured


@dataclass
class Rows:
    source_sizes: list[int]
    options: list[Mixed]

    @property
    def names(self) -> list[str]:
        return [f"s{i}" for i in range(len(self.source_sizes))]

    @property
    def sources(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, options=one) for name, one in zip(self.names, self.options, strict=True)]

    def __len__(self) -> int:
        return sum(self.source_sizes)

    def origin(self, i: int) -> str:
        return f"a.jsonl:{i + 1}"


def rows_of(*sources: tuple[int, dict[str, Any]]) -> Any:
    """A corpus of sources, each with its size and the way it is mixed."""
    return Rows([size for size, _ in sources], [Mixed(**way) for _, way in sources])


def measured(lengths: Any, bad: list[BadRow] | None = None, visual: Any = None) -> Measured:
    columns = {name: np.zeros(len(lengths), dtype) for name, dtype in COLUMNS.items()}
    columns["num_tokens"][:] = lengths
    columns["num_trained"][:] = 1
    columns["num_visual"][:] = 0 if visual is None else visual
    return Measured(**columns, bad=bad or [])


def config(max_length: int = 100, data: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    section = {"sources": {"path": "a.jsonl"}, "max_length": max_length, **(data or {})}
    return RunConfig.model_validate({"model": {"path": "m"}, "data": section, "train": train})


def plan_of(
    lengths: Any,
    *,
    world: int = 1,
    packed: bool = True,
    way: dict[str, Any] | None = None,
    visual: Any = None,
    data: dict[str, Any] | None = None,
    max_length: int = 100,
    **train: Any,
) -> TrainPlan:
    """The plan of one source."""
    rows = rows_of((len(lengths), way or {}))
    return make_plan(
        measured(lengths, visual=visual), rows, config(max_length, data, **train), world=world, packed=packed
    )


def all_steps(plan: TrainPlan) -> list[list[tuple[int, ...]]]:
    """The micro batches of every step."""
    n = plan.micro_batches_per_step
    return [[plan.rows(step * n + j) for j in range(n)] for step in range(plan.num_steps)]
