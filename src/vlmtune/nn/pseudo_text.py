"""Pseudo-text: rows of a file that take the place of word embeddings at given positions.

The rows are in the space of the language model's input: what a layer in front of the decoder would see of words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmtune.nn.side_inputs import SideInputs

ROWS = "pseudo_text"
"""The side input: floating (N, d), the rows of a micro batch in the order of its positions."""
MASK = "pseudo_text_mask"
"""The side input: bool (B, L), where they go; N of them are True."""


class PseudoText(SideInputs):
    """A child of the input embedding, without parameters, whose hook on it writes the rows.

    Only an output for ids of the mask's shape is written to: the tokens that `generate` adds one by one have none.
    So beams, or a `generate` without a cache, would not see the rows; `infer.session` uses neither.
    Copies of the embedding (PEFT makes one to train it) have a child of their own.
    """

    names = (ROWS, MASK)

    def __init__(self) -> None:
        super().__init__()
        self._rows: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def take(self, inputs: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: one of the two without the other, or not one row per position.
        """
        if inputs and len(inputs) != len(self.names):
            raise ValueError(f"a batch has {' and '.join(inputs)} alone; {ROWS} and {MASK} go together")
        self._rows, self._mask = inputs.get(ROWS), inputs.get(MASK)
        if self._rows is not None and self._mask is not None and len(self._rows) != int(self._mask.sum()):
            raise ValueError(f"{len(self._rows)} rows of pseudo-text for {int(self._mask.sum())} positions")

    def splice(self, embedding: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The forward hook: `output` (B, L, d) with the rows at their positions; gradients reach the rows."""
        del embedding
        if self._rows is None or self._mask is None or not args or args[0].shape != self._mask.shape:
            return output
        return output.masked_scatter(self._mask[..., None], self._rows.to(output.dtype))


def install_pseudo_text(model: PreTrainedModel) -> None:
    """Gives the model's input embedding its `PseudoText`."""
    embedding = model.get_input_embeddings()
    child = PseudoText()
    embedding.add_module("pseudo_text", child)
    embedding.register_forward_hook(child.splice)
