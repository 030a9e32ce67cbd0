"""How far an export may be from the trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmtune.config.schema import MediaOptions
from vlmtune.export import verify
from vlmtune.models.load import open_folder


@pytest.mark.parametrize(("one_cast", "limit"), [(0.0, verify.TOLERANCE), (0.01, 0.02)])
def test_the_limit_is_fixed_or_twice_what_one_merge_and_cast_make(one_cast: float, limit: float) -> None:
    prompts = (SimpleNamespace(origin="a"),)
    logits = [torch.tensor([[0.0, -40.0]])]
    expected = verify.Expected(prompts=prompts, logits=logits, one_cast=[one_cast])  # type: ignore[arg-type]
    (one,) = verify.compare(expected, [logits[0] + 0.9 * limit])
    assert one.limit == limit and one.holds
    (one,) = verify.compare(expected, [logits[0] + 1.1 * limit])
    assert not one.holds


@pytest.mark.parametrize(
    ("change", "dtype", "counted"),
    [
        (1e-3, torch.float32, True),
        (1e-2, torch.float32, False),
        (1e-2, torch.bfloat16, True),
        (float("nan"), torch.float32, False),
    ],
)
def test_a_merge_in_float32_may_only_round(change: float, dtype: torch.dtype, counted: bool) -> None:
    logits = torch.tensor([[0.0, -40.0]])
    found = verify.rounding(logits, logits + change, dtype)
    assert found == (pytest.approx(change, rel=1e-2) if counted else 0.0)


def test_a_prompt_that_the_folder_does_not_remember_is_named(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("official-internlm2")
    trained = open_folder(folder, MediaOptions(chat="xtuner"))
    assert verify.reads_otherwise(trained, open_folder(folder)) == ["text prompt", "picture prompt"]
    assert verify.reads_otherwise(trained, trained) == []
