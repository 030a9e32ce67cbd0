"""Side inputs reach their module, stay until the next call, and go when the next batch has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmtune.nn.side_inputs import SideInputs, hand_over


class Shift(SideInputs):
    names = ("shift",)
    shift: Any = None

    def take(self, inputs: Mapping[str, Any]) -> None:
        self.shift = inputs.get("shift")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.shift is None else x + self.shift


def test_a_module_gets_its_own_and_forward_the_rest() -> None:
    inner = Shift()
    model = nn.Sequential(nn.Linear(2, 2), inner)
    inputs = {"x": torch.ones(1, 2), "shift": torch.tensor(3.0)}
    rest = hand_over(model, inputs)
    assert set(rest) == {"x"} and set(inputs) == {"x", "shift"}
    assert torch.equal(model(rest["x"]), model[0](rest["x"]) + 3.0)
    hand_over(model, {"x": torch.ones(1, 2)})
    assert inner.shift is None


def test_a_model_without_such_modules_keeps_everything() -> None:
    inputs = {"x": 1, "shift": 2}
    assert hand_over(nn.Linear(1, 1), inputs) == inputs
