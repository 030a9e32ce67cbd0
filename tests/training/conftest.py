"""One tiny model and one set of rows for the tests of training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from official_models import official_folder
from runs import write_rows


@pytest.fixture(scope="session")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("internvl")


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`official(decoder)`: a tiny official InternVL folder, made once per session."""
    made: dict[str, Path] = {}

    def folder(decoder: str) -> Path:
        if decoder not in made:
            made[decoder] = official_folder(decoder, tmp_path_factory.mktemp("official") / decoder)
        return made[decoder]

    return folder


@pytest.fixture(scope="session")
def base_folder(tiny_folder: Callable[[str], Path], official: Callable[[str], Path]) -> Callable[[str], Path]:
    """`base_folder(kind)`: a tiny transformers folder, or for ``official-DECODER`` an official InternVL one."""
    return lambda kind: official(kind.removeprefix("official-")) if kind.startswith("official-") else tiny_folder(kind)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows, 3 of them without a picture."""
    return write_rows(tmp_path_factory.mktemp("rows"), num=12, text_only=3)


@pytest.fixture(scope="session")
def eval_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("eval_rows"), num=5, text_only=1, seed=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums over threads come in an order of their own; bitwise comparisons need one."""
    torch.set_num_threads(1)
