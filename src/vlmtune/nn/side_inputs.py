"""Inputs of a model that its forward has no argument for: what a tower must know of each picture, masks, embeddings.

They travel in a batch like all others. Before a forward (or a `generate`) they are handed to the modules that ask for
them, and stay there until the next call, because activation checkpointing runs parts of the forward again later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class SideInputs(nn.Module):
    """A module that is given some inputs of a batch before the model runs.

    names: of the inputs; each belongs to one module of a model, and to copies of it (PEFT trains one beside the old).
    """

    names: tuple[str, ...] = ()

    def take(self, inputs: Mapping[str, Any]) -> None:
        """The inputs under `names` that this batch has; the others are absent, and those of the last batch are void."""


def hand_over(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the side inputs of a batch to their modules, and returns the others: arguments of the model's forward.

    Args:
        model: bare or wrapped (DDP, FSDP, PEFT).
    """
    taken: set[str] = set()
    for module in model.modules():
        if isinstance(module, SideInputs):
            module.take({name: inputs[name] for name in module.names if name in inputs})
            taken.update(module.names)
    return {name: value for name, value in inputs.items() if name not in taken}
