"""Attention over packed rows: each sample by itself, without a mask of the whole row.

transformers' own way builds a (T, T) mask from position_ids that restart, and computes all T × T scores. Here a row of
samples of lengths n₁, n₂, … costs n₁² + n₂² + …; the results are the same. Registered under `PACKED` through
transformers' `AttentionInterface`; rows that are not packed go the way of `sdpa`.

The lengths come as the keyword `pack_lengths` of the model's forward, which transformers hands down to the attention of
the language model. The conformance suite checks, family by family, that they arrive: packed must equal unpacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "vlmtune_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pack_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, d), key and value (1, key heads, T, d) -> (1, T, heads, d).

    pack_lengths: tokens of each sample, summing to T; None for rows that are not packed.
    """
    if pack_lengths is None or len(pack_lengths) == 1:
        whole, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole, None
    if sum(pack_lengths) != query.shape[2]:
        raise ValueError(f"a pack of {sum(pack_lengths)} tokens, but {query.shape[2]} queries")
    ends = list(itertools.accumulate(pack_lengths))
    outputs = [
        sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], None, **kwargs
        )[0]
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def packed_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for rows without padding and without a cache; `sdpa`'s mask for all others."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
