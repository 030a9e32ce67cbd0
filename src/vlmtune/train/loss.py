"""Token-weighted cross-entropy: a sum over trained tokens, divided once by their global count."""

from __future__ import annotations

import torch
from torch.nn import functional


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy in float32.

    Args:
        logits: (n, V) or (1, n, V), any floating dtype, at the trained positions only.
        targets: int64 (n,), the token that each position should predict.

    Returns:
        float32 scalar; an exact 0 that still hangs on the graph when n is 0, so that every rank runs its backward pass.
    """
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if not len(targets):
        return logits.sum()
    return functional.cross_entropy(logits, targets, reduction="sum")
