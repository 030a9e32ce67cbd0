"""data.group_by_length: steps of like length, every row as often as without it, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import all_steps, plan_of
from pydantic import ValidationError

from vlmtune.data.plan.train_plan import TrainPlan

_GROUPED = {"packing": False, "group_by_length": True}
_PLAIN = {"packing": False}


def _plan(lengths: Any, data: dict[str, Any], **more: Any) -> TrainPlan:
    return plan_of(lengths, packed=False, data=data, **more)


def _padding(plan: TrainPlan) -> float:
    """Share of the positions of all micro batches that hold no token."""
    cells = tokens = 0
    for step in all_steps(plan):
        for micro in filter(None, step):
            lengths = plan.num_tokens[list(micro)]
            cells += int(lengths.max()) * len(micro)
            tokens += int(lengths.sum())
    return 1 - tokens / cells


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=150),
    way=st.one_of(st.just({}), st.integers(1, 12).map(lambda quarters: {"repeat": quarters / 4})),
    batch=st.sampled_from([4, 8, 12]),
    quarters=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_every_row_as_often_as_without_it_on_any_number_of_ranks(
    lengths: list[int], way: dict[str, Any], batch: int, quarters: int, seed: int
) -> None:
    if not way.get("repeat", 1) * len(lengths) >= 1:
        return
    more = {"way": way, "global_batch_size": batch, "epochs": quarters / 4, "seed": seed}
    plan, plain = _plan(lengths, _GROUPED, **more), _plan(lengths, _PLAIN, **more)
    assert plan.num_steps == plain.num_steps
    steps = [plan.step_rows(step).tolist() for step in range(plan.num_steps)]
    assert [len(step) for step in steps] == [len(plain.step_rows(step)) for step in range(plan.num_steps)]
    whole = int(quarters / 4) * plan.steps_per_epoch
    for start in range(0, whole, plan.steps_per_epoch):
        epoch = range(start, start + plan.steps_per_epoch)
        assert Counter(row for step in epoch for row in steps[step]) == Counter(
            row for step in epoch for row in plain.step_rows(step).tolist()
        )
    for world in (2, 4):
        other = _plan(lengths, _GROUPED, world=world, **more)
        assert [other.step_rows(step).tolist() for step in range(other.num_steps)] == steps
        assert other.digest == plan.digest
    assert plan.step_rows(plan.num_steps - 1).tolist() == steps[-1], "asked for again, as a resumed run does"


def _lengths(rows: int) -> np.ndarray:
    """Long and short rows as pictures and plain text give them."""
    random = np.random.default_rng(0)
    return np.clip(random.lognormal(6, 0.9, rows).astype(int), 20, 4096)


@pytest.mark.parametrize(("micro", "at_most"), [(4, 0.4), (8, 0.25), (16, 0.2)])
def test_less_is_padded(micro: int, at_most: float) -> None:
    lengths, more = _lengths(6000), {"global_batch_size": 16, "micro_batch_size": micro, "max_length": 4096}
    plain, grouped = (_padding(_plan(lengths, data, **more)) for data in (_PLAIN, _GROUPED))
    assert grouped < at_most * plain


def test_steps_are_alike_inside_and_not_in_the_order_of_their_lengths() -> None:
    plan = _plan(_lengths(6400), _GROUPED, global_batch_size=16, max_length=4096, epochs=2)
    steps = [plan.num_tokens[plan.step_rows(step)] for step in range(plan.num_steps)]
    spread = np.mean([lengths.std() for lengths in steps])
    assert spread < 0.2 * _lengths(6400).std()
    means = np.array([lengths.mean() for lengths in steps[: plan.steps_per_epoch]])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    halves = [
        {frozenset(plan.step_rows(start + step).tolist()) for step in range(plan.steps_per_epoch)}
        for start in (0, plan.steps_per_epoch)
    ]
    assert not halves[0] & halves[1], "no two rows are bound to each other"


def test_few_rows_do_not_always_meet_the_same_others() -> None:
    plan = _plan(list(range(1, 65)), _GROUPED, global_batch_size=4, epochs=2)
    epochs = [{frozenset(plan.step_rows(start + step).tolist()) for step in range(16)} for start in (0, 16)]
    assert epochs[0] != epochs[1]


def test_the_digest_says_whether_lengths_were_looked_at() -> None:
    digests = {_plan(list(range(1, 65)), data, global_batch_size=4).digest for data in (_PLAIN, _GROUPED)}
    assert len(digests) == 2


def test_packs_refuse_it() -> None:
    with pytest.raises(ValidationError, match=r"set data\.packing: false"):
        _plan([1, 2], {"group_by_length": True})
