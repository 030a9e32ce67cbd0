"""Drop path (stochastic depth): whole residual branches of a vision layer are left out at random while it trains.

Huang et al., 2016 (arXiv:1603.09382). As InternVL's trainer has it: the rate rises linearly from 0 at the first layer
to the given one at the last, both branches of a layer (attention, MLP) have it, each tile draws for itself, and what
stays is divided by the probability of staying, so that the mean is kept. transformers' towers have no such option;
forward hooks on the branches add it. Activation checkpointing restores the random state, and so draws the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# What transformers calls the two branches of layers whose first axis is the tile (InternViT; CLIP, SigLIP).
_BRANCHES = (("attention", "mlp"), ("self_attn", "mlp"))


def branches(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose outputs are added to the residual stream; empty where the layer is built in another way."""
    children = dict(layer.named_children())
    for names in _BRANCHES:
        if all(name in children for name in names):
            return tuple(children[name] for name in names)
    return ()


def rates(rate: float, layers: int) -> list[float]:
    """The rate of each layer: 0 at the first, `rate` at the last, in equal steps."""
    return torch.linspace(0, rate, layers, dtype=torch.float64).tolist()


def install(layers: Sequence[nn.Module], rate: float) -> None:
    """Lets the branches of these layers, in their order, be dropped in training; 0 ≤ rate < 1."""
    for layer, own in zip(layers, rates(rate, len(layers)), strict=True):
        for branch in branches(layer) if own else ():
            branch.register_forward_hook(DropPath(own))


class DropPath:
    """A forward hook; a branch's output is a tensor (tiles, tokens, width), or a tuple that begins with it."""

    def __init__(self, rate: float) -> None:
        self.keep = 1.0 - rate

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (self._dropped(output[0]), *output[1:])
        return self._dropped(output)

    def _dropped(self, output: torch.Tensor) -> torch.Tensor:
        kept = output.new_empty((output.shape[0],) + (1,) * (output.dim() - 1)).bernoulli_(self.keep)
        return (output / self.keep) * kept
