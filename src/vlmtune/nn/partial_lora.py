"""Partial LoRA: a low-rank update of a Linear layer at the positions of pictures only.

Source: InternLM-XComposer2 (arXiv 2401.16420), section 3.2. The update belongs to the model, not to an adapter that
training puts on it: it is never merged, because text passes through the same layer without it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import dropout, linear


class PartialLoRA(nn.Module):
    """Stands beside a Linear layer, whose output it adds to: y[image] += scale · B A x[image].

    A (rank, in) and B (out, rank) are parameters of its own and no Linear layers, so that adapters, quantisation and
    merging, which look for those, leave them alone.

    Args:
        scale: alpha ÷ rank.
        dropout: of x, in training.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x: torch.Tensor, y: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: (B, L, in), what the layer got.
            y: (B, L, out), what it gave.
            image_mask: (B, L) boolean. One without any True still runs the update, on nothing: every process calls
                every module equally often, and A and B get zeros as gradient, as in the reference. None leaves it out.

        Returns:
            (B, L, out).
        """
        if image_mask is None:
            return y
        chosen = dropout(x[image_mask], self.dropout, self.training)
        update = linear(linear(chosen, self.A), self.B) * self.scale
        rows = image_mask.flatten().nonzero().flatten()
        return y.flatten(0, 1).index_add(0, rows, update.to(y.dtype)).view_as(y)
