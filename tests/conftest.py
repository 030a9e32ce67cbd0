"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import hypothesis
import pytest

# The gate gives the same verdict twice; `pytest --hypothesis-profile=search` looks for new examples.
hypothesis.settings.register_profile("gate", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile("gate")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(kind)`: the folder of a tiny random model, made once per session; `official-<decoder>` as well."""
    from official_models import official_folder
    from tiny import save_tiny

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            into = tmp_path_factory.mktemp("models") / kind
            official = kind.removeprefix("official-")
            made[kind] = save_tiny(kind, into) if official == kind else official_folder(official, into)
        return made[kind]

    return folder
