"""AuroraCap's encoder written out for one picture, token by token, from the facts in the records' README.

But for one: the README says that the logarithm of the sizes is added to the attention scores; the records show that it
has no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def merged(
    x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, r: int, *, protect_first: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, d), (T,), (T, c) -> the tokens after one merge and their sizes."""
    metric = metric.detach()
    evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    r = min(r, (len(x) - int(protect_first)) // 2)
    if r <= 0:
        return x, size
    closest = {}
    for even in evens:
        likeness = {odd: float(torch.cosine_similarity(metric[even], metric[odd], dim=0)) for odd in odds}
        partner = max(odds, key=likeness.__getitem__)
        closest[even] = (-float("inf") if protect_first and even == 0 else likeness[partner], partner)
    ranked = sorted(evens, key=lambda even: -closest[even][0])
    kept = sorted(ranked[r:]) if protect_first else ranked[r:]
    members = {token: [token] for token in [*kept, *odds]}
    for even in ranked[:r]:
        members[closest[even][1]].append(even)
    sums = [sum(size[token] for token in tokens) for tokens in members.values()]
    means = [
        sum(x[token] * size[token] for token in tokens) / total
        for tokens, total in zip(members.values(), sums, strict=True)
    ]
    return torch.stack(means), torch.stack(sums)  # type: ignore[arg-type]


def positions(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(N, d) of a square grid -> (rows * columns, d)."""
    side = round(len(table) ** 0.5)
    if rows * columns == len(table) and rows == columns:
        return table
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = ((rows + 0.1) / len(table) ** 0.5, (columns + 0.1) / len(table) ** 0.5)
    return nn.functional.interpolate(grid, scale_factor=factor, mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)


def embedded(tower: Any, picture: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (T, d): patches, positions, and CLIP's class token and first norm."""
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(picture[None])[0]
    rows, columns = patches.shape[1:]
    tokens, table = patches.flatten(1).T, embeddings.position_embedding.weight
    if not hasattr(embeddings, "class_embedding"):
        return tokens + positions(table, rows, columns)
    tokens = tokens + positions(table[1:], rows, columns)
    return tower.pre_layrnorm(torch.cat([(embeddings.class_embedding + table[0])[None], tokens]))


def states(tower: Any, picture: torch.Tensor, r: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states (T, d) and sizes (T,) before the first layer and after each."""
    hidden = embedded(tower, picture)
    size = torch.ones(len(hidden), dtype=hidden.dtype)
    found = [(hidden, size)]
    for layer in tower.encoder.layers:
        attention, heads = layer.self_attn, tower.config.num_attention_heads
        normed = layer.layer_norm1(hidden)
        query, key, value = (
            projection(normed).unflatten(1, (heads, -1)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        hidden = hidden + attention.out_proj(mixed)
        hidden, size = merged(hidden, size, key.mean(0), r)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        found.append((hidden, size))
    return found


def patches_of(picture: torch.Tensor, patch: int) -> torch.Tensor:
    """(3, H, W) -> (patches, 3, p, p), row by row; what is left over at the right and below is cut off."""
    rows, columns = (side // patch for side in picture.shape[1:])
    return torch.stack(
        [
            picture[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            for row in range(rows)
            for column in range(columns)
        ]
    )
