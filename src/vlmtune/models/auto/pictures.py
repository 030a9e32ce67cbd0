"""How a picture becomes tiles and ids, from its size alone.

transformers' processor says which ids a picture takes once it knows the image processor's *layout* of it (tiles, grid,
rows and columns). The four kinds of image processor below give the layout without pixels. Any other kind is asked by
running it over a blank picture of the same size, once per size: right, and slower.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmtune.config.schema import ImageOptions
from vlmtune.data.sample import MediaPlan, Size
from vlmtune.errors import ConfigError, DataError
from vlmtune.models.auto import cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureKind:
    """One kind of transformers image processor.

    layout(processor, size) -> the numbers that describe the cut; describe(layout) -> the image processor's own outputs
    as far as `replace_image_token` reads them; tiles(layout) -> sub-images that the tower sees; resized(processor,
    size, layout) -> the size of the whole picture after the resize, see `MediaPlan`; cut(processor, picture, layout) ->
    the image processor's tensors, or None for settings that only the image processor itself follows.
    """

    processors: tuple[str, ...]
    layout: Callable[[Any, Size], tuple[int, ...]]
    describe: Callable[[tuple[int, ...]], dict[str, Any]]
    tiles: Callable[[tuple[int, ...]], int]
    resized: Callable[[Any, Size, tuple[int, ...]], Size | None]
    overrides: Callable[[Any, ImageOptions], dict[str, Any]]
    cut: Callable[[Any, PIL.Image.Image, tuple[int, ...]], dict[str, torch.Tensor] | None]
    uncut: Mapping[str, bool] = field(default_factory=dict)
    """The setting of the image processor that leaves a picture whole; none where pictures always stay whole."""
    batch_axis: int = 0
    nested: bool = False
    """The processor wants a list of pictures per row."""


def _tiles_layout(processor: Any, size: Size) -> tuple[int, ...]:
    width, height = size
    return (int(processor.get_number_of_image_patches(height, width, {})),)


def _tiles_resized(processor: Any, size: Size, layout: tuple[int, ...]) -> Size:
    width, height = processor.size["width"], processor.size["height"]
    if layout == (1,):
        return width, height
    columns, rows = get_optimal_tiled_canvas(size[::-1], (height, width), processor.min_patches, processor.max_patches)
    return columns * width, rows * height


def _tiles_overrides(processor: Any, options: ImageOptions) -> dict[str, Any]:
    del processor
    pairs = {"min_patches": options.min_tiles, "max_patches": options.max_tiles}
    return {key: value for key, value in pairs.items() if value is not None}


def _grid_layout(processor: Any, size: Size) -> tuple[int, ...]:
    """Rows and columns of patches after the resize that keeps the aspect ratio (Qwen2-VL, arXiv 2409.12191, 2.1)."""
    width, height = size
    if max(size) > 200 * min(size):
        raise DataError(
            f"the picture is {width}×{height}: one side is over 200 times the other",
            remedy="This model's image processor refuses such pictures; crop it or pad it.",
        )
    factor = processor.patch_size * processor.merge_size
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows // processor.patch_size, columns // processor.patch_size


def _grid_resized(processor: Any, size: Size, layout: tuple[int, ...]) -> Size:
    del size
    return layout[1] * processor.patch_size, layout[0] * processor.patch_size


def _grid_overrides(processor: Any, options: ImageOptions) -> dict[str, Any]:
    if options.min_pixels is None and options.max_pixels is None:
        return {}
    # The older names: they win over `size` when the folder's file has both.
    return {
        "min_pixels": options.min_pixels or processor.size["shortest_edge"],
        "max_pixels": options.max_pixels or processor.size["longest_edge"],
    }


def _split_layout(processor: Any, size: Size) -> tuple[int, ...]:
    """Rows and columns of the SmolVLM split; (0, 0) for a picture that stays whole.

    The steps are those of the processor itself (`resize`, `resize_for_vision_encoder`, `split_images`); its own
    `get_number_of_image_patches` skips one of the roundings.
    """
    if not processor.do_image_splitting:
        return (0, 0)
    width, height = size
    if processor.do_resize:
        width, height = cuts.below_limit(*cuts.to_longest_edge(width, height, processor.size["longest_edge"]))
    edge = processor.max_image_size["longest_edge"]
    aspect = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / aspect) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * aspect) / edge) * edge
    if height <= edge and width <= edge:
        return (0, 0)
    return height // edge, width // edge


def _split_resized(processor: Any, size: Size, layout: tuple[int, ...]) -> Size:
    del size
    edge = processor.max_image_size["longest_edge"]
    return max(layout[1], 1) * edge, max(layout[0], 1) * edge


def _whole_layout(processor: Any, size: Size) -> tuple[int, ...]:
    del size
    edges = processor.crop_size if processor.do_center_crop else processor.size
    return int(edges["height"]), int(edges["width"])


def _whole_resized(processor: Any, size: Size, layout: tuple[int, ...]) -> Size | None:
    del size
    return None if processor.do_center_crop else (layout[1], layout[0])


def _no_overrides(processor: Any, options: ImageOptions) -> dict[str, Any]:
    del processor, options
    return {}


KINDS: tuple[PictureKind, ...] = (
    PictureKind(
        processors=("GotOcr2ImageProcessorPil",),
        layout=_tiles_layout,
        describe=lambda layout: {"num_patches": [layout[0]]},
        tiles=lambda layout: layout[0],
        resized=_tiles_resized,
        overrides=_tiles_overrides,
        cut=cuts.tiled,
        uncut={"crop_to_patches": False},
    ),
    PictureKind(
        processors=("Qwen2VLImageProcessorPil",),
        layout=_grid_layout,
        describe=lambda layout: {"image_grid_thw": np.array([[1, *layout]])},
        tiles=lambda layout: 1,
        resized=_grid_resized,
        overrides=_grid_overrides,
        cut=cuts.gridded,
    ),
    PictureKind(
        processors=("SmolVLMImageProcessorPil", "Idefics3ImageProcessorPil"),
        layout=_split_layout,
        describe=lambda layout: {"rows": [[layout[0]]], "cols": [[layout[1]]]},
        tiles=lambda layout: layout[0] * layout[1] + 1,
        resized=_split_resized,
        overrides=_no_overrides,
        cut=cuts.split,
        uncut={"do_image_splitting": False},
        batch_axis=1,
        nested=True,
    ),
    PictureKind(
        processors=("CLIPImageProcessorPil", "SiglipImageProcessorPil"),
        layout=_whole_layout,
        describe=lambda layout: {"pixel_values": [np.broadcast_to(np.float32(0), (3, *layout))]},
        tiles=lambda layout: 1,
        resized=_whole_resized,
        overrides=_no_overrides,
        cut=cuts.whole,
    ),
)


class KeyedConfig:
    """A config that `lru_cache` can compare: two with the same contents are the same."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._key = json.dumps(config.to_dict(), sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyedConfig) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSpec:
    """Everything about pictures of one opened folder. Picklable.

    placeholder_id: the id whose embeddings the model replaces by features.
    rope_config: the model's config when positions have several axes (Qwen-VL), else None.
    known_ids: the ids of each layout met so far; a memory, not a setting.
    """

    image_processor: Any
    processor: Any
    placeholder_id: int
    rope_config: KeyedConfig | None
    known_ids: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kind(self) -> PictureKind | None:
        return find_kind(self.image_processor)

    def processor_of(self, is_frame: bool) -> Any:
        """The image processor, for frames without the cut into tiles: one tile and no thumbnail, as SmolVLM
        takes them."""
        uncut = self.kind.uncut if self.kind and is_frame else {}
        if not uncut:
            return self.image_processor
        whole = copy.copy(self.image_processor)
        vars(whole).update(uncut)
        return whole


def find_kind(image_processor: Any) -> PictureKind | None:
    name = type(image_processor).__name__
    return next((kind for kind in KINDS if name in kind.processors), None)


_OPTION_OF = {
    "min_patches": "min_tiles",
    "max_patches": "max_tiles",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}


def overrides(image_processor: Any, options: ImageOptions) -> dict[str, Any]:
    """The image processor's own arguments for `model.image`; an option without effect on this model is an error."""
    given = options.model_dump(exclude_none=True)
    kind = find_kind(image_processor)
    if not given:
        return {}
    changed = kind.overrides(image_processor, options) if kind else {}
    used = {_OPTION_OF[key] for key in changed} & set(given)
    idle = sorted(set(given) - used)
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} has no effect on this model: its image processor is {type(image_processor).__name__}",
            where="model.image",
            remedy="Remove the key; `vlmtune info MODEL` shows what the model's pictures depend on.",
        )
    return changed


def plan_picture(size: Size, spec: AutoSpec, *, is_frame: bool) -> MediaPlan:
    """Layout and number of ids of a picture with this (width, height)."""
    kind = spec.kind
    image_processor = spec.processor_of(is_frame)
    resized = None
    if kind is None:
        layout: tuple[int, ...] = size
        num_tiles = _blank_outputs(image_processor, size)["pixel_values"].shape[0]
    else:
        layout = kind.layout(image_processor, size)
        num_tiles = kind.tiles(layout)
        resized = kind.resized(image_processor, size, layout)
    return MediaPlan(
        size=size,
        num_tokens=len(_ids(layout, spec)),
        num_tiles=num_tiles,
        layout=layout,
        is_frame=is_frame,
        resized=resized,
    )


def picture_ids(plan: MediaPlan, spec: AutoSpec) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 (num_tokens,) and the mask of placeholders."""
    ids = _ids(plan.layout, spec)
    return ids, ids == spec.placeholder_id


def _ids(layout: tuple[int, ...], spec: AutoSpec) -> np.ndarray:
    if layout not in spec.known_ids:
        kind = spec.kind
        outputs = kind.describe(layout) if kind else _blank_outputs(spec.image_processor, (layout[0], layout[1]))
        text = spec.processor.replace_image_token(outputs, image_idx=0)
        encoded = spec.processor.tokenizer(text, add_special_tokens=False).input_ids
        spec.known_ids[layout] = np.array(encoded, dtype=np.int32)
    return spec.known_ids[layout]


def _blank_outputs(image_processor: Any, size: Size) -> Mapping[str, Any]:
    return dict(image_processor([PIL.Image.new("RGB", size)], return_tensors="pt"))


def picture_pixels(picture: PIL.Image.Image, spec: AutoSpec, *, is_frame: bool = False) -> dict[str, torch.Tensor]:
    """The image processor's tensors for one picture: by the short way, or from the image processor itself."""
    kind = spec.kind
    image_processor = spec.processor_of(is_frame)
    if kind is not None and picture.mode == "RGB":
        found = kind.cut(image_processor, picture, kind.layout(image_processor, picture.size))
        if found is not None:
            return found
    nested = kind is not None and kind.nested
    outputs = image_processor([[picture]] if nested else [picture], return_tensors="pt")
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def picture_view(pixels: dict[str, torch.Tensor], spec: AutoSpec) -> list[PIL.Image.Image]:
    """One picture's tensors as pictures again; nothing for an image processor of an unknown kind."""
    return cuts.seen(spec.image_processor, pixels) if spec.kind else []


def collate_pixels(pixels: Sequence[dict[str, torch.Tensor]], spec: AutoSpec) -> dict[str, torch.Tensor]:
    """Pictures in sequence order as arguments of the model's forward: one tower call whatever their number."""
    if not pixels:
        return {}
    kind = spec.kind
    axis = kind.batch_axis if kind else 0
    joined = {name: torch.cat([picture[name] for picture in pixels], dim=axis) for name in pixels[0]}
    joined.pop("num_patches", None)  # the models' forward takes the tiles alone
    return joined
