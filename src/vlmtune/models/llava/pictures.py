"""LLaVA's pictures when their tokens are merged, or when they keep their own shapes: how each is brought to size, how
many tokens are left of it, and what the tower is given.

Nothing is padded to a common size: the patches of all pictures of a micro batch lie end to end, and `picture_grids`
says where one ends and how much of it is merged (see `models.llava.tower`). Sizes follow AuroraCap's loader (github
rese1f/aurora, dataset/aurora.py), of which `swap_sides` is a trait.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from transformers import CLIPVisionConfig
from transformers.image_utils import SizeDict

from vlmtune.config.schema import ImageOptions, MediaOptions, VideoOptions
from vlmtune.data.sample import MediaPlan, Retouch, Size
from vlmtune.errors import ConfigError, DataError
from vlmtune.models import native
from vlmtune.models.auto import cuts
from vlmtune.models.llava.config import RECORD
from vlmtune.models.llava.tower import GRIDS
from vlmtune.models.pixels import on_square
from vlmtune.nn.token_merging import kept_tokens, merged_per_layer

Fit = Literal["stretch", "pad_square", "keep_aspect"]
PROCESSORS = ("CLIPImageProcessorPil", "SiglipImageProcessorPil")
_LONGEST = 200  # times the shorter side


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a folder says about its pictures beside its image processor; None where it says nothing."""

    token_merge_ratio: float | None = None
    fit: Fit | None = None
    slow_fast: bool | None = None
    swap_sides: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaSpec:
    """Everything that decides how pictures become patches and ids. Picklable."""

    image_processor: Any
    """transformers' CLIP or SigLIP image processor, PIL backend."""
    placeholder_id: int
    """The id whose embeddings the model replaces by features."""
    patch: int
    """Edge of a patch in pixels."""
    layers: int
    """Layers of the tower; the share is spread over them."""
    merges: int
    """Layers up to the one whose output is used: so often tokens are merged."""
    extra: int
    """Tokens in front of the patches (CLIP's class token: 1, SigLIP: 0)."""
    dropped: int
    """Tokens that the model drops from the front of a picture's features (`vision_feature_select_strategy`)."""
    ratio: float
    fit: Fit | None
    """None: as the image processor does."""
    slow_fast: bool
    swap_sides: bool

    @property
    def edge(self) -> int:
        """Of the square that the image processor makes, in pixels."""
        processor = self.image_processor
        given = _given(processor.crop_size if processor.do_center_crop else processor.size)
        return given.get("height") or given["shortest_edge"]


def habits_of(config: Mapping[str, Any], fallback: Habits) -> Habits:
    """What config.json of a native folder records under `vlmtune`, and `fallback` for the rest."""
    record = config.get(RECORD) or {}
    return Habits(
        token_merge_ratio=record.get("token_merge_ratio", fallback.token_merge_ratio),
        fit=record.get("fit", fallback.fit),
        slow_fast=record.get("slow_fast", fallback.slow_fast),
        swap_sides=record.get("swap_sides", fallback.swap_sides),
    )


def record_of(spec: LlavaSpec) -> dict[str, Any]:
    """What config.json keeps under `vlmtune`, for `habits_of`; with `swap_sides` wherever that changes pictures."""
    record = {"token_merge_ratio": spec.ratio, "fit": spec.fit, "slow_fast": spec.slow_fast}
    return {**record, "swap_sides": spec.swap_sides} if spec.fit == "keep_aspect" else record


def llava_spec(config: Any, image_processor: Any, habits: Habits, media: MediaOptions) -> LlavaSpec:
    """
    Args:
        config: of transformers' LlavaForConditionalGeneration.
        image_processor: the folder's own, PIL backend.
        habits: what the folder says; `media` goes before.

    Raises:
        ConfigError: an option without effect on this model, several feature layers, an image processor of another kind,
            or a picture of which no token would be left.
    """
    options = media.image
    chosen = chosen_habits(habits, media)
    _refuse_idle(options, chosen.fit)
    layer, tower = config.vision_feature_layer, config.vision_config
    kind = type(image_processor).__name__
    if not isinstance(layer, int):
        raise _refused(f"the model joins the features of the layers {layer}, which keep different numbers of tokens")
    if kind not in PROCESSORS:
        raise _refused(f"the image processor is {kind}, and only those of CLIP and SigLIP are followed here")
    if (
        chosen.token_merge_ratio or 1
    ) == 1 and options.token_merge_ratio is None:  # 1 is said of pictures that stay whole beside merged ones
        native.refuse_slow_fast(media.video)
    spec = LlavaSpec(
        image_processor=_resized(image_processor, options.size),
        placeholder_id=int(config.image_token_id),
        patch=int(tower.patch_size),
        layers=int(tower.num_hidden_layers),
        merges=layer % (tower.num_hidden_layers + 1),  # hidden state 0 is the embedding
        extra=1 if tower.model_type == CLIPVisionConfig.model_type else 0,
        dropped=1 if config.vision_feature_select_strategy == "default" else 0,
        ratio=chosen.token_merge_ratio or 1.0,
        fit=chosen.fit,
        slow_fast=bool(chosen.slow_fast),
        swap_sides=chosen.swap_sides and chosen.fit == "keep_aspect",
    )
    try:
        _plan_one((spec.edge, spec.edge), spec, is_frame=False, whole=False)
    except DataError as error:
        raise ConfigError(error.found, where="model.image", expected=error.expected, remedy=error.remedy) from error
    return spec


def as_plain(habits: Habits, media: MediaOptions) -> MediaOptions | None:
    """The options for `auto`, which takes pictures as transformers does; None where they are merged or fitted."""
    chosen, options = chosen_habits(habits, media), media.image
    if (chosen.token_merge_ratio or 1) < 1 or (chosen.fit, options.size, options.swap_sides) != (None, None, None):
        return None
    if options.token_merge_ratio is None:
        return media
    # A source whose pictures stay whole beside others that are merged: `slow_fast` is for those.
    image, video = (
        {**part.model_dump(), name: None} for part, name in ((options, "token_merge_ratio"), (media.video, "slow_fast"))
    )
    return media.model_copy(update={"image": ImageOptions(**image), "video": VideoOptions(**video)})


def picture_settings(spec: LlavaSpec) -> dict[str, Any]:
    """What preprocessor_config.json must say of the size where an option chose it."""
    processor = spec.image_processor
    settings = {"size": _given(processor.size)}
    return {**settings, "crop_size": _given(processor.crop_size)} if processor.do_center_crop else settings


def chosen_habits(habits: Habits, media: MediaOptions) -> Habits:
    """The folder's habits where the options leave things open."""
    options, video = media.image, media.video
    return Habits(
        token_merge_ratio=options.token_merge_ratio or habits.token_merge_ratio,
        fit=options.fit or habits.fit,
        slow_fast=habits.slow_fast if video.slow_fast is None else video.slow_fast,
        swap_sides=habits.swap_sides if options.swap_sides is None else options.swap_sides,
    )


def _resized(image_processor: Any, size: int | None) -> Any:
    """The image processor for squares of `size` pixels; the same one without."""
    if size is None:
        return image_processor
    changed = copy.copy(image_processor)
    square = {"height": size, "width": size}
    shortest = "shortest_edge" in _given(image_processor.size)
    vars(changed)["size"] = SizeDict(**({"shortest_edge": size} if shortest else square))
    if image_processor.do_center_crop:
        vars(changed)["crop_size"] = SizeDict(**square)
    return changed


def _given(size: Any) -> dict[str, int]:
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def _refused(
    found: str, remedy: str = "Remove the options under model.image that change how pictures are seen."
) -> ConfigError:
    return ConfigError(found, where="model.image", remedy=remedy)


def _refuse_idle(options: ImageOptions, fit: Fit | None) -> None:
    used = {"size", "fit", "token_merge_ratio", "swap_sides"}
    idle = sorted(set(options.model_dump(exclude_none=True)) - used)
    if idle:
        raise _refused(
            f"{', '.join(idle)} has no effect on this model: a picture is seen as a whole",
            "Remove the key; `vlmtune info MODEL` shows what the model's pictures depend on.",
        )
    if options.swap_sides is not None and fit != "keep_aspect":
        raise _refused("swap_sides has an effect with fit: keep_aspect only", "Set fit: keep_aspect, or remove it.")


def about(spec: LlavaSpec) -> str:
    """How pictures are seen, and how many tokens of a square one are really left."""
    square = (spec.edge, spec.edge)
    left, whole = (_plan_one(square, spec, is_frame=False, whole=whole).num_tokens for whole in (False, True))
    fit = {"keep_aspect": "in their own shape", "pad_square": "on a padded square", "stretch": "stretched"}
    parts = [fit.get(spec.fit or "", "as its image processor cuts them")]
    if spec.ratio < 1:
        share = f"token_merge_ratio {spec.ratio:g} leaves {left} of {whole} tokens of {spec.edge}×{spec.edge} pixels"
        parts.append(f"{share} ({100 * left / whole:.1f} %)")
        parts += ["the first frame of a video stays whole"] if spec.slow_fast else []
    return ", ".join(parts)


def plan(sizes: Sequence[Size], spec: LlavaSpec, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
    """What each picture of a row becomes; with `slow_fast` the first of several frames of a video is not merged."""
    numbers = list(frames) or [None] * len(sizes)
    leads = [spec.slow_fast and _is_first_of_several(numbers, i) for i in range(len(numbers))]
    return tuple(
        _plan_one(size, spec, is_frame=number is not None, whole=lead)
        for size, number, lead in zip(sizes, numbers, leads, strict=True)
    )


def _is_first_of_several(numbers: Sequence[int | None], i: int) -> bool:
    """Frame numbers ascend within a video."""
    before, own, after = (numbers[k] if 0 <= k < len(numbers) else None for k in (i - 1, i, i + 1))
    if own is None or after is None:
        return False
    return own < after and (before is None or before >= own)


def _plan_one(size: Size, spec: LlavaSpec, *, is_frame: bool, whole: bool) -> MediaPlan:
    """whole: no token is merged."""
    seen, (width, height) = _shape(size, spec)
    rows, columns = height // spec.patch, width // spec.patch
    merged = merged_per_layer(height, width, patch=spec.patch, layers=spec.layers, ratio=1.0 if whole else spec.ratio)
    first = 1 if spec.extra == 0 else 0  # without a class token the first patch takes its place and is never merged
    left = kept_tokens(rows * columns - first, merged, merges=spec.merges) if rows * columns else -first
    tokens = left + first + spec.extra - spec.dropped
    if tokens < 1:
        raise DataError(
            f"nothing is left of a picture of {size[0]}×{size[1]}: the tower sees {width}×{height} pixels of it in "
            f"patches of {spec.patch}",
            remedy="Set a larger model.image.size.",
        )
    return MediaPlan(
        size=size,
        num_tokens=tokens,
        num_tiles=1,
        layout=(height, width, merged),
        is_frame=is_frame,
        resized=seen,
    )


def _shape(size: Size, spec: LlavaSpec) -> tuple[Size | None, Size]:
    """(width, height) of the whole picture after the resize, None if the tower does not see it all or on a square; and
    of what the tower is given."""
    edge = spec.edge
    if spec.fit is None:
        return _own_shape(size, spec.image_processor)
    if spec.fit == "stretch" or (spec.fit == "pad_square" and size[0] == size[1]):
        return (edge, edge), (edge, edge)
    if spec.fit == "pad_square":
        return None, (edge, edge)
    if max(size) > _LONGEST * min(size):
        raise DataError(
            f"the picture is {size[0]}×{size[1]}: one side is over {_LONGEST} times the other",
            remedy="With `fit: keep_aspect` so long a picture has too many patches; crop it, or set fit: pad_square.",
        )
    scale = edge / min(size)  # rounded as in AuroraCap's loader: the shorter side may fall one short, of 55 for 56
    width, height = int(size[0] * scale), int(size[1] * scale)
    if spec.swap_sides:
        width, height = height, width
    return (width, height), (_up(width, spec.patch), _up(height, spec.patch))


def _own_shape(size: Size, processor: Any) -> tuple[Size | None, Size]:
    if processor.do_center_crop:
        return None, (int(processor.crop_size["width"]), int(processor.crop_size["height"]))
    given = _given(processor.size)
    shortest = given.get("shortest_edge")
    whole = (given["width"], given["height"]) if shortest is None else cuts.to_shortest_edge(size, shortest)
    return whole, whole


def _up(length: int, patch: int) -> int:
    return -(-length // patch) * patch


def span_ids(plan: MediaPlan, spec: LlavaSpec) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a picture, int32 (num_tokens,), all of them placeholders."""
    return np.full(plan.num_tokens, spec.placeholder_id, dtype=np.int32), np.ones(plan.num_tokens, dtype=bool)


def pixels(
    picture: PIL.Image.Image, plan: MediaPlan, spec: LlavaSpec, retouch: Retouch | None = None
) -> dict[str, torch.Tensor]:
    """One RGB picture: "pixel_values" float32 (patches, 3, patch, patch), row by row, and "picture_grids" int64 (1, 3).

    A grid is height and width in pixels, and how many tokens each layer merges.
    """
    height, width, merged = plan.layout
    values = _values(retouch(picture) if retouch else picture, plan, spec)
    if values.shape[1:] != (height, width):
        raise ValueError(f"a picture of {tuple(values.shape[1:])} was made and {(height, width)} planned")
    return as_patches(values, spec.patch, merged)


def as_patches(values: torch.Tensor, patch: int, merged: int) -> dict[str, torch.Tensor]:
    """A picture (3, H, W) in the form of `pixels`; what is left over of a row or column of patches is cut off, as the
    tower's convolution does."""
    _, height, width = values.shape
    rows, columns = height // patch, width // patch
    cut = values[:, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    return {
        "pixel_values": cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, patch, patch),
        GRIDS: torch.tensor([[height, width, merged]]),
    }


def _values(picture: PIL.Image.Image, plan: MediaPlan, spec: LlavaSpec) -> torch.Tensor:
    """The picture as the tower is given it: float32 (3, H, W)."""
    processor = spec.image_processor
    if spec.fit is not None:
        height, width, _ = plan.layout
        picture = _fitted(picture, plan, spec)
        processor = _exactly(processor, (width, height))
    found = cuts.whole(processor, picture, ())
    if found is None:
        found = processor([picture], return_tensors="pt")
    values: torch.Tensor = found["pixel_values"][0]
    return values


def _fitted(picture: PIL.Image.Image, plan: MediaPlan, spec: LlavaSpec) -> PIL.Image.Image:
    """The picture in the proportions of what the tower is given."""
    if spec.fit == "pad_square":
        return on_square(picture, spec.image_processor.image_mean)
    height, width, _ = plan.layout
    if plan.resized is None or plan.resized == (width, height):
        return picture
    canvas = PIL.Image.new("RGB", (width, height))  # black at the right and at the bottom, before the colours change
    canvas.paste(picture.resize(plan.resized, spec.image_processor.resample))
    return canvas


def _exactly(processor: Any, size: Size) -> Any:
    """The image processor with everything as it is but the size: stretched to (width, height), nothing cut off."""
    changed = copy.copy(processor)
    vars(changed).update(size=SizeDict(height=size[1], width=size[0]), do_center_crop=False, do_resize=True)
    return changed


def view(pixels: dict[str, torch.Tensor], spec: LlavaSpec) -> list[PIL.Image.Image]:
    """What the tower sees, as a picture again."""
    height, width, _ = pixels[GRIDS][0].tolist()
    rows, columns = height // spec.patch, width // spec.patch
    cut = pixels["pixel_values"].reshape(rows, columns, 3, spec.patch, spec.patch).permute(2, 0, 3, 1, 4)
    return cuts.seen(spec.image_processor, {"pixel_values": cut.reshape(1, 3, rows * spec.patch, columns * spec.patch)})


def collate_pixels(pixels: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The patches of all pictures end to end, and their grids; {} without pictures.

    A source of its own settings may merge nothing beside one that does: its pictures, whole ones, become patches here.
    """
    ragged = next((picture for picture in pixels if GRIDS in picture), None)
    if ragged is None:
        return {"pixel_values": torch.cat([picture["pixel_values"] for picture in pixels])} if pixels else {}
    patch = ragged["pixel_values"].shape[-1]
    alike = [picture if GRIDS in picture else as_patches(picture["pixel_values"][0], patch, 0) for picture in pixels]
    return {name: torch.cat([picture[name] for picture in alike]) for name in ("pixel_values", GRIDS)}
