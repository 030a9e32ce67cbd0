"""Token merging (ToMe): pairs of alike tokens of a picture become one, their mean weighted by what each stands for.

Bolya et al., 2023 (arXiv:2210.09461), as AuroraCap uses it: the tokens at even positions look for the odd one with the
most similar key (cosine); the `r` closest pairs are merged in every layer. What stays is laid down as the even
positions that were not merged, then the odd ones, so order means no place any more. Functions without state; shapes
begin with n pictures of T tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


def merged_per_layer(height: int, width: int, *, patch: int, layers: int, ratio: float) -> int:
    """Tokens to merge in each layer of a picture of these sizes in pixels: AuroraCap's r, whole patches or not.

    ratio: share of tokens that would be kept after all layers, 0 to 1. A feature layer before the last keeps more, and
    no layer merges more than half of its tokens (`kept_tokens`).
    """
    return int(height * width / patch**2 * (1 - ratio) / layers)


def merged_tokens(tokens: int, r: int, *, protect_first: bool = True) -> int:
    """How many of T tokens one layer really merges: r, but never more than every second one."""
    return min(r, (tokens - protect_first) // 2)


def kept_tokens(num_patches: int, r: int, *, merges: int) -> int:
    """Tokens left of `num_patches` after so many layers; neither number counts the protected first token."""
    for _ in range(merges):
        num_patches -= merged_tokens(num_patches + 1, r)
    return num_patches


@dataclass(frozen=True, slots=True)
class Matching:
    """Which tokens are merged. All are int64 indices: among the even tokens, or (`into`) among the odd ones."""

    kept: torch.Tensor
    """(n, ⌈T/2⌉ - r): even tokens that stay."""
    merged: torch.Tensor
    """(n, r): even tokens that go."""
    into: torch.Tensor
    """(n, r): the odd token that takes each of them in; one may take several."""


@torch.no_grad()
def match(metric: torch.Tensor, r: int, *, protect_first: bool = True) -> Matching | None:
    """The r pairs (or as many as there are, `merged_tokens`) with the highest cosine similarity; None for no pair.

    The choice is discrete, so it is made in float32 at least, whatever the model computes in.

    Args:
        metric: (n, T, c): what is compared, usually the keys of the attention.
        protect_first: the first token is never merged away, and `kept` is in the order of the tokens. Otherwise it is
            in falling order of similarity, as in ToMe.
    """
    r = merged_tokens(metric.shape[1], r, protect_first=protect_first)
    if r <= 0:
        return None
    with torch.autocast(metric.device.type, enabled=False):
        unit = nn.functional.normalize(metric.to(_wide(metric)), dim=-1)
        scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if protect_first:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :r], order[:, r:]
    return Matching(kept.sort(dim=-1).values if protect_first else kept, merged, partner.gather(1, merged))


def merge(x: torch.Tensor, size: torch.Tensor, matching: Matching | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (n, T, d) and their sizes (n, T) after merging: (n, T - r, d) and (n, T - r).

    size: how many patches each token stands for; its weight in the mean. Sums are taken in float32 at least; `x` keeps
    its dtype.
    """
    if matching is None:
        return x, size
    total = _summed(size[..., None], matching)
    mean = _summed(x.to(_wide(x)) * size[..., None], matching) / total
    return mean.to(x.dtype), total[..., 0]


def _summed(x: torch.Tensor, matching: Matching) -> torch.Tensor:
    """(n, T, d) -> (n, T - r, d): what is merged is added to its partner."""
    even, odd = x[:, ::2], x[:, 1::2]

    def along(index: torch.Tensor) -> torch.Tensor:
        return index[..., None].expand(-1, -1, x.shape[-1])

    taken = odd.scatter_add(1, along(matching.into), even.gather(1, along(matching.merged)))
    return torch.cat([even.gather(1, along(matching.kept)), taken], dim=1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
