"""What a fitting takes from a model: its tower and projector, its word embeddings, and the token for padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlmtune.embed.codebook import Codebook
from vlmtune.embed.encoder import CropFeatures, without_layers
from vlmtune.embed.labels import Target, choose_padding, refuse_tokens_without_direction
from vlmtune.embed.resampler import PerceiverResampler, ResamplerShape
from vlmtune.errors import UsageError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """
    codebook: on the model's device.
    padding: the token of `padding_id`, for people.
    """

    features: CropFeatures
    codebook: Codebook
    padding_id: int
    padding: str

    def new_resampler(self, shape: ResamplerShape, seed: int) -> PerceiverResampler:
        """Float32, on the model's device; its first values are drawn with `seed` and nothing else."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            resampler = PerceiverResampler(shape)
        return resampler.to(self.features.embedding.device)


def open_parts(
    opened: OpenedFolder,
    targets: Sequence[Target],
    *,
    padding_id: int | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Parts:
    """
    Args:
        padding_id: see `labels.choose_padding`, which decides without.
        dtype: of the tower's arithmetic; the checkpoint's own without.

    Raises:
        DataError: labels with tokens that the model does not know.
        UsageError: no token can be the padding, or not the one that was asked for.
    """
    model = without_layers(load_model(opened, dtype=dtype), opened).eval().requires_grad_(False)
    nn.Module.to(model, device)
    features = CropFeatures(model, opened.family, opened.spec)
    codebook = Codebook.of_embedding(features.embedding, where=str(opened.folder.path))
    refuse_tokens_without_direction(codebook.sigma, targets)
    if padding_id is None:
        padding_id = choose_padding(codebook.sigma, opened.tokenizer, targets)
    elif not 0 <= padding_id < len(codebook) or codebook.sigma[padding_id] == 0:
        raise UsageError(f"there is no token {padding_id} that a row could be nearest to", where="--padding-id")
    elif any(padding_id in target.ids for target in targets):
        raise UsageError(f"is {padding_id}, a token of labels", where="--padding-id", expected="one that no label has")
    return Parts(
        features=features,
        codebook=codebook.to(device),
        padding_id=padding_id,
        padding=str(opened.tokenizer.convert_ids_to_tokens(padding_id)),
    )
