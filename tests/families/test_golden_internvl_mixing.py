"""How often rows come, and in which order: the recorded rules of the official loader and of XTuner beside ours.

Verdicts, by what a record holds:

=========  =========================================================  ================================================
equal      a whole number of times, and the official count is it      every row so often, and no row more than another
mended     less than once: the first lines (XTuner: unseeded ones,    a seeded sample of the count rounded half up,
           the count cut off)                                         other rows in the next epoch
mended     more than once with a fraction: refused, or the fraction   the exact count
           is lost
refused    zero or less, or so little that it rounds to no row        our error names the entry or the source
mended     the order of an epoch: that of a list shuffled once, or    the same rows in an order drawn from the run's
           grouped by estimated lengths for one number of processes   seed, for any number of processes
=========  =========================================================  ================================================
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import golden
import numpy as np
import pytest
from plans import plan_of

from vlmtune.config.schema import SourceConfig, XTunerLists
from vlmtune.data.plan.mixture import Mixture, make_mixture
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.data.rows.lists import expand
from vlmtune.errors import VlmtuneError

pytestmark = pytest.mark.golden

Verdict = Literal["equal", "mended", "refused"]

_PLACE = "internvl/dataset"
_TABLES = ("official_repeat_time", "xtuner_repeat_time")
_ORDERS = ("official_length_grouped_sampler", "xtuner_length_grouped_indices")


def _file() -> Path:
    return golden.root() / _PLACE / "mixing_facts.json"


@cache
def _facts() -> Any:
    return json.loads(_file().read_text(encoding="utf-8")) if _file().exists() else {}


def _rows(table: str) -> Iterator[dict[str, Any]]:
    for row in _facts().get(table, {"rows": ()})["rows"]:
        yield dict(zip(_facts()[table]["columns"], row, strict=True))


def _exact(row: dict[str, Any]) -> int:
    """The count as on paper, rounded half up."""
    return math.floor(row.get("n_lines", row.get("n_items")) * Fraction(str(row["repeat_time"])) + Fraction(1, 2))


def _verdict(row: dict[str, Any]) -> Verdict:
    times, official = row["repeat_time"], row["resulting_count_or_error"]
    if _exact(row) < 1:
        return "refused"
    return "equal" if times >= 1 and times == int(times) and official == _exact(row) else "mended"


def _cases() -> list[Any]:
    return [
        pytest.param(table, row, id=golden.name(_file(), table, str(number)))
        for table in _TABLES
        for number, row in enumerate(_rows(table))
    ]


def _mixed(table: str, count: int, times: float, folder: Path) -> Mixture:
    """What our program makes of an InternVL meta file, or of XTuner's lists, with one source of `count` rows."""
    annotation = folder / "rows.jsonl"
    annotation.touch()
    if table.startswith("xtuner"):
        (listed,) = expand([XTunerLists(data_paths=(str(annotation),), repeat_times=(times,))])
    else:
        meta = folder / "meta.json"
        meta.write_text(json.dumps({"a": {"root": "", "annotation": annotation.name, "repeat_time": times}}))
        (listed,) = expand([SourceConfig(path=str(meta))])
    return make_mixture(np.ones(count, bool), [count], [listed.source], ["a"], seed=0)


@pytest.mark.parametrize(("table", "row"), _cases())
def test_repeat_times(table: str, row: dict[str, Any], tmp_path: Path) -> None:
    count, times = row.get("n_lines", row.get("n_items")), row["repeat_time"]
    if _verdict(row) == "refused":
        with pytest.raises((VlmtuneError, ValueError), match=r"repeat"):
            _mixed(table, count, times, tmp_path)
        return
    mixture = _mixed(table, count, times, tmp_path)
    taken = Counter(mixture.taken(0).tolist())
    if _verdict(row) == "equal":
        assert taken == dict.fromkeys(range(count), int(times))
        return
    assert mixture.epoch_size == _exact(row)
    assert set(taken.values()) <= {math.floor(times), math.ceil(times)}
    expected = row.get("count_a_user_would_expect")
    assert expected is None or 0 <= mixture.epoch_size - expected <= 1  # it cuts off where ours rounds
    assert Counter(_mixed(table, count, times, tmp_path).taken(0).tolist()) == taken
    epochs = math.ceil(count / mixture.epoch_size)
    assert {row for epoch in range(epochs) for row in mixture.taken(epoch).tolist()} == set(range(count))


def _shuffled() -> dict[str, list[int]]:
    return _facts().get("official_order_after_shuffle", {"orders": {}})["orders"]


@pytest.mark.parametrize("key", [pytest.param(key, id=golden.name(_file(), key)) for key in _shuffled()])
def test_the_order_of_an_epoch(key: str, tmp_path: Path) -> None:
    said = dict(part.split("=") for part in key.split(","))
    count, times = int(said["N"]), float(said["repeat_time"])
    mixture = _mixed("official", count, times, tmp_path)
    ours, again, next_ = (mixture.epoch(epoch).tolist() for epoch in (0, 0, 1))
    assert ours == again and ours != next_
    if times >= 1:
        assert sorted(ours) == sorted(_shuffled()[key])
    else:
        assert max(_shuffled()[key]) < len(_shuffled()[key]), "officially the first lines"
        assert len(set(ours)) == len(ours) == _exact({"n_lines": count, "repeat_time": times})


def _grouped() -> list[Any]:
    return [
        pytest.param(table, key, id=golden.name(_file(), table, key))
        for table in _ORDERS
        for key in _facts().get(table, {"indices": {}})["indices"]
    ]


def _numbers(key: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (part.partition("=") for part in key.split(",")) if value}


def _plan(lengths: Sequence[int], batch: int, world: int, seed: int) -> TrainPlan:
    data = {"packing": False, "group_by_length": True}
    longest = max(8, *lengths)
    return plan_of(
        lengths, world=world, packed=False, data=data, max_length=longest, global_batch_size=batch, seed=seed
    )


def _padding(order: Sequence[int], lengths: np.ndarray, batch: int) -> int:
    steps = [lengths[list(order[start : start + batch])] for start in range(0, len(order), batch)]
    return sum(int(step.max()) * len(step) - int(step.sum()) for step in steps)


@pytest.mark.parametrize(("table", "key"), _grouped())
def test_the_order_by_length(table: str, key: str) -> None:
    facts, said = _facts()[table], _numbers(key)
    lengths = np.abs(facts.get("lengths", facts.get("modality_lengths")))
    world = said.get("world_size", 1)
    batch = said.get("group_batch_size", said.get("batch_size", 1) * world)
    plan = _plan(lengths.tolist(), batch, world, said["seed"])
    ours = [row for step in range(plan.num_steps) for row in plan.step_rows(step).tolist()]
    assert sorted(ours) == sorted(facts["indices"][key]) == list(range(len(lengths)))
    for other in {1, batch} | ({2} if batch % 2 == 0 else set()):
        assert _plan(lengths.tolist(), batch, other, said["seed"]).digest == plan.digest
    # Sorting inside a window takes away padding that the same shuffled rows have, whatever their lengths.
    shuffled = plan.mixture.epoch(0).tolist()
    assert _padding(ours, lengths, batch) <= _padding(shuffled, lengths, batch)
    if len(lengths) // batch >= 8:  # two steps or more are sorted together
        assert _padding(ours, lengths, batch) < _padding(shuffled, lengths, batch)


def test_the_verdicts() -> None:
    counts = {table: Counter(map(_verdict, _rows(table))) for table in _TABLES if table in _facts()}
    if not counts:
        pytest.skip(f"no mixing facts in {golden.root()}")
    orders = len(_shuffled()) + len(_grouped())
    print({table: dict(found) for table, found in counts.items()}, f"orders mended: {orders}")
    assert all(found["equal"] for found in counts.values())
