"""The weights that a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import make_config

from vlmtune.config.schema import RunConfig
from vlmtune.models.load import open_folder
from vlmtune.train import weights


@pytest.fixture
def config(tiny_folder: Callable[[str], Path], tmp_path: Path) -> RunConfig:
    tuning = {"method": "lora", "rank": 4, "targets": ["language"], "train": []}
    return make_config(tmp_path, tiny_folder("llava"), tmp_path / "rows.jsonl", tuning=tuning)


def adapter(config: RunConfig) -> dict[str, torch.Tensor]:
    opened = open_folder(config.model.path, config.media)
    model = weights.load(config, opened, None, partitioned=False)
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_A." in name}


def test_adapters_begin_alike_whatever_was_drawn_before(config: RunConfig) -> None:
    """Under ZeRO-3 CLIP's class draws its class token before the weights come; elsewhere loading draws nothing."""
    torch.manual_seed(1)
    one = adapter(config)
    torch.manual_seed(2)
    other = adapter(config)
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    assert not any(torch.equal(one[name], tensor) for name, tensor in adapter(seeded).items())
