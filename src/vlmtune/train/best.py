"""The best evaluation and early stopping: pure functions of the losses, so a resumed run needs no extra state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.config.schema import EarlyStopping


@dataclass(frozen=True, slots=True)
class Evaluated:
    step: int
    loss: float


def best_of(evaluations: Sequence[Evaluated]) -> Evaluated | None:
    """The evaluation with the smallest loss, the first one of equals."""
    return min(evaluations, key=lambda evaluated: evaluated.loss, default=None)


def should_stop(evaluations: Sequence[Evaluated], rule: EarlyStopping | None) -> bool:
    """Whether the last `patience` evaluations brought no drop of more than `min_delta` below what stood before."""
    if rule is None:
        return False
    mark = float("inf")
    idle = 0
    for evaluated in evaluations:
        if evaluated.loss < mark - rule.min_delta:
            mark, idle = evaluated.loss, 0
        else:
            idle += 1
    return idle >= rule.patience
