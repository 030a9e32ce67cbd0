"""The publisher's names of InternLM-XComposer2's weights against those of our class, most of which are the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from vlmtune.weights.layout import Rule, WeightTable
from vlmtune.weights.ops import KEEP, Op, Shape

POSITIONS = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
"""(1 + patches, d): the class token's, then the patches' row by row."""
SEPARATOR = "plora_glb_GN"
"""Only high-resolution models have it."""
PATCHES = "vit.vision_tower.vision_model.embeddings.patch_embedding.weight"


@dataclass(frozen=True, slots=True)
class ResizePositions:
    """A table of positions that is brought to a grid of `side` × `side` patches while it is read.

    The other way it stays as it is: a model trained at another picture size is written with the table of that size.
    """

    side: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (resize_positions(tensor, self.side),)

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (only,) = parts
        return only

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        if len(whole) != 2 or round((whole[0] - 1) ** 0.5) ** 2 != whole[0] - 1:
            raise ValueError("1 + n² rows")
        return ((1 + self.side**2, whole[1]),)

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        return parts[0]


def resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """(1 + n², d) -> (1 + side², d): bicubic, corners not aligned, in float32; the class token's row is kept.

    Source: `resize_pos` of the publisher's build_mlp.py.
    """
    first, grid = table[:1], table[1:]
    old = round(len(grid) ** 0.5)
    picture = grid.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    resized = interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def official_table(positions: Op = KEEP) -> WeightTable:
    """
    Args:
        positions: what happens to the table of positions.
    """
    layer = "model.layers.*."
    partial = [
        Rule(f"{layer}{block}.Plora_{one}.weight", (f"{layer}{block}_partial.{one}",))
        for block in ("attention.wqkv", "attention.wo", *(f"feed_forward.w{number}" for number in (1, 2, 3)))
        for one in "AB"
    ]
    return WeightTable(
        [
            *partial,
            Rule(POSITIONS, ("vit.embeddings.position_embedding.weight",), positions),
            Rule("vit.vision_tower.vision_model.**", ("vit.**",)),
            Rule(SEPARATOR, ("vision_proj.global_separator",)),
            Rule("plora_sub_GN", ("vision_proj.row_separator",)),
            Rule("vision_proj.**", ("vision_proj.**",)),
            Rule("output.weight", ("output.weight",)),
            Rule("model.**", ("model.**",)),
        ]
    )
