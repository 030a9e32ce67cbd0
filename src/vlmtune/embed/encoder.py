"""Regions of a picture -> rows of a language model's input space, with any model's tower and projector."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import nn
from transformers import PreTrainedModel

from vlmtune.embed.codebook import PADDING_ID, Codebook, Nearest
from vlmtune.embed.folder import EncoderFolder, read_encoder
from vlmtune.embed.regions import Region, SquareRule
from vlmtune.embed.resampler import PerceiverResampler
from vlmtune.errors import DataError, WeightsError
from vlmtune.infer.session import to_device
from vlmtune.models.family import Family, OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over

_USUAL_EDGE = SquareRule().square


class CropFeatures:
    """What a model's tower and projector see of a region.

    A region is put on a white square, which is planned as a frame of a video is: one tile, whatever a picture may have.

    Args:
        model: on its device; its `get_image_features` is called.
        spec: of the family's `media_spec`.
        rule: how a region is put on the square; by `tower_edge` if left out.
    """

    def __init__(self, model: PreTrainedModel, family: Family, spec: Any, rule: SquareRule | None = None) -> None:
        self.model = model
        self.family = family
        self.spec = spec
        self.rule = rule or SquareRule.of_edge(tower_edge(family, spec, model.config))

    @property
    def _model(self) -> Any:
        """transformers types its modules as Tensor | Module; this is the same object without the detour."""
        return self.model

    @cached_property
    @torch.no_grad()
    def embedding(self) -> torch.Tensor:
        """What the language model's layers see of each token (vocabulary, d): the weight of its input embedding.

        Embeddings of a class of their own (Gemma's) scale what they give, and that is what pseudo-text replaces.
        """
        layer = self._model.get_input_embeddings()
        weight: torch.Tensor = layer.weight
        return weight if type(layer) is nn.Embedding else layer(torch.arange(len(weight), device=weight.device))

    def pixels(self, crop: PIL.Image.Image) -> dict[str, torch.Tensor]:
        """The model inputs of a region that was cut out of its page (RGB)."""
        square = self.rule.shown(crop)
        (plan,) = self.family.plan([square.size], self.spec, [0])
        return self.family.pixels(square, plan, self.spec)

    def __call__(self, pixels: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The projected visual tokens (B, n, d) of the regions that `pixels` made; differentiable."""
        weight = self.embedding
        inputs = to_device(self.family.collate_pixels(pixels, self.spec), weight.device, weight.dtype)
        found = self._model.get_image_features(**hand_over(self.model, inputs)).pooler_output
        parts = [found] if isinstance(found, torch.Tensor) else list(found)
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if len(rows) % len(pixels):
            raise ValueError(f"{len(rows)} visual tokens of {len(pixels)} equal pictures")
        return rows.reshape(len(pixels), -1, rows.shape[-1])


def tower_edge(family: Family, spec: Any, config: Any) -> int:
    """Pixels of the edge of what the tower sees; 448 for a tower that takes pictures of any size."""
    squares = (_USUAL_EDGE, _USUAL_EDGE // 2)
    seen = {family.plan([(edge, edge)], spec, [0])[0].resized for edge in squares}
    if len(seen) == 1 and (size := seen.pop()) is not None and size[0] == size[1]:
        return size[0]
    own = (config.to_dict().get("vision_config") or {}).get("image_size", _USUAL_EDGE)
    return int(max(own) if isinstance(own, list | tuple) else own)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRegions:
    """
    rows: float32 (n, d) on the CPU, as they go into a prompt.
    counts: how many of them each region gave.
    nearest: before anything was dropped, (regions, queries) each.
    """

    rows: torch.Tensor
    counts: tuple[int, ...]
    nearest: Nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionEncoder:
    """The whole: regions in, rows out.

    padding_id: rows that are nearest to this token are dropped; None keeps all.
    hard_below: rows whose best cosine is not above this are replaced by the embedding of that token; None replaces
        none. (`hard_vq` of CalliReader's inference, with 0.5.)
    batch_size: regions that go through the tower together.
    """

    features: CropFeatures
    resampler: PerceiverResampler
    codebook: Codebook
    padding_id: int | None = PADDING_ID
    hard_below: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        widths = {
            "the resampler is": self.resampler.shape.dim,
            "the codebook": self.codebook.dim,
            "the language model": self.features.embedding.shape[1],
        }
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise WeightsError(f"{found} wide", expected="one width", remedy="Give the model that belongs to it.")

    @staticmethod
    def open(
        folder: str | Path,
        model: str | Path | OpenedFolder | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> RegionEncoder:
        """An encoder with its model, ready to encode.

        The language model's layers are let go: only tower, projector and embedding are needed.

        Args:
            folder: see `embed.folder`.
            model: the model whose tower and embedding are used; the one that the encoder was fitted for if left out.
            dtype: of the arithmetic; the checkpoint's own if left out.

        Raises:
            UsageError: no model is given, and the encoder names none.
            WeightsError: files that cannot be read, do not belong together or to this model.
        """
        stored = read_encoder(Path(folder))
        opened = model if isinstance(model, OpenedFolder) else open_folder(stored.model_path(model))
        stored.check_model(opened.folder.path)
        return of_folder(stored, opened, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.features.embedding.device

    def encode_page(self, picture: PIL.Image.Image, regions: Sequence[Region]) -> torch.Tensor:
        """float32 (n, d): the rows of the regions in their order, up to `num_learns` each.

        Raises:
            DataError: see `encode_crops`.
        """
        return self.encode_crops(crops_of(picture, regions)).rows

    @torch.no_grad()
    def encode_crops(self, crops: Iterable[PIL.Image.Image]) -> EncodedRegions:
        """The rows of regions that were cut out of their pages (RGB).

        Args:
            crops: taken one by one, and let go once they are pixels.

        Raises:
            DataError: no region; rows that are not finite (a half-precision model may overflow).
        """
        found, rest = [], iter(crops)
        while pixels := [self.features.pixels(crop) for crop in itertools.islice(rest, self.batch_size)]:
            found.append(self.resampler(self.features(pixels)))
        if not found:
            raise DataError("no region to encode")
        rows = torch.cat(found)
        broken = (~rows.isfinite()).flatten(1).any(1).nonzero()
        if len(broken):
            raise DataError(
                f"the vectors of region {int(broken[0]) + 1} hold NaN or infinity",
                remedy="Encode in float32: --dtype float32.",
            )
        nearest = self.codebook.nearest(rows)
        kept = torch.ones_like(nearest.ids, dtype=torch.bool)
        if self.padding_id is not None:
            kept = nearest.ids != self.padding_id
        ids, chosen = nearest.ids[kept], rows[kept]
        if self.hard_below is not None:
            poor = (nearest.cosines[kept] <= self.hard_below)[:, None]
            chosen = torch.where(poor, self.codebook.normed[ids].to(chosen.dtype), chosen)
        return EncodedRegions(
            rows=self.codebook.restored(chosen, ids).cpu(),
            counts=tuple(kept.sum(1).tolist()),
            nearest=Nearest(nearest.ids.cpu(), nearest.cosines.cpu()),
        )


def crops_of(picture: PIL.Image.Image, regions: Iterable[Region]) -> Iterator[PIL.Image.Image]:
    """The regions cut out of their page, one by one."""
    return (picture.crop(region.box) for region in regions)


def of_folder(
    stored: EncoderFolder,
    opened: OpenedFolder,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> RegionEncoder:
    """An encoder of its parts; see `RegionEncoder.open`."""
    model = without_layers(load_model(opened, dtype=dtype), opened).eval()
    nn.Module.to(model, device or torch.device("cpu"))
    features = CropFeatures(model, opened.family, opened.spec, stored.config.regions)
    where, weight = str(stored.path), features.embedding
    mu, sigma = (None, None) if stored.mu_sigma is None else stored.mu_sigma.unbind(1)
    if stored.normed is not None and mu is not None and sigma is not None:
        codebook = Codebook(stored.normed, mu, sigma, where=where)
    else:
        codebook = Codebook.of_embedding(weight, mu, sigma, where=where)
    try:
        return RegionEncoder(
            features=features,
            resampler=stored.resampler.to(weight.device, weight.dtype).eval(),
            codebook=codebook.to(weight.device),
            padding_id=stored.config.padding_id,
        )
    except WeightsError as error:
        raise WeightsError(
            f"{error.found}, with the model {opened.folder.path}", where=where, expected=error.expected,
            remedy=error.remedy,
        ) from error  # fmt: skip


def without_layers(model: PreTrainedModel, opened: OpenedFolder) -> PreTrainedModel:
    """The model less the layers of its language model: nothing here runs them, and they are most of its memory."""
    for name in opened.components.blocks.get("language", ()):
        model.set_submodule(name, nn.ModuleList())
    return model


def with_options(
    encoder: RegionEncoder, *, keep_padding: bool, hard_below: float | None, batch_size: int
) -> RegionEncoder:
    """The encoder with what a user may choose."""
    return replace(
        encoder,
        padding_id=None if keep_padding else encoder.padding_id,
        hard_below=hard_below,
        batch_size=batch_size,
    )
