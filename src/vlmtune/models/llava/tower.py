"""A CLIP or SigLIP tower that merges tokens, for pictures of any sizes and ratios laid end to end in one call.

As AuroraCap has it: between attention and MLP of every layer, `r` tokens of a picture are merged into their most alike
(`nn.token_merging`), the keys' mean over the heads being compared. Positions are stretched to the picture's grid. How
many patches a token stands for weighs in the next mean, not in attention: ToMe adds the logarithm to the scores of each
key, but the records of AuroraCap's encoders hold numbers without it (added to the scores of a query, where softmax
cancels it, it would look the same), and that is what its released weights have seen.

`MergingTower.wrap` changes the classes of the tower's own modules: same objects, parameters, names and hooks, so that
adapters, activation checkpointing, ZeRO and FSDP find what they know. Every module of the tower is called once for all
pictures of a micro batch; only attention and matching go by groups of pictures with the same grid and the same r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings, eager_attention_forward

from vlmtune.nn.side_inputs import SideInputs
from vlmtune.nn.token_merging import match, merge, merged_tokens

GRIDS = "picture_grids"
"""The side input: int64 (n, 3), of each picture its height and width in pixels and r, the tokens merged per layer."""

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Model types of the towers that can be wrapped."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures of a micro batch with the same grid of patches and the same r."""

    pictures: tuple[int, ...]
    """Their places in the micro batch."""
    rows: int
    columns: int
    r: int
    tokens: int
    """Of each picture, at this point of the tower."""

    def after_layer(self) -> Group:
        return replace(self, tokens=self.tokens - merged_tokens(self.tokens, self.r))


Groups = tuple[Group, ...]


def grouped(grids: torch.Tensor, *, patch: int, leading: int) -> Groups:
    """The groups of (n, 3) picture grids, in the order in which they first occur.

    leading: tokens before the patches of a picture (CLIP's class token).
    """
    members: dict[tuple[int, int, int], list[int]] = {}
    for place, (height, width, r) in enumerate(grids.tolist()):
        members.setdefault((height // patch, width // patch, r), []).append(place)
    return tuple(
        Group(tuple(places), rows, columns, r, tokens=leading + rows * columns)
        for (rows, columns, r), places in members.items()
    )


def by_group(row: torch.Tensor, groups: Groups) -> Iterator[torch.Tensor]:
    """(ΣT, …), the groups one after the other -> for each group (pictures, T, …), as views."""
    lengths = [len(group.pictures) * group.tokens for group in groups]
    for group, part in zip(groups, row.split(lengths), strict=True):
        yield part.unflatten(0, (len(group.pictures), group.tokens))


def end_to_end(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each group (pictures, T, …) -> (ΣT, …)."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


@dataclass(frozen=True, slots=True)
class State:
    """Tokens of all pictures at one point of the tower."""

    hidden: torch.Tensor
    """(1, ΣT, d), group after group."""
    sizes: torch.Tensor
    """(ΣT,) float32: how many patches each token stands for."""
    groups: Groups

    def of_pictures(self, row: torch.Tensor, *, skip: int = 0) -> list[torch.Tensor]:
        """`hidden[0]` or `sizes` cut into pictures, in the order of the micro batch, without their first tokens."""
        found = {
            place: picture
            for group, part in zip(self.groups, by_group(row, self.groups), strict=True)
            for place, picture in zip(group.pictures, part[:, skip:].unbind(), strict=True)
        }
        return [found[place] for place in sorted(found)]


def stretched(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Positions (N, d) of a square grid -> (rows * columns, d), as the reference does.

    Bicubic with the factors (rows + 0.1) / √N and (columns + 0.1) / √N; that tenth guards DINO's code, from which the
    reference has it, against rounding, but it moves every value a little. The table itself for its own grid.
    """
    side = math.isqrt(len(table))
    if side**2 != len(table):
        raise ValueError(f"{len(table)} positions do not lie in a square")
    if rows == columns == side:
        return table
    grid = table.to(torch.promote_types(table.dtype, torch.float32)).T.unflatten(1, (side, side))[None]
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    found = nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    return found[0].flatten(1).T.to(table.dtype)


class _Embeddings(nn.Module):
    """Takes patches (ΣP, 3, p, p), picture by picture, when it is given groups."""

    patch_embedding: nn.Module
    position_embedding: nn.Module
    position_ids: torch.Tensor

    def forward(
        self, pixel_values: torch.Tensor, *args: Any, groups: Groups | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if groups is None:
            return super().forward(pixel_values, *args, **kwargs)
        weight: Any = self.patch_embedding.weight
        patches = self.patch_embedding(pixel_values.to(weight.dtype)).flatten(1)
        table = self.position_embedding(self.position_ids)[0]
        first = table.new_empty(0, table.shape[1])
        if isinstance(self, CLIPVisionEmbeddings):
            first, table = (self.class_embedding + table[0])[None], table[1:]
        areas = {place: group.rows * group.columns for group in groups for place in group.pictures}
        pictures = patches.split([areas[place] for place in sorted(areas)])
        parts = []
        for group in groups:
            placed = torch.stack([pictures[place] for place in group.pictures])
            placed = placed + stretched(table, group.rows, group.columns)
            parts.append(torch.cat([first.expand(len(placed), -1, -1), placed], dim=1))
        return end_to_end(parts)[None]


class _Attention(nn.Module):
    """Each picture attends to itself alone, when it is given groups."""

    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    num_heads: int
    head_dim: int
    scale: float
    dropout: float

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, groups: Groups | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """With groups: (1, ΣT, d) -> (1, ΣT, d), and for each group the keys' mean over the heads (pictures, T, c)."""
        if groups is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        outputs, metrics = [], []
        rows = (projection(hidden_states)[0] for projection in (self.q_proj, self.k_proj, self.v_proj))
        for parts in zip(*(by_group(row, groups) for row in rows), strict=True):
            query, key, value = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
            dropout = self.dropout if self.training else 0.0
            found, _ = attention(self, query, key, value, None, scaling=self.scale, dropout=dropout, is_causal=False)
            outputs.append(found.flatten(2))
            metrics.append(key.detach().mean(1))
        return self.out_proj(end_to_end(outputs)[None]), metrics


class _Layer(nn.Module):
    """Merges between attention and MLP, when it is given groups."""

    layer_norm1: nn.Module
    self_attn: nn.Module
    layer_norm2: nn.Module
    mlp: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        groups: Groups | None = None,
        sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """With groups: (1, ΣT, d) and the sizes (ΣT,) -> both after merging."""
        if groups is None or sizes is None:
            return super().forward(hidden_states, *args, **kwargs)
        mixed, metrics = self.self_attn(self.layer_norm1(hidden_states), groups=groups)
        hidden = hidden_states + mixed
        if any(group.r for group in groups):
            hidden, sizes = self._merged(hidden[0], sizes, metrics, groups)
        return hidden + self.mlp(self.layer_norm2(hidden)), sizes

    @staticmethod
    def _merged(
        hidden: torch.Tensor, sizes: torch.Tensor, metrics: Sequence[torch.Tensor], groups: Groups
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (ΣT, d), sizes (ΣT,) -> (1, ΣT', d), (ΣT',)."""
        found = [
            merge(tokens, size, match(metric, group.r))
            for group, tokens, size, metric in zip(
                groups, by_group(hidden, groups), by_group(sizes, groups), metrics, strict=True
            )
        ]
        return end_to_end([tokens for tokens, _ in found])[None], end_to_end([size for _, size in found])


class MergingTower(SideInputs):
    """Without picture grids the plain tower. With them it takes patches, and merges.

    A picture's features come one picture after the other, in the order of the micro batch.
    """

    names = (GRIDS,)
    config: Any
    embeddings: nn.Module
    encoder: Any
    drops_first: bool
    _grids: torch.Tensor | None = None

    @staticmethod
    def wrap(tower: PreTrainedModel, *, strategy: str) -> MergingTower:
        """The same tower, changed in place; once is enough.

        Args:
            strategy: the model's `vision_feature_select_strategy`. With "default" each picture's first token is left
                out of the features, as AuroraCap does: CLIP's class token, and SigLIP's first patch, since that tower
                has no class token. With "full" all are features. The first is never merged away in any case.

        Raises:
            ValueError: the tower is neither CLIP's nor SigLIP's, or the strategy is unknown.
        """
        if not isinstance(tower, CLIPVisionModel | SiglipVisionModel):
            raise ValueError(f"tokens are merged in towers of CLIP and SigLIP, not in a {type(tower).__name__}")
        if strategy not in ("default", "full"):
            raise ValueError(f"unknown vision_feature_select_strategy {strategy!r}")
        _become(tower.embeddings, _Embeddings)
        for layer in tower.encoder.layers:
            _become(layer, _Layer)
            _become(layer.get_submodule("self_attn"), _Attention)
        wrapped: Any = _become(tower, MergingTower)
        wrapped.drops_first = strategy == "default"
        return wrapped

    def take(self, inputs: Mapping[str, Any]) -> None:
        self._grids = inputs.get(GRIDS)

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Patches (ΣP, 3, p, p), row by row, picture by picture -> hidden states in one row.

        hidden_states[i] is (1, 1 + ΣT, d) with the strategy "default", the first of these a dummy which LLaVA's model
        drops, and (1, ΣT, d) with "full". Those that `output_hidden_states` does not name are None, and layers after
        the last one that it names are not run.
        """
        if self._grids is None:
            return super().forward(pixel_values, *args, **kwargs)
        count = len(self.encoder.layers) + 1
        wanted = _selected(kwargs.get("output_hidden_states"), count)
        found: list[torch.Tensor | None] = [None] * count
        for number, state in zip(range(max(wanted) + 1), self.states(pixel_values, self._grids), strict=False):
            if number in wanted:
                found[number] = self._laid(state)
        return BaseModelOutputWithPooling(hidden_states=tuple(found))  # type: ignore[arg-type] # None as transformers

    def states(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> Iterator[State]:
        """What stands before the first layer and after each, computed as it is asked for.

        Raises:
            ValueError: the patches are not those of the grids.
        """
        leading = int(isinstance(self, CLIPVisionModel))
        groups = grouped(grids, patch=self.config.patch_size, leading=leading)
        patches = sum(len(group.pictures) * group.rows * group.columns for group in groups)
        if patches != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} patches, but the pictures have {patches}")
        hidden = self.embeddings(pixel_values, groups=groups)
        if isinstance(self, CLIPVisionModel):
            hidden = self.pre_layrnorm(hidden)
        sizes = torch.ones(hidden.shape[1], device=hidden.device)
        yield State(hidden, sizes, groups)
        for layer in self.encoder.layers:
            hidden, sizes = layer(hidden, groups=groups, sizes=sizes)
            sizes = sizes.detach()  # re-entrant checkpointing gives a gradient to all that a layer returns
            groups = tuple(group.after_layer() for group in groups)
            yield State(hidden, sizes, groups)

    def _laid(self, state: State) -> torch.Tensor:
        pictures = state.of_pictures(state.hidden[0], skip=int(self.drops_first))
        dummy = [pictures[0].new_zeros(1, pictures[0].shape[1])] if self.drops_first else []
        return torch.cat([*dummy, *pictures])[None]


def _selected(asked: Any, count: int) -> set[int]:
    """The numbers of the hidden states that `output_hidden_states` means: one, several, or (a flag) all."""
    if isinstance(asked, int) and not isinstance(asked, bool):
        asked = [asked]
    return {number % count for number in asked} if isinstance(asked, list | tuple) else set(range(count))


def _become(module: nn.Module, kind: Any) -> nn.Module:
    """The module itself, as one of this kind as well."""
    if not isinstance(module, kind):
        base: Any = type(module)
        module.__class__ = _both(kind, base)
    return module


@functools.cache
def _both(kind: Any, base: Any) -> type[nn.Module]:
    """A subclass of both under the name of `base`, by which accelerate finds the layers to shard, and transformers the
    outputs to record."""
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
