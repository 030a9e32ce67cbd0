"""Steps counted in tokens: packs of the whole epoch, every row as often as promised, the same for any world."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import all_steps, config, measured, plan_of, rows_of

from vlmtune.data.plan.bins import deal
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.errors import ConfigError

ways = st.one_of(
    st.just({}),
    st.integers(1, 12).map(lambda quarters: {"repeat": quarters / 4}),
    st.integers(1, 90).map(lambda k: {"choose": k}),
)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=2, max_size=60),
    way=ways,
    quarters=st.integers(1, 12),
    packs=st.sampled_from([4, 8, 12]),
    seed=st.integers(0, 3),
)
def test_every_row_as_often_as_promised_on_any_number_of_ranks(
    lengths: list[int], way: dict[str, Any], quarters: int, packs: int, seed: int
) -> None:
    def planned(world: int, epochs: float = quarters / 4) -> TrainPlan:
        return plan_of(lengths, world=world, way=way, epochs=epochs, seed=seed, global_batch_tokens=100 * packs)

    plan = planned(1)
    in_rows = plan_of(lengths, way=way, epochs=quarters / 4, seed=seed, global_batch_size=7)
    assert plan.micro_batches_per_step == packs
    order = [row for step in range(plan.num_steps) for row in plan.step_rows(step).tolist()]
    done = 0
    for number, step in enumerate(all_steps(plan)):
        full = [pack for pack in step if pack]
        assert step == [*full, *[()] * (packs - len(full))], "empty ones come last"
        assert all(sum(lengths[row] for row in pack) <= 100 for pack in full)
        assert [row for pack in full for row in pack] == plan.step_rows(number).tolist()
        done += sum(map(len, full))
        is_last = number + 1 == plan.num_steps
        assert len(full) == packs or plan.is_epoch_end(number) or is_last
        if plan.is_epoch_end(number):
            epochs = round(plan.step_epoch(number))
            taken = Counter(order[:done])
            size = plan.mixture.epoch_size
            expected = Counter(row for e in range(epochs) for row in in_rows.mixture.epoch(e).tolist())
            assert taken == expected and done == epochs * size
    assert plan.step_epoch(plan.num_steps - 1) >= quarters / 4 - 1 / min(plan.epoch_packs)  # type: ignore[attr-defined]
    for world in (2, 4):
        other = planned(world)
        assert other.digest == plan.digest and all_steps(other) == all_steps(plan)
    assert planned(1, quarters / 4 + 2).digest == plan.digest, "a prolonged run"


def test_the_digest_follows_the_batch_and_the_seed() -> None:
    way = {"choose": 45}
    plan = plan_of(list(range(1, 61)), way=way, global_batch_tokens=400, epochs=3)
    assert plan.digest != plan_of(list(range(1, 61)), way=way, global_batch_tokens=500).digest
    assert plan.digest != plan_of(list(range(1, 61)), way=way, global_batch_tokens=400, seed=1).digest
    assert plan.digest != plan_of(list(range(1, 61)), way=way, global_batch_size=8).digest


def test_packs_change_places_and_rows_from_epoch_to_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 15, 400)
    plan = plan_of(lengths, global_batch_tokens=400, epochs=2)
    half = plan.num_steps // 2
    epochs = [
        [tuple(sorted(pack)) for step in part for pack in step if pack]
        for part in (all_steps(plan)[:half], all_steps(plan)[half:])
    ]
    assert len(epochs[0]) == len(epochs[1]) and len(set(epochs[0]) & set(epochs[1])) < 3
    assert plan.is_epoch_end(half - 1) and plan.step_epoch(half - 1) == 1.0


def test_max_steps_overrides_epochs_both_ways() -> None:
    short = plan_of([30] * 30, global_batch_tokens=400, max_steps=2, epochs=5)  # 10 packs an epoch
    assert short.num_steps == 2 and short.steps_per_epoch == 3 and not short.is_epoch_end(1)
    assert short.step_epoch(1) == 0.8
    long = plan_of([30] * 30, global_batch_tokens=400, max_steps=7)
    assert [len(long.step_rows(step)) for step in range(7)] == [12, 12, 6, 12, 12, 6, 12]
    assert [long.is_epoch_end(step) for step in range(7)] == [False, False, True, False, False, True, False]
    assert plan_of([30] * 30, global_batch_tokens=400, epochs=1.5).num_steps == 5
    assert plan_of([30] * 30, global_batch_tokens=400, epochs=0.01).num_steps == 1


def test_the_arithmetic_says_what_a_step_is() -> None:
    numbers = plan_of([30] * 31, world=2, global_batch_tokens=400, epochs=1.5).arithmetic()
    assert "global_batch_size" not in numbers and numbers["global_batch_tokens"] == 400
    assert numbers["accumulation"] * 2 == numbers["micro_batches_per_step"] == 4
    assert (numbers["rows_per_epoch"], numbers["tokens_per_epoch"], numbers["packs_per_epoch"]) == (31, 930, 11)
    assert numbers["fill"] == pytest.approx(930 / 1100) and numbers["num_steps"] == 5


def test_tokens_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of([10] * 9, world=2, global_batch_tokens=700)
    assert str(caught.value) == (
        "train.global_batch_tokens: 700 tokens per step cannot be dealt to 2 devices in packs of 100 "
        "(data.max_length); expected a multiple of 200. The nearest are 600 and 800."
    )
    with pytest.raises(ConfigError, match=r"The nearest is 100\.$"):
        plan_of([10] * 9, global_batch_tokens=50)
    with pytest.raises(ConfigError, match=r"^train\.global_batch_tokens: .* this run does not pack"):
        plan_of([10] * 9, packed=False, global_batch_tokens=200)


@pytest.mark.parametrize("batch", [{"global_batch_tokens": 32 * 4096}, {"global_batch_size": 128}])
def test_ranks_side_by_side_see_as_many_pictures(batch: dict[str, int]) -> None:
    """Against packs that know nothing of pictures: in the order they come, or made of lengths alone."""
    random = np.random.default_rng(0)
    tiles = 256 * random.integers(0, 6, 3000)
    lengths = np.minimum(tiles + random.lognormal(5, 1, 3000).astype(int) + 1, 4096)
    plan = plan_of(lengths, visual=tiles, world=8, max_length=4096, **batch)

    def spread(packs: list[Any]) -> int:
        visual = np.array([sum(tiles[row] for row in pack) for pack in packs])
        return int(np.ptp(visual.reshape(-1, 8), axis=1).sum())

    now = blind = 0
    for number, step in enumerate(all_steps(plan)[:-1]):
        now += spread(step)
        if "global_batch_size" in batch:
            rows = plan.step_rows(number)
            packs = deal(lengths[rows], np.zeros(len(rows), int), plan.micro_batches_per_step, 4096)
            blind += spread([rows[pack] for pack in packs])
        else:
            blind += spread(sorted(step, key=min))
    assert now < 0.45 * blind


def test_a_million_rows_are_planned_in_seconds() -> None:
    random = np.random.default_rng(0)
    lengths = 576 + np.clip(random.lognormal(5.0, 0.7, 1_000_000), 20, 3500).astype(np.int32)
    started = time.monotonic()
    settings = config(max_length=4096, global_batch_tokens=64 * 4096)
    plan = make_plan(measured(lengths), rows_of((1_000_000, {})), settings, world=8, packed=True)
    plan.rows(8 * plan.micro_batches_per_step)
    assert time.monotonic() - started < 15
    assert plan.arithmetic()["fill"] > 0.985


@pytest.mark.parametrize("seed", range(3))
def test_no_row_of_an_uneven_epoch_is_lost_where_packs_are_counted_before(seed: int) -> None:
    """The packs of an epoch are counted from its rows in their order, and made from its rows when they are shuffled."""
    lengths = np.random.default_rng(seed).integers(5, 90, 1500).tolist()
    plan = plan_of(lengths, way={"repeat": 2.5}, epochs=3, seed=seed, global_batch_tokens=400)
    taken: Counter[int] = Counter()
    for number, step in enumerate(all_steps(plan)):
        taken.update(row for pack in step for row in pack)
        if plan.is_epoch_end(number):
            assert sum(taken.values()) == 3750 * round(plan.step_epoch(number))
            assert max(taken.values()) - min(taken.values()) <= 1
    assert sum(taken.values()) == 3 * 3750
