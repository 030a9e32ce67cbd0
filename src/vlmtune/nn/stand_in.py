"""A stand-in picture for micro batches without pictures.

Under DDP with checkpointing, ZeRO and FSDP every process must call the vision tower equally often, or they wait for
each other for ever. A micro batch without pictures therefore runs one smallest picture through tower and projector,
inside the model's forward, and adds zero times its features to the embeddings: loss and gradients are those without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmtune.nn.side_inputs import hand_over


class StandIn:
    """Installed once on a model; holds the pixel inputs of the next forward, or None.

    The inputs stay set until the next call, because activation checkpointing runs parts of the forward again later.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model  # `get_image_features` is not part of PreTrainedModel's own interface
        self._inputs: dict[str, torch.Tensor] | None = None
        # In front of the decoder, where pictures are spliced in as well: ZeRO-3 wants the modules of all ranks to run
        # in one order, backwards too. A hook on the embedding would put the tower's backward after the embedding's.
        self._model.get_decoder().register_forward_pre_hook(self._add, with_kwargs=True)

    def set(self, inputs: dict[str, torch.Tensor] | None) -> None:
        """Pixel inputs of one smallest picture, on the model's device, side inputs among them; or None."""
        self._inputs = inputs

    def _add(self, module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        del module
        if self._inputs is None:
            return None
        # Here and not in `set`: whatever the batch itself handed over, without pictures, comes before this.
        found: Any = self._model.get_image_features(**hand_over(self._model, self._inputs))
        parts = _tensors((found.pooler_output, found.get("deepstack_features")))  # Qwen3-VL's go to later layers
        zero = torch.stack([part.sum() for part in parts]).sum() * 0.0
        embeddings = inputs["inputs_embeds"]
        return args, {**inputs, "inputs_embeds": embeddings + zero.to(embeddings.dtype)}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
