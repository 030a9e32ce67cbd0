from __future__ import annotations

import pytest

from vlmtune.config.schema import EarlyStopping
from vlmtune.train.best import Evaluated, best_of, should_stop


def _history(*losses: float) -> list[Evaluated]:
    return [Evaluated(10 * (i + 1), loss) for i, loss in enumerate(losses)]


def test_best_is_the_smallest_and_the_first_of_equals() -> None:
    assert best_of([]) is None
    assert best_of(_history(2.0, 1.0, 1.0, 3.0)) == Evaluated(20, 1.0)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops"),
    [
        ((), 1, 0.0, False),
        ((2.0, 2.0), 1, 0.0, True),  # an equal loss is no improvement
        ((2.0, 1.9), 1, 0.2, True),
        ((2.0, 1.7), 1, 0.2, False),
        ((2.0, 1.9, 1.8, 1.7), 3, 0.25, False),  # small drops add up to a large one
        ((2.0, 3.0, 3.0, 1.0), 3, 0.0, False),
        ((2.0, 3.0, 3.0, 2.5), 3, 0.0, True),
    ],
)
def test_should_stop(losses: tuple[float, ...], patience: int, min_delta: float, stops: bool) -> None:
    rule = EarlyStopping(patience=patience, min_delta=min_delta)
    assert should_stop(_history(*losses), rule) is stops
    assert should_stop(_history(*losses), None) is False
