"""InternVL's pictures: the grid of tiles that is most like them, and what the tower is shown of it.

The rules are those of the official data loader (arXiv 2404.16821, 3.2, "dynamic high-resolution"), for official folders
with its own numbers and for `-hf` folders with those of transformers' `InternVLProcessor`. The two differ in one thing
besides: when two grids of the same number of tiles are equally like a picture, the order in which the grids are tried
decides, and each layout keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from vlmtune.config.schema import ImageOptions
from vlmtune.data.sample import MediaPlan, Retouch, Size
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.pixels import Tones, Triple, grid_tiles, make_tones, on_square, seen_tiles

# ImageNet's, as in the official training code and its demos; preprocessor_config.json of an official folder is not read
# there, and neither here.
_IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
_IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

_NO_EFFECT = ("max_pixels", "min_pixels", "token_merge_ratio", "swap_sides")


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLSpec:
    """Everything that decides how pictures become tiles and ids. Picklable."""

    image_size: int
    """Pixels of a tile's edge."""
    tokens_per_tile: int
    context_id: int
    """The id of `<IMG_CONTEXT>`, whose embeddings the model replaces by features."""
    min_tiles: int
    max_tiles: int
    """Fewest and most tiles of a picture; the thumbnail is not counted. A grid of one tile where there is no grid."""
    dynamic: bool
    """Pictures are cut into tiles; else each is one tile."""
    thumbnail: bool
    """A picture of several tiles is shown once more as a whole, after them."""
    pad_square: bool
    """A picture that is not cut is put on a square of the mean colour first, instead of being stretched."""
    shared: bool
    """The pictures of a row share `max_tiles`, as in the official loader; with transformers each has all of them."""
    hash_order: bool
    """Grids with the same number of tiles are tried in the order of a Python set, as in the official loader."""
    mean: Triple | None = _IMAGENET_MEAN
    std: Triple | None = _IMAGENET_STD
    scale: float | None = 1 / 255
    resample: int = int(PIL.Image.Resampling.BICUBIC)

    @property
    def tones(self) -> Tones:
        return make_tones(self.scale, (self.mean, self.std) if self.mean and self.std else None)


def official_spec(config: Mapping[str, Any], context_id: int, options: ImageOptions) -> InternVLSpec:
    """The settings of an official folder.

    Args:
        config: its config.json; what is missing there has the default of the official configuration class.

    Raises:
        WeightsError: a number of the wrong kind, or a tile that is not a whole number of tokens.
        ConfigError: an option without effect on this model, or without sense.
    """
    vision = config.get("vision_config") or {}
    image_size = _whole(config, "force_image_size", None) or _whole(vision, "image_size", 224)
    spec = InternVLSpec(
        image_size=image_size,
        tokens_per_tile=_tokens(config, image_size),
        context_id=context_id,
        min_tiles=_whole(config, "min_dynamic_patch", 1),
        max_tiles=_whole(config, "max_dynamic_patch", 6),
        dynamic=bool(config.get("dynamic_image_size", False)),
        thumbnail=bool(config.get("use_thumbnail", False)),
        pad_square=bool(config.get("pad2square", False)),
        shared=True,
        hash_order=True,
    )
    return _with_options(spec, config, options)


def native_spec(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], context_id: int, options: ImageOptions
) -> InternVLSpec:
    """The settings of a `-hf` folder, as transformers' `InternVLProcessor` reads them.

    That class cuts every picture into tiles, whatever `crop_to_patches` says in the file: it passes its own default on.

    Args:
        config: config.json.
        preprocessor: preprocessor_config.json; what is missing there has the default of transformers' class.

    Raises:
        WeightsError: an image processor of another kind, tiles that are not square, as `official_spec`.
        ConfigError: as `official_spec`.
    """
    kind = str(preprocessor.get("image_processor_type", "GotOcr2ImageProcessor"))
    if not kind.startswith("GotOcr2ImageProcessor"):
        raise WeightsError(
            f"the image processor is {kind}",
            where="preprocessor_config.json",
            expected="GotOcr2ImageProcessor, which cuts pictures into tiles for InternVL",
            remedy="Take preprocessor_config.json from the model's own `-hf` folder.",
        )
    processor: Any = GotOcr2ImageProcessorPil.from_dict(dict(preprocessor))
    edges = {processor.size["height"], processor.size["width"]}
    if len(edges) != 1 or None in edges:
        raise WeightsError(
            f"`size` is {dict(processor.size)}", where="preprocessor_config.json", expected="a square: height and width"
        )
    image_size = int(edges.pop())
    spec = InternVLSpec(
        image_size=image_size,
        tokens_per_tile=_tokens(config, image_size),
        context_id=context_id,
        min_tiles=int(processor.min_patches),
        max_tiles=int(processor.max_patches),
        dynamic=int(processor.max_patches) > 1,
        thumbnail=True,
        pad_square=False,
        shared=False,
        hash_order=False,
        mean=_triple(processor.image_mean) if processor.do_normalize else None,
        std=_triple(processor.image_std) if processor.do_normalize else None,
        scale=float(processor.rescale_factor) if processor.do_rescale else None,
        resample=int(processor.resample),
    )
    if options.thumbnail is False or options.fit is not None:
        option = "thumbnail: false" if options.thumbnail is False else f"fit: {options.fit}"
        raise ConfigError(
            f"`{option}` is not possible with a `-hf` folder: transformers' InternVLProcessor always stretches, and "
            "always adds the thumbnail, so the trained model would be shown other pictures wherever it is used",
            where="model.image",
            remedy="Remove the key, or train the official folder.",
        )
    return _with_options(spec, config, options)


def plan(sizes: Sequence[Size], spec: InternVLSpec, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
    """What each picture of a row becomes; frames of videos are one tile each and take nothing from the pictures."""
    flags = [number is not None for number in frames] or [False] * len(sizes)
    pictures = len(sizes) - sum(flags)
    most = spec.max_tiles // pictures if spec.shared and pictures else spec.max_tiles
    return tuple(_plan_one(size, spec, most, is_frame=flag) for size, flag in zip(sizes, flags, strict=True))


def span_ids(plan: MediaPlan, spec: InternVLSpec) -> tuple[np.ndarray, np.ndarray]:
    """The context ids of a picture, int32 (num_tokens,), all of them placeholders; the chat format has the marks."""
    return np.full(plan.num_tokens, spec.context_id, dtype=np.int32), np.ones(plan.num_tokens, dtype=bool)


def pixels(
    picture: PIL.Image.Image, plan: MediaPlan, spec: InternVLSpec, retouch: Retouch | None = None
) -> dict[str, torch.Tensor]:
    """One RGB picture as {"pixel_values": float32 (tiles, 3, image_size, image_size)}, row by row, thumbnail last.

    retouch: what is done to each tile, as a picture, before it becomes numbers.
    """
    cut = spec.dynamic and not plan.is_frame
    values = grid_tiles(
        picture if cut or not spec.pad_square else on_square(picture, spec.mean or _IMAGENET_MEAN),
        plan.layout[0:2],
        (spec.image_size, spec.image_size),
        thumbnail=spec.thumbnail and cut,
        resample=spec.resample,
        tones=spec.tones,
        retouch=retouch,
    )
    if len(values) != plan.num_tiles:
        raise ValueError(f"{len(values)} tiles were cut and {plan.num_tiles} planned")
    return {"pixel_values": values}


def view(pixels: dict[str, torch.Tensor], spec: InternVLSpec) -> list[PIL.Image.Image]:
    """The tiles as pictures again."""
    return seen_tiles(pixels["pixel_values"], spec.tones)


def collate_pixels(pixels: Sequence[dict[str, torch.Tensor]], spec: InternVLSpec) -> dict[str, torch.Tensor]:
    """All tiles in sequence order; {} without pictures."""
    del spec
    return {"pixel_values": torch.cat([picture["pixel_values"] for picture in pixels])} if pixels else {}


def picture_settings(spec: InternVLSpec) -> dict[str, Any]:
    """The preprocessor_config.json with which transformers cuts pictures in this way; see `native_gaps`."""
    normalises = spec.mean is not None and spec.std is not None
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": spec.dynamic,
        "min_patches": spec.min_tiles if spec.dynamic else 1,
        "max_patches": spec.max_tiles if spec.dynamic else 1,
        "size": {"height": spec.image_size, "width": spec.image_size},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": spec.resample,
        "do_rescale": spec.scale is not None,
        "rescale_factor": spec.scale or 1 / 255,
        "do_normalize": normalises,
        "image_mean": list(spec.mean or _IMAGENET_MEAN),
        "image_std": list(spec.std or _IMAGENET_STD),
    }


def official_settings(spec: InternVLSpec) -> dict[str, Any]:
    """The keys of an official config.json that say how pictures are cut."""
    return {
        "force_image_size": spec.image_size,
        "dynamic_image_size": spec.dynamic,
        "min_dynamic_patch": spec.min_tiles,
        "max_dynamic_patch": spec.max_tiles,
        "use_thumbnail": spec.thumbnail,
        "pad2square": spec.pad_square,
    }


def native_gaps(spec: InternVLSpec) -> list[str]:
    """What transformers' InternVLProcessor would do otherwise, whatever preprocessor_config.json says; clauses."""
    gaps = []
    if spec.dynamic and spec.max_tiles > 1 and not spec.thumbnail:
        gaps.append("it adds a thumbnail to every picture of several tiles; this model was trained without")
    if spec.pad_square and not spec.dynamic:
        gaps.append("it stretches pictures to a square; this model was trained with pictures on a padded square")
    if spec.dynamic and spec.shared and spec.max_tiles > 1:
        gaps.append(
            f"it cuts each of several pictures in a prompt into up to {spec.max_tiles} tiles; in training they shared "
            "that number"
        )
    return gaps


def _plan_one(size: Size, spec: InternVLSpec, most: int, *, is_frame: bool) -> MediaPlan:
    cut = spec.dynamic and not is_frame
    columns, rows = _grid(size, spec.image_size, spec.min_tiles, most, spec.hash_order) if cut else (1, 1)
    tiles = columns * rows
    tiles += spec.thumbnail and tiles > 1
    padded = spec.pad_square and not cut and size[0] != size[1]
    return MediaPlan(
        size=size,
        num_tokens=tiles * spec.tokens_per_tile,
        num_tiles=tiles,
        layout=(columns, rows),
        is_frame=is_frame,
        resized=None if padded else (columns * spec.image_size, rows * spec.image_size),
    )


@lru_cache(maxsize=4096)
def _grid(size: Size, edge: int, least: int, most: int, hash_order: bool) -> tuple[int, int]:
    """(columns, rows) nearest to the picture's aspect ratio; the larger of two equally near ones for a large picture.

    The larger one is taken if the picture has more than half of its pixels. One tile where no grid is allowed.
    """
    width, height = size
    aspect, area = width / height, width * height
    best, nearest = (1, 1), float("inf")
    for columns, rows in candidates(least, most, hash_order=hash_order):
        distance = abs(aspect - columns / rows)
        larger = distance == nearest and area > 0.5 * edge * edge * columns * rows
        if distance < nearest or larger:
            best, nearest = (columns, rows), distance
    return best


@lru_cache(maxsize=64)
def candidates(least: int, most: int, *, hash_order: bool) -> tuple[tuple[int, int], ...]:
    """The grids (columns, rows) of `least` to `most` tiles in the order in which they are tried: fewest tiles first.

    Among grids with the same number of tiles, transformers goes by columns. The official loader keeps them in a set, so
    there CPython's order of a set decides. It depends on the order in which they first went in, which is repeated here:
    by the longer side (at least `least`), then by columns, then by rows.
    """
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= least
    ]
    if hash_order:
        grids.sort(key=lambda grid: (max(*grid, least), grid))
        grids = list(_in_turn(grids))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _in_turn(grids: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """A set that grew one by one: one made from a whole list may have another table, and so another order."""
    found: set[tuple[int, int]] = set()
    for grid in grids:
        found.add(grid)
    return found


def _with_options(spec: InternVLSpec, config: Mapping[str, Any], options: ImageOptions) -> InternVLSpec:
    given = options.model_dump(exclude_none=True)
    idle = sorted(set(given) & set(_NO_EFFECT))
    if idle:
        raise _refused(
            f"{', '.join(idle)} has no effect on this model: its pictures are cut into tiles",
            "Remove the key; `max_tiles` and `size` decide how much of a picture the model sees.",
        )
    size = options.size or spec.image_size
    tokens = _tokens(config, size, lambda text: _refused(text, "Choose another `size`."))
    most, least = options.max_tiles or spec.max_tiles, options.min_tiles or spec.min_tiles
    if least > most and (options.max_tiles or options.min_tiles):
        raise _refused(f"min_tiles is {least} and max_tiles is {most}", "Set both so that a grid is between them.")
    dynamic = spec.dynamic if options.max_tiles is None else most > 1
    if options.min_tiles is not None and not dynamic:
        raise _refused("min_tiles has no effect: pictures are not cut", "Set max_tiles above 1, or remove min_tiles.")
    if options.thumbnail is not None and not (dynamic and most > 1):
        raise _refused("thumbnail has no effect: pictures are one tile", "Set max_tiles above 1, or remove thumbnail.")
    if options.fit == "keep_aspect":
        raise _refused("fit: keep_aspect is not possible: the tower sees squares", "Use pad_square or stretch.")
    if options.fit is not None and dynamic:
        raise _refused(
            f"fit: {options.fit} has no effect: pictures are cut into tiles, which stretches them to the grid",
            "Set max_tiles: 1, or remove fit.",
        )
    return replace(
        spec,
        image_size=size,
        tokens_per_tile=tokens,
        min_tiles=least,
        max_tiles=most,
        dynamic=dynamic,
        thumbnail=spec.thumbnail if options.thumbnail is None else options.thumbnail,
        pad_square=spec.pad_square if options.fit is None else options.fit == "pad_square",
    )


def _refused(found: str, remedy: str) -> ConfigError:
    return ConfigError(found, where="model.image", remedy=remedy)


def _tokens(
    config: Mapping[str, Any],
    image_size: int,
    error: Callable[[str], Exception] = lambda text: WeightsError(text, where="config.json"),
) -> int:
    """Ids of a tile: patches after the pixel shuffle, which joins `downsample_ratio`² of them."""
    vision = config.get("vision_config") or {}
    patch = vision.get("patch_size", 14)
    patch = patch[0] if isinstance(patch, list) and patch else patch
    ratio = config.get("downsample_ratio", 0.5)
    if not isinstance(patch, int) or not isinstance(ratio, int | float) or patch < 1 or not 0 < ratio <= 1:
        raise WeightsError(f"patch_size is {patch!r}, downsample_ratio {ratio!r}", where="config.json")
    edge = image_size // patch * ratio
    if image_size % patch or edge != int(edge) or edge < 1:
        raise error(
            f"a tile of {image_size} pixels is not a whole number of tokens with patches of {patch} and the "
            f"downsample_ratio {ratio}: its edge must be a multiple of {round(patch / ratio)}"
        )
    return int(edge) ** 2


def _whole(config: Mapping[str, Any], key: str, default: int | None) -> Any:
    value = config.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise WeightsError(f"`{key}` is {value!r}", where="config.json", expected="a whole number")
    return default if value is None else value


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
