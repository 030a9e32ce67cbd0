"""Weights of another layout through transformers' own loader, by its conversion rules.

transformers streams the shards, casts, quantises and partitions; here is only where each tensor goes and how it is
taken apart.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from vlmtune.weights.layout import WeightTable
from vlmtune.weights.ops import KEEP

_SPLIT = "vlmtune_split"


class _Renamed(WeightRenaming):
    """Every tensor under the name of its parameter, or of the first of them."""

    def __init__(self, table: WeightTable) -> None:
        super().__init__("vlmtune_renamed", "vlmtune_renamed")
        self.table = table

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        link = self.table.link(source_key)
        if link is None:
            return source_key, None
        self._was_used = True
        return link.parameters[0], source_key


class _SplitTensors(WeightConverter):
    """Tensors that become several parameters; they come here under the name of the first of them."""

    def __init__(self, table: WeightTable) -> None:
        super().__init__(_SPLIT, [f"{_SPLIT}_0", f"{_SPLIT}_1"], operations=[_Split(table)])
        self.table = table

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        link = self.table.link_of(source_key)
        if link is None or link.op == KEEP:
            return source_key, None
        self._was_used = True
        return source_key, _SPLIT


class _Split(ConversionOps):
    """Takes a tensor apart; the results carry the full names of their parameters."""

    def __init__(self, table: WeightTable) -> None:
        self.table = table

    def convert(  # type: ignore[override] # no lists: one tensor for each parameter, which transformers takes as well
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """`full_layer_name` is the first parameter of the tensor, by which transformers keeps it."""
        link = self.table.link_of(kwargs["full_layer_name"])
        if link is None:
            raise ValueError(f"{kwargs['full_layer_name']} is no parameter of this layout")
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        return dict(zip(link.parameters, link.op.split(tensor), strict=True))


def conversion_rules(table: WeightTable) -> list[WeightRenaming | WeightConverter]:
    """The rules of a layout as transformers' loader takes them."""
    return [_Renamed(table), _SplitTensors(table)]
