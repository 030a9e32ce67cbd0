"""A stand-in picture for micro batches without pictures.

Under DDP with checkpointing, ZeRO and FSDP every process must call the vision tower equally often, or they wait for
each other for ever. A micro batch without pictures therefore runs one smallest picture through tower and projector,
inside the model's forward, and adds zero times its features to the embeddings: loss and gradients are those without it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class StandIn:
    """Installed once on a model; holds the pixel inputs of the next forward, or None.

    The inputs stay set until the next call, because activation checkpointing runs parts of the forward again later.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model  # `get_image_features` is not part of PreTrainedModel's own interface
        self._inputs: dict[str, torch.Tensor] | None = None
        self._model.get_input_embeddings().register_forward_hook(self._add)

    def set(self, inputs: dict[str, torch.Tensor] | None) -> None:
        """Pixel inputs as the model's forward takes them (one smallest picture), on the model's device; or None."""
        self._inputs = inputs

    def _add(self, module: torch.nn.Module, args: Any, embeddings: torch.Tensor) -> torch.Tensor:
        del module, args
        if self._inputs is None:
            return embeddings
        features: Any = self._model.get_image_features(**self._inputs).pooler_output
        parts = features if isinstance(features, (list, tuple)) else (features,)
        zero = torch.stack([part.sum() for part in parts]).sum() * 0.0
        return embeddings + zero.to(embeddings.dtype)
