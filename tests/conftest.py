"""Fixtures shared by all tests: tiny models, adapters on them, and a few rows with pictures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import hypothesis
import numpy as np
import PIL.Image
import pytest

# The gate gives the same verdict twice; `pytest --hypothesis-profile=search` looks for new examples.
hypothesis.settings.register_profile("gate", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile("gate")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(kind)`: the folder of a tiny random model, made once per session: a kind of transformers' own,
    `official-<decoder>` (InternVL), or one of InternLM-XComposer2's."""
    import official_models
    import xcomposer2_models
    from tiny import save_tiny

    made: dict[str, Path] = {}

    def make(kind: str, into: Path) -> Path:
        if kind in xcomposer2_models.KINDS:
            return xcomposer2_models.official_folder(kind, into)
        if kind in xcomposer2_models.NATIVE:
            return xcomposer2_models.native_folder(folder(kind.removesuffix("-native")), into)
        if kind.startswith("official-"):
            return official_models.official_folder(kind.removeprefix("official-"), into)
        return save_tiny(kind, into)

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind, tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def adapter_folder(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`adapter_folder(kind, method)`: a PEFT adapter on language (rank 4) and vision (rank 2), the projector in full.

    Its weights are random and large enough that forgetting one of them shows.
    """
    import torch

    from vlmtune.config.schema import LoraTuning
    from vlmtune.models.load import load_model, open_folder
    from vlmtune.tuning.adapters import prepare

    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, method: str) -> Path:
        if (kind, method) not in made:
            opened = open_folder(tiny_folder(kind))
            tuning = LoraTuning(
                method=method,  # type: ignore[arg-type]
                rank=4,
                ranks={"vision": 2},
                targets=("language", "vision"),
                train=("projector",),
            )
            torch.manual_seed(1)  # the first values of an adapter are random as well
            model = prepare(load_model(opened), opened, tuning)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn_like(parameter)
            made[kind, method] = tmp_path_factory.mktemp("adapters") / f"{kind}-{method}"
            model.save_pretrained(made[kind, method])
        return made[kind, method]

    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows: one and two turns, no, one and two pictures of different sizes."""
    folder = tmp_path_factory.mktemp("rows")
    noise = np.random.default_rng(0)
    for i in range(10):
        pixels = noise.integers(0, 255, (40 + 7 * i, 60, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    rows = []
    for i in range(10):
        pictures = [f"{i}.png", "0.png", "1.png"][: i % 3]
        turns = [
            {"from": "human", "value": "<image>\n" * len(pictures) + f"Which digit is this ({i})?"},
            {"from": "gpt", "value": f"It is a {i}."},
        ]
        if i % 2:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes, 数字"}]
        rows.append({"id": f"row-{i}", "image": pictures or None, "conversations": turns})
    file = folder / "val.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
