"""The Perceiver resampler: from the visual tokens of a region to a few rows that stand for words.

The arithmetic is Flamingo's (arXiv 2204.14198, A.1.1): learned queries attend to the visual tokens and to themselves,
layer by layer. Names of modules and parameters are those of CalliReader's published weights, which load as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmtune.errors import WeightsError
from vlmtune.weights.strict import check_loading

PUBLISHED_HEAD_WIDTH = 64
"""`dim_head` of CalliReader's class where nothing is said; its published weights (8 heads) have it."""

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResamplerShape:
    """The hyper-parameters, under the names that CalliReader gives them."""

    dim: int
    """Width of the visual tokens, of the queries and of the result: the language model's hidden size."""
    depth: int
    """Layers, each attention and MLP."""
    heads: int
    dim_head: int
    """Width of a head."""
    num_learns: int
    """Queries, so rows of the result for each region."""
    ff_mult: int
    """Width of the MLP, as a multiple of `dim`."""


class _Attention(nn.Module):
    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        inner = shape.heads * shape.dim_head
        self.norm_media = nn.LayerNorm(shape.dim)
        self.norm_learns = nn.LayerNorm(shape.dim)
        self.to_q = nn.Linear(shape.dim, inner, bias=False)
        self.to_kv = nn.Linear(shape.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, shape.dim, bias=False)

    def forward(self, media: torch.Tensor, learns: torch.Tensor) -> torch.Tensor:
        """media (B, n, d), learns (B, q, d) -> (B, q, d)."""
        learns = self.norm_learns(learns)
        seen = torch.cat([self.norm_media(media), learns], dim=1)
        key, value = self.to_kv(seen).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(learns), key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        inner = shape.dim * shape.ff_mult
        self.net = nn.Sequential(
            nn.LayerNorm(shape.dim), nn.Linear(shape.dim, inner), nn.GELU(), nn.Linear(inner, shape.dim)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)


class PerceiverResampler(nn.Module):
    """(B, n, dim) visual tokens -> (B, num_learns, dim); differentiable, without dropout."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.shape = shape
        self.learns = nn.Parameter(torch.randn(shape.num_learns, shape.dim))
        self.layers = nn.ModuleList(nn.ModuleList([_Attention(shape), _FeedForward(shape)]) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.dim)

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        rows = self.learns.expand(len(media), -1, -1)
        pairs: Any = self.layers
        for attention, feed_forward in pairs:
            rows = rows + attention(media, rows)
            rows = rows + feed_forward(rows)
        return self.norm(rows)


def shape_of(state: Mapping[str, torch.Tensor], *, heads: int | None, where: str) -> ResamplerShape:
    """The hyper-parameters that the shapes of a resampler's tensors tell.

    Args:
        heads: the one number that they do not tell. None: as many as have `PUBLISHED_HEAD_WIDTH`.
        where: names the file in messages.

    Raises:
        WeightsError: tensors that are no resampler's; heads that do not divide the width.
    """
    try:
        queries, dim = state["learns"].shape
        inner = state["layers.0.0.to_q.weight"].shape[0]
        middle = state["layers.0.1.net.1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"these are not the weights of a resampler ({error})", where=where,
            expected="learns, layers.N.0.to_q.weight and the others of CalliReader's PerceiverResampler",
        ) from None  # fmt: skip
    depth = len({found[1] for name in state if (found := _LAYER.match(name))})
    number = inner // PUBLISHED_HEAD_WIDTH if heads is None else heads
    if number < 1 or inner % number or (heads is None and inner % PUBLISHED_HEAD_WIDTH) or min(dim, queries) < 1:
        raise WeightsError(
            f"the attention is {inner} wide, which is not a whole number of "
            + (f"heads of {PUBLISHED_HEAD_WIDTH}" if heads is None else f"{heads} heads"),
            where=where,
            remedy='State the number of heads in config.json beside the weights: {"resampler": {"heads": N}}.',
        )
    return ResamplerShape(
        dim=dim, depth=depth, heads=number, dim_head=inner // number, num_learns=queries, ff_mult=middle // dim
    )


def load_resampler(state: Mapping[str, torch.Tensor], *, heads: int | None, where: str) -> PerceiverResampler:
    """A resampler with these tensors, float32, on the CPU.

    Raises:
        WeightsError: see `shape_of`; a tensor that is missing, unknown or of another shape, by name; one that holds NaN
            or infinity.
    """
    with torch.device("meta"):
        resampler = PerceiverResampler(shape_of(state, heads=heads, where=where))
    own = resampler.state_dict()
    check_loading(
        {
            "missing_keys": set(own) - set(state),
            "unexpected_keys": set(state) - set(own),
            "mismatched_keys": [
                (name, state[name].shape, own[name].shape)
                for name in sorted(set(own) & set(state))
                if state[name].shape != own[name].shape
            ],
        },
        where=where,
    )
    resampler.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    for name, parameter in resampler.named_parameters():
        if not parameter.isfinite().all():
            raise WeightsError(f"{name} holds NaN or infinity", where=where, remedy="Fit the encoder again.")
    return resampler
