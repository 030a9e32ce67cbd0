"""Models whose position scaling looks at the longest row: what may share a batch, and that it then changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plans
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import conversation

from vlmtune.config.schema import RunConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.plan.packing import make_eval_plan, make_plan
from vlmtune.data.plan.sharing import resolve_packing, room_taken
from vlmtune.errors import ConfigError
from vlmtune.models.load import load_model, open_folder

LIMIT = 64


@pytest.fixture
def stretched(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny InternVL whose decoder scales its positions dynamically beyond 64 tokens."""
    folder = Path(shutil.copytree(tiny_folder("internvl"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = LIMIT
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_config(folder: Path, **data: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "data": {"sources": {"path": "x.jsonl"}, **data},
            "train": {"micro_batch_size": 1},
        }
    )


@pytest.mark.parametrize("max_length", [LIMIT, LIMIT + 1])
def test_packing_needs_no_short_rows(stretched: Path, max_length: int) -> None:
    opened = open_folder(stretched)
    assert opened.shared_length == LIMIT
    assert resolve_packing(run_config(stretched, max_length=max_length), opened) == (True, None)


def test_padding_beyond_the_range_is_refused(stretched: Path) -> None:
    config = run_config(stretched, max_length=LIMIT + 1, packing=False)
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 2})})
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: rows of up to 65 tokens cannot share a batch"):
        resolve_packing(config, open_folder(stretched))
    data = config.data.model_copy(update={"max_length": LIMIT})
    assert resolve_packing(config.model_copy(update={"data": data}), open_folder(stretched)) == (False, None)


def test_long_rows_take_a_whole_pack() -> None:
    lengths = np.array([3, LIMIT, LIMIT + 1, 200, 100], np.int32)
    assert room_taken(lengths, 150, LIMIT).tolist() == [3, LIMIT, 150, 200, 150]  # 200 is too long for this run anyway
    for same in (room_taken(lengths, 150, None), room_taken(lengths, LIMIT, LIMIT), room_taken(lengths, 300, 200)):
        assert same is lengths


@pytest.mark.parametrize("size", [{"global_batch_size": 8}, {"global_batch_tokens": 1024}])
@given(lengths=st.lists(st.integers(1, 256), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_pack_with_a_long_row_holds_nothing_else(size: dict[str, int], lengths: list[int]) -> None:
    """LIMIT is 64; rows up to it fill the other packs together."""
    config = plans.config(max_length=256, **size)
    corpus = plans.rows_of((len(lengths), {}))
    plan = make_plan(plans.measured(lengths), corpus, config, world=1, packed=True, shared_length=LIMIT)
    evaluated = make_eval_plan(plans.measured(lengths), corpus, config, world=1, packed=True, shared_length=LIMIT)
    for one in (plan, evaluated):
        packs = [rows for i in range(one.num_steps * one.micro_batches_per_step) if (rows := one.rows(i))]
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert all(len(pack) == 1 or max(lengths[row] for row in pack) <= LIMIT for pack in packs)
        assert all(sum(lengths[row] for row in pack) <= 256 for pack in packs)


def test_packs_within_the_range_equal_single_rows(stretched: Path) -> None:
    opened = open_folder(stretched)
    model = load_model(opened, dtype=torch.float64).eval()
    rows = [
        encode(
            conversation(("user", [f"How many {word}?"]), ("assistant", [f"It is {word}."])),
            opened,
        )
        for word in ("seven", "small dogs", "people standing at the menu")
    ]
    assert sum(row.num_tokens for row in rows) > LIMIT >= max(row.num_tokens for row in rows)

    def logits(chosen: list) -> torch.Tensor:
        batch = collate([chosen], opened, stand_in=False)
        with torch.no_grad():
            return model(**batch.inputs).logits.reshape(len(batch.targets), -1)

    torch.testing.assert_close(logits(rows), torch.cat([logits([row]) for row in rows]), rtol=1e-9, atol=1e-10)


def test_the_danger_is_real(stretched: Path) -> None:
    """A long neighbour does change a short row; without this, the rule above would guard nothing."""
    opened = open_folder(stretched)
    model = load_model(opened, dtype=torch.float64).eval()
    short, long = (
        encode(conversation(("user", [text]), ("assistant", ["yes"])), opened)
        for text in ("How many?", "How many people? " * 20)
    )
    assert long.num_tokens > LIMIT

    def first(chosen: list) -> torch.Tensor:
        batch = collate([chosen], opened, stand_in=False)
        with torch.no_grad():
            return model(**batch.inputs).logits.reshape(len(batch.targets), -1)[0]

    assert (first([short]) - first([short, long])).abs().max() > 1e-4
