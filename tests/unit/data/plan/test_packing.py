"""The plan's promises, for any lengths, repeats, worlds and batch sizes."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import all_steps, config, measured, plan_of, rows_of

from vlmtune.config.sources import Mixed
from vlmtune.data.plan.mixture import epoch_counts
from vlmtune.data.plan.packing import make_eval_plan, make_plan
from vlmtune.data.prepared.measure import BadRow
from vlmtune.errors import ConfigError, DataError


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        pack = next((pack for pack in range(len(room)) if room[pack] >= length), None)
        if pack is None:
            room.append(capacity - length)
        else:
            room[pack] -= length
    return len(room)


lengths_of_rows = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_of_rows,
    size=st.integers(1, 20),
    quarters=st.integers(1, 12),
    world=st.integers(1, 4),
    packed=st.booleans(),
)
def test_every_row_exactly_as_often_as_promised(
    lengths: list[int], size: int, quarters: int, world: int, packed: bool
) -> None:
    if not packed:
        size *= world
    plan = plan_of(lengths, world=world, packed=packed, epochs=quarters / 4, global_batch_size=size)
    assert plan.micro_batches_per_step % world == 0
    steps = all_steps(plan)
    seen: Counter[int] = Counter()
    for number, step in enumerate(steps):
        rows = [row for micro in step for row in micro]
        assert sorted(rows) == sorted(plan.step_rows(number).tolist())
        is_last_of_epoch = (number + 1) % plan.steps_per_epoch == 0 or number + 1 == len(steps)
        assert len(rows) == size or (is_last_of_epoch and 0 < len(rows) <= size)
        for micro in step:
            if packed:
                assert sum(lengths[row] for row in micro) <= 100
            else:
                assert len(micro) <= 1
        seen.update(rows)
        if plan.is_epoch_end(number):
            assert set(seen.values()) == {round(plan.step_epoch(number))} and len(seen) == len(lengths)
    whole, part = divmod(quarters, 4)
    more = int(part * len(lengths) / 4 + 0.5) if whole else max(1, int(part * len(lengths) / 4 + 0.5))
    assert seen.total() == whole * len(lengths) + (more if part else 0)
    assert all(whole <= seen[row] <= whole + 1 for row in range(len(lengths)))
    assert plan.step_epoch(plan.num_steps - 1) == pytest.approx(seen.total() / len(lengths))


@settings(max_examples=100, deadline=None)
@given(
    lengths=lengths_of_rows, worlds=st.permutations([1, 2, 3, 4, 8]), seed=st.integers(0, 5), micro=st.integers(1, 3)
)
def test_step_to_rows_knows_nothing_of_world_packing_or_micro_batches(
    lengths: list[int], worlds: list[int], seed: int, micro: int
) -> None:
    plans = [plan_of(lengths, world=world, global_batch_size=24, seed=seed, epochs=2) for world in worlds[:3]]
    plans.append(
        plan_of(lengths, world=4, packed=False, micro_batch_size=micro, global_batch_size=24, seed=seed, epochs=2)
    )
    for plan in plans[1:]:
        assert plan.digest == plans[0].digest
        assert plan.num_steps == plans[0].num_steps
        assert all(np.array_equal(plan.step_rows(i), plans[0].step_rows(i)) for i in range(plan.num_steps))
    assert plan_of(lengths, global_batch_size=24, seed=seed, epochs=3).digest == plans[0].digest, "a prolonged run"
    assert plan_of(lengths, global_batch_size=24, seed=seed + 1, epochs=2).digest != plans[0].digest
    assert plan_of(lengths, global_batch_size=23, seed=seed, epochs=2).digest != plans[0].digest


way = st.one_of(
    st.just({}),
    st.integers(1, 8).map(lambda quarters: {"repeat": quarters / 2}),
    st.integers(1, 30).map(lambda k: {"choose": k}),
    st.integers(1, 4).map(lambda weight: {"weight": weight}),
)


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(2, 12), way), min_size=1, max_size=3),
    epochs=st.integers(1, 3),
    batch=st.sampled_from([{"global_batch_size": 8}, {"global_batch_tokens": 400}]),
    seed=st.integers(0, 3),
)
def test_mixed_sources_counted_over_the_micro_batches(
    sources: list[tuple[int, dict[str, float]]], epochs: int, batch: dict[str, int], seed: int
) -> None:
    """Every source gives its count in each epoch, evenly over rows and epochs, however the run is laid out."""
    sizes = [size for size, _ in sources]
    lengths = np.random.default_rng(seed).integers(1, 100, sum(sizes))
    counts = epoch_counts(sizes, [Mixed(**one) for _, one in sources])
    if not all(counts):
        return
    settings = config(epochs=epochs, seed=seed, **batch)
    steps = []
    layouts = [(1, True), (2, True), (4, True)]
    layouts += [(1, False), (4, False)] if "global_batch_size" in batch else []
    for world, packed in layouts:
        plan = make_plan(measured(lengths), rows_of(*sources), settings, world=world, packed=packed)
        steps.append([sorted(row for micro in step for row in micro) for step in all_steps(plan)])
        assert steps[-1] == steps[0]
        seen: Counter[int] = Counter()
        for number, step in enumerate(steps[-1]):
            seen.update(step)
            if plan.is_epoch_end(number):
                done = round(plan.step_epoch(number))
                first = 0
                for size, count in zip(sizes, counts, strict=True):
                    times = [seen[row] for row in range(first, first + size)]
                    assert sum(times) == count * done and max(times) - min(times) <= 1
                    first += size
        assert seen.total() == epochs * sum(counts)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_rows, size=st.integers(1, 16), world=st.integers(1, 4))
def test_packs_per_step_are_the_fewest_that_fit_and_balanced(lengths: list[int], size: int, world: int) -> None:
    plan = plan_of(lengths, world=world, global_batch_size=size, epochs=2)
    needed = max(
        first_fit_decreasing([lengths[row] for row in plan.step_rows(step)], 100) for step in range(plan.num_steps)
    )
    assert plan.micro_batches_per_step == -(-needed // world) * world


@pytest.mark.parametrize(
    "options",
    [{"global_batch_size": 8}, {"global_batch_tokens": 400}, {"global_batch_tokens": 400, "way": {"choose": 45}}],
)
def test_any_order_of_asking_gives_the_same_rows(options: dict[str, Any]) -> None:
    plan = plan_of(list(range(1, 61)), epochs=3, **options)
    total = plan.num_steps * plan.micro_batches_per_step
    forward = [plan.rows(i) for i in range(total)]
    copy = pickle.loads(pickle.dumps(plan))
    shuffled = np.random.default_rng(0).permutation(total)
    assert [copy.rows(int(i)) for i in shuffled] == [forward[i] for i in shuffled]
    assert copy.digest == plan.digest
    assert all(isinstance(row, int) for rows in forward for row in rows)
    with pytest.raises(IndexError):
        plan.rows(total)


def test_max_steps_overrides_epochs_both_ways() -> None:
    short = plan_of([10] * 20, global_batch_size=8, max_steps=2, epochs=5)
    assert short.num_steps == 2 and short.steps_per_epoch == 3 and not short.is_epoch_end(1)
    long = plan_of([10] * 20, global_batch_size=8, max_steps=7, epochs=1)
    assert long.num_steps == 7
    assert [len(long.step_rows(step)) for step in range(7)] == [8, 8, 4, 8, 8, 4, 8]
    assert [long.is_epoch_end(step) for step in range(7)] == [False, False, True, False, False, True, False]
    assert [long.step_epoch(step) for step in range(3)] == [0.4, 0.8, 1.0]
    with pytest.raises(IndexError):
        long.rows(7 * long.micro_batches_per_step)


def test_an_almost_whole_last_epoch_is_not_a_whole_one() -> None:
    plan = plan_of([10] * 100, global_batch_size=8, epochs=1.99)
    assert plan.num_steps == 26 and len(plan.step_rows(25)) == 3 and not plan.is_epoch_end(25)


def test_padded_micro_batches_are_grouped_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 64).tolist()
    plan = plan_of(lengths, packed=False, micro_batch_size=4, global_batch_size=32)
    grouped = sum(4 * max(lengths[row] for row in micro) for step in all_steps(plan) for micro in step)
    drawn = sum(
        4 * max(lengths[row] for row in plan.step_rows(step)[k : k + 4]) for step in range(2) for k in range(0, 32, 4)
    )
    assert grouped < 0.75 * drawn
    assert all(len(micro) == 4 for step in all_steps(plan) for micro in step)


def test_the_last_padded_step_is_spread_over_the_ranks() -> None:
    plan = plan_of([10] * 21, packed=False, micro_batch_size=4, global_batch_size=16, world=2)
    assert [len(micro) for micro in all_steps(plan)[1]] == [2, 1, 1, 1]


def test_batch_sizes_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of([10] * 9, packed=False, micro_batch_size=3, global_batch_size=16, world=2)
    assert str(caught.value) == (
        "train.global_batch_size: 16 rows per step cannot be dealt to 2 devices in micro batches of 3; expected a "
        "multiple of 6. The nearest are 12 and 18."
    )
    with pytest.raises(ConfigError, match=r"The nearest is 32\.$"):
        plan_of([10] * 9, packed=False, micro_batch_size=16, global_batch_size=16, world=2)


def test_bad_rows_stop_the_run_and_long_rows_follow_the_policy() -> None:
    rows = rows_of((3, {}))
    bad = [BadRow("a.jsonl:3", "it is odd.", 2), BadRow("a.jsonl:1", "the answer is empty. Write it.", 0)]
    with pytest.raises(DataError, match=r"^a\.jsonl:1: the answer is empty\. Write it\. 1 more row is bad"):
        make_plan(measured([10, 10, 10], bad), rows, config(), world=1, packed=True)
    with pytest.raises(
        DataError, match=r"^a\.jsonl:2: the row has 101 tokens; expected at most 100 \(data\.max_length"
    ):
        plan_of([10, 101, 10])
    plan = plan_of([10, 101, 10], data={"too_long": "drop"}, way={"repeat": 2.0})
    assert sorted(plan.step_rows(0).tolist()) == [0, 0, 2, 2]
    with pytest.raises(DataError, match="no row is left"):
        plan_of([101], data={"too_long": "drop"})


def test_arithmetic_adds_up() -> None:
    plan = plan_of([30] * 40, world=2, global_batch_size=10, epochs=1.5)
    numbers = plan.arithmetic()
    assert numbers["accumulation"] * 2 == numbers["micro_batches_per_step"] == 4
    assert numbers["fill"] == pytest.approx(1200 / (4 * 4 * 100))
    assert (numbers["rows_per_epoch"], numbers["tokens_per_epoch"], numbers["num_steps"]) == (40, 1200, 6)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_rows, world=st.integers(1, 4), packed=st.booleans(), micro=st.integers(1, 4))
def test_evaluation_takes_each_row_once_longest_first(lengths: list[int], world: int, packed: bool, micro: int) -> None:
    rows = rows_of((len(lengths), {}))
    plan = make_eval_plan(measured(lengths), rows, config(micro_batch_size=micro), world=world, packed=packed)
    batches = [plan.rows(i) for i in range(plan.num_steps * plan.micro_batches_per_step)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) % world == 0 and len([b for b in batches if not b]) < world
    longest = [max(lengths[row] for row in batch) for batch in batches if batch]
    assert longest == sorted(longest, reverse=True)
    if packed:
        assert all(sum(lengths[row] for row in batch) <= 100 for batch in batches)
    else:
        assert all(len(batch) <= micro for batch in batches)


def test_evaluation_refuses_mixing() -> None:
    for way, text in (({"repeat": 2.0}, "repeat 2"), ({"choose": 1}, "choose 1"), ({"weight": 1}, "weight 1")):
        with pytest.raises(ConfigError, match=rf"^data\.eval: the eval source s0 has {text}; expected no `"):
            make_eval_plan(measured([1, 1]), rows_of((2, way)), config(), world=1, packed=True)


def test_bad_rows_are_dropped_up_to_a_share_and_counts_are_of_the_rest() -> None:
    lengths = np.full(200, 10)
    lengths[[3, 150]] = 0
    bad = [BadRow("a.jsonl:151", "it is odd.", 150), BadRow("a.jsonl:4", "it is odd.", 3)]
    rows = rows_of((100, {"repeat": 1.5}), (100, {"choose": 150}))

    def planned(share: float) -> list[int]:
        settings = config(data={"bad_rows": "drop", "max_bad_share": share}, global_batch_size=400)
        return make_plan(measured(lengths, bad), rows, settings, world=1, packed=True).step_rows(0).tolist()

    taken = planned(0.01)
    assert sum(row < 100 for row in taken) == 149 and sum(row >= 100 for row in taken) == 150
    assert not {3, 150} & set(taken) and set(taken) == set(range(200)) - {3, 150}
    with pytest.raises(DataError) as caught:
        planned(0.009)
    assert str(caught.value).startswith(
        "data.max_bad_share: 2 of 200 rows are bad, 1.00%; the first is a.jsonl:4; expected at most 0.90%"
    )


def test_a_million_rows_are_planned_in_seconds() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.3, 0.8, 1_000_000), 4095).astype(np.int32) + 1
    rows = rows_of((500_000, {}), (500_000, {"repeat": 1.5}))
    started = time.monotonic()
    plan = make_plan(measured(lengths), rows, config(max_length=4096), world=8, packed=True)
    assert time.monotonic() - started < 15
    assert plan.micro_batches_per_step == 8 and plan.num_steps == 78_125
