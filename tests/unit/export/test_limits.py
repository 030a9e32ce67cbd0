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


@pytest.mark.parametrize(
    ("largest", "one_cast", "limit"),
    [(1.0, 0.0, verify.TOLERANCE), (40.0, 0.0, 40 * verify.RELATIVE), (1.0, 0.01, 0.02), (40.0, 0.01, 0.02)],
)
def test_the_limit_grows_with_the_logits_and_with_the_cast(largest: float, one_cast: float, limit: float) -> None:
    prompts = (SimpleNamespace(origin="a"),)
    logits = [torch.tensor([[0.0, -largest]])]
    expected = verify.Expected(prompts=prompts, logits=logits, one_cast=[one_cast])  # type: ignore[arg-type]
    (one,) = verify.compare(expected, [logits[0] + 0.9 * limit])
    assert one.limit == pytest.approx(limit) and one.holds
    (one,) = verify.compare(expected, [logits[0] + 1.1 * limit])
    assert not one.holds


def test_a_prompt_that_the_folder_does_not_remember_is_named(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("official-internlm2")
    trained = open_folder(folder, MediaOptions(chat="xtuner"))
    assert verify.reads_otherwise(trained, open_folder(folder)) == ["text prompt", "picture prompt"]
    assert verify.reads_otherwise(trained, trained) == []
