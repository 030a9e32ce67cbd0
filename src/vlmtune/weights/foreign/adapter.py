"""A LoRA on official layers as an adapter of ours: a PEFT folder on transformers' own layers.

A layer that is fused in the official model and split here (InternLM2's wqkv, InternViT's qkv) keeps its update exactly:
every part gets the same A, and B is cut by rows as the weight is, since the rows of B·A are those of the weight.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmtune.errors import WeightsError
from vlmtune.weights.foreign.parts import Parts, is_projector
from vlmtune.weights.foreign.recognise import ADAPTER
from vlmtune.weights.layout import WeightTable
from vlmtune.weights.strict import listed

_PREFIX = "base_model.model."


def write_adapter(parts: Parts, table: WeightTable, base: Path, out: Path) -> list[str]:
    """Write the LoRA of `parts`, and the projector if it was trained in full, as an adapter folder.

    Args:
        table: the official layout of the base.
        base: what the adapter names as its base.
        out: exists and is empty.

    Returns:
        The official names of the tensors of `parts.whole` that the adapter holds.

    Raises:
        WeightsError: a layer that the layout does not know, by name.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    lost: list[str] = []
    for layer, lora in parts.lora.items():
        link = table.link(f"{layer}.weight")
        if link is None:
            lost.append(layer)
            continue
        a, rows = lora.a.read(), link.op.split(lora.b.read())
        for parameter, b in zip(link.parameters, rows, strict=True):
            module = parameter.removesuffix(".weight")
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.clone()  # safetensors refuses shared memory
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous().clone()
            ranks[module], alphas[module] = lora.rank, lora.alpha(layer, lora.rank)
    if lost:
        raise WeightsError(f"no layer of transformers' class takes {listed(lost)}", where=str(parts.where))
    held = _projector(parts, table, tensors)
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    _write_config(ranks, alphas, base, out, saved=sorted({_module(name, table) for name in held}))
    return held


def _projector(parts: Parts, table: WeightTable, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Adds the projector's tensors; their official names, or [] if not all of them are there."""
    names = [name for name in parts.whole if is_projector(name)]
    for name in names:
        link = table.link(name)
        assert link is not None, name  # the layout knows the whole projector
        tensors[_PREFIX + link.parameters[0]] = parts.whole[name].read().contiguous().clone()
    return names


def _module(name: str, table: WeightTable) -> str:
    """The module of the projector that owns a tensor: model.multi_modal_projector."""
    link = table.link(name)
    assert link is not None, name
    return link.parameters[0].rsplit(".", 2)[0]


def _write_config(ranks: dict[str, int], alphas: dict[str, float], base: Path, out: Path, *, saved: list[str]) -> None:
    from peft import LoraConfig

    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    LoraConfig(
        r=int(rank),
        lora_alpha=_plain(alpha),
        rank_pattern={re.escape(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(name): _plain(value) for name, value in alphas.items() if value != alpha},
        target_modules=sorted(ranks),
        modules_to_save=saved or None,
        base_model_name_or_path=str(base),
        lora_dropout=0.0,
        inference_mode=True,
    ).save_pretrained(str(out))


def _plain(alpha: float) -> int:
    # PEFT types alpha as int but divides only; a rank-stabilised one has no whole number.
    return int(alpha) if alpha == int(alpha) else alpha  # type: ignore[return-value]
