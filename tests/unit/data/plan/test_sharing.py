"""Models whose position scaling looks at the longest row: what may share a batch, and that it then changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rows import conversation

from vlmtune.config.schema import RunConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.plan.sharing import resolve_packing
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


def test_only_rows_within_the_range_may_share(stretched: Path) -> None:
    opened = open_folder(stretched)
    assert opened.shared_length == LIMIT
    assert resolve_packing(run_config(stretched, max_length=LIMIT), opened) == (True, None)
    packed, reason = resolve_packing(run_config(stretched, max_length=LIMIT + 1), opened)
    assert not packed and reason is not None and "64 tokens" in reason


def test_padding_beyond_the_range_is_refused(stretched: Path) -> None:
    config = run_config(stretched, max_length=LIMIT + 1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 2})})
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: rows of up to 65 tokens cannot share a batch"):
        resolve_packing(config, open_folder(stretched))


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
