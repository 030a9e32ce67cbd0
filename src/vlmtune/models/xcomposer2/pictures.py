"""XComposer2's pictures: stretched to a square, or with 4khd enlarged, padded with white and cut into tiles.

The rules are those of the official fine-tuning code (`data_mix.py` and `ixc_utils.py` of InternLM-XComposer-2.0) and of
the released model's own (arXiv 2404.06512, 3.2), its floating-point arithmetic included: a picture that it gives one
row of tiles more than exact arithmetic would has that row here as well, since the released weights saw it so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from vlmtune.config.schema import ImageOptions
from vlmtune.data.sample import Encoded, MediaPlan, Retouch, Size, stacked
from vlmtune.errors import ConfigError, DataError, WeightsError
from vlmtune.models.pixels import Planes, Tones, Triple, grid_tiles, make_tones, seen_tiles, tiles
from vlmtune.models.resample import planes_of
from vlmtune.models.xcomposer2.configuration import XComposer2Config

GRIDS = "tile_grids"
"""Model argument: int64 (pictures, 2), the rows and columns of tiles of each picture."""

# CLIP's, as in the official training code and its demos.
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)

_MERGED = 2  # with 4khd, so many patches of a row and of a column become one token
_UNKNOWN = 0  # the id of <unk>, which stands wherever the features of a picture go; the model never looks it up


@dataclass(frozen=True, slots=True, kw_only=True)
class XComposer2Spec:
    """Everything that decides how pictures become pixels and ids. Picklable."""

    high_resolution: bool
    """4khd: pictures are cut into tiles; else each is one square."""
    size: int
    """Pixels of the square's edge, or of a tile's."""
    patch: int
    """Pixels of a patch's edge."""
    max_tiles: int
    """Most tiles of a picture, the global view not counted; 1 without `high_resolution`."""
    mean: Triple = _CLIP_MEAN
    std: Triple = _CLIP_STD

    @property
    def tones(self) -> Tones:
        return make_tones(1 / 255, (self.mean, self.std))


class HdSize(NamedTuple):
    """What the HD transform makes of a picture.

    resized: (width, height) of the picture itself. padding: white to the left, above, to the right, below, in pixels.
    grid: (rows, columns) of the tiles that the padded picture is cut into.
    """

    resized: Size
    padding: tuple[int, int, int, int]
    grid: tuple[int, int]


def spec_of(config: XComposer2Config, options: ImageOptions, *, where: str) -> XComposer2Spec:
    """
    Args:
        where: the model folder, for messages.

    Raises:
        WeightsError: sizes in the configuration that do not fit each other.
        ConfigError: an option without effect on this model, or a size that is not a whole number of patches.
    """
    tower: Any = config.vision_config
    patch, size = int(tower.patch_size), int(tower.image_size)
    unit = patch * _MERGED if config.high_resolution else patch
    if patch < 1 or size < 1 or size % unit:
        raise WeightsError(
            f"the tower's pictures of {size} pixels are not a whole number of tokens with patches of {patch}",
            where=where,
            expected=f"a multiple of {unit}",
        )
    _refuse_idle(options, high_resolution=config.high_resolution)
    if not config.high_resolution:
        return XComposer2Spec(high_resolution=False, size=_square(options, size, patch), patch=patch, max_tiles=1)
    most = config.max_tiles if options.max_tiles is None else options.max_tiles
    return XComposer2Spec(high_resolution=True, size=size, patch=patch, max_tiles=most)


def plan(sizes: Sequence[Size], spec: XComposer2Spec, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
    """What each picture of a row becomes; each may have all tiles, and a frame of a video has one.

    Raises:
        DataError: a picture so long that nothing would be left of its shorter side.
    """
    numbers = frames or [None] * len(sizes)
    return tuple(
        _plan_one(size, spec, is_frame=number is not None) for size, number in zip(sizes, numbers, strict=True)
    )


def span_ids(plan: MediaPlan, spec: XComposer2Spec) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a picture, int32 (num_tokens,), all of them placeholders: features and separators are spliced in.

    The vocabulary has no token for pictures, so these are ids that the model does not look at: see `image_mask`.
    """
    del spec
    return np.full(plan.num_tokens, _UNKNOWN, dtype=np.int32), np.ones(plan.num_tokens, dtype=bool)


def pixels(
    picture: PIL.Image.Image, plan: MediaPlan, spec: XComposer2Spec, retouch: Retouch | None = None
) -> dict[str, torch.Tensor]:
    """One RGB picture as {"pixel_values": float32 (tiles, 3, size, size)}.

    With 4khd the global view comes first, then the tiles row by row, and "tile_grids" (1, 2) tells rows and columns.

    retouch: what is done to the picture before anything else.
    """
    picture = retouch(picture) if retouch else picture
    if spec.high_resolution:
        found = _hd_size(picture.size, spec, is_frame=plan.is_frame)
        if found.grid != plan.layout:
            raise ValueError(f"{picture.size} is cut into {found.grid} rows and columns of tiles, not {plan.layout}")
        return {"pixel_values": _views(picture, found, spec), GRIDS: torch.tensor([found.grid])}
    square = (spec.size, spec.size)
    resample = int(PIL.Image.Resampling.BICUBIC)
    return {"pixel_values": grid_tiles(picture, (1, 1), square, thumbnail=False, resample=resample, tones=spec.tones)}


def view(pixels: dict[str, torch.Tensor], spec: XComposer2Spec) -> list[PIL.Image.Image]:
    """What the tower sees as pictures again; with 4khd the global view first."""
    return seen_tiles(pixels["pixel_values"], spec.tones)


def collate_pixels(pixels: Sequence[dict[str, torch.Tensor]], spec: XComposer2Spec) -> dict[str, torch.Tensor]:
    """All tiles in sequence order, with 4khd the grids as well; {} without pictures."""
    names = ("pixel_values", GRIDS) if spec.high_resolution else ("pixel_values",)
    return {name: torch.cat([picture[name] for picture in pixels]) for name in names} if pixels else {}


def image_mask(rows: Sequence[Sequence[Encoded]], *, left: bool = False) -> torch.Tensor:
    """Where features of pictures go: bool (B, L), False in text and padding.

    Args:
        rows: `rows[b]` are the samples laid end to end in row b.
        left: rows are padded on the left, as prompts are; else on the right.
    """
    masks = [np.concatenate([sample.at_pictures for sample in row]) for row in rows]
    return torch.from_numpy(stacked(masks, left=left))


def about(spec: XComposer2Spec) -> str:
    """How pictures are seen, for `vlmtune info`."""
    if not spec.high_resolution:
        return f"stretched to a square of {spec.size} pixels"
    tiles = f"{spec.max_tiles} tile{'' if spec.max_tiles == 1 else 's'}"
    return (
        f"enlarged to fill up to {tiles} of {spec.size} pixels, padded with white, and shown once more "
        "as a whole in front of the tiles"
    )


@lru_cache(maxsize=4096)
def hd_size(width: int, height: int, max_tiles: int, tile: int) -> HdSize:
    """The largest size at which a picture, in its own proportions, needs no more than `max_tiles` tiles.

    The longer side takes a whole number of tiles, and white fills the shorter one up, half on either side (the odd
    pixel to the right or below). Small pictures are enlarged.

    Raises:
        DataError: nothing would be left of the shorter side.
    """
    ratio = max(width, height) / min(width, height)
    along = 1
    while (along + 1) * math.ceil((along + 1) / ratio) <= max_tiles:
        along += 1
    longer = along * tile
    shorter = int(longer / ratio)
    if shorter < 1:
        raise DataError(
            f"nothing is left of a picture of {width}×{height} when its longer side has {longer} pixels",
            remedy="Crop the picture.",
        )
    across = math.ceil(shorter / tile)
    before = (across * tile - shorter) // 2
    after = across * tile - shorter - before
    if width < height:
        return HdSize((shorter, longer), (before, 0, after, 0), (along, across))
    return HdSize((longer, shorter), (0, before, 0, after), (across, along))


def _plan_one(size: Size, spec: XComposer2Spec, *, is_frame: bool) -> MediaPlan:
    edge = spec.size // spec.patch
    if not spec.high_resolution:
        square = (spec.size, spec.size)
        return MediaPlan(
            size=size, num_tokens=edge * edge, num_tiles=1, layout=(1, 1), is_frame=is_frame, resized=square
        )
    rows, columns = _hd_size(size, spec, is_frame=is_frame).grid
    edge //= _MERGED
    # A separator ends each row of tokens, of the global view and of the tiles, and one stands between the two.
    tokens = (rows * columns + 1) * edge * edge + (rows + 1) * edge + 1
    # `resized` stays open: a place in the resized picture would be one beside its padding, in none of the views.
    return MediaPlan(
        size=size, num_tokens=tokens, num_tiles=rows * columns + 1, layout=(rows, columns), is_frame=is_frame
    )


def _hd_size(size: Size, spec: XComposer2Spec, *, is_frame: bool) -> HdSize:
    return hd_size(*size, 1 if is_frame else spec.max_tiles, spec.size)


def _views(picture: PIL.Image.Image, place: HdSize, spec: XComposer2Spec) -> torch.Tensor:
    """The global view and the tiles of a picture: float32 (1 + rows · columns, 3, size, size)."""
    rows, columns = place.grid
    planes = _padded_planes(picture, place, spec.size)
    values = tiles([(planes, (rows, columns))], (spec.size, spec.size), spec.tones, before=1)
    for plane, out, mean, std in zip(planes, values[0].numpy(), spec.mean, spec.std, strict=True):
        whole = _shrunk(_shrunk(plane, rows).T, columns).T
        np.divide(whole - np.float32(255 * mean), np.float32(255 * std), out=out)
    return values


def _padded_planes(picture: PIL.Image.Image, place: HdSize, tile: int) -> Planes:
    """The picture over its tiles, with white where it does not reach."""
    (width, height), (left, top, _, _), (rows, columns) = place
    upright = picture.width < picture.height
    # Pillow resizes across and then down, rounding in between; the official code lays upright pictures on their side.
    turned = picture.transpose(PIL.Image.Transpose.TRANSPOSE) if upright else picture
    size = (height, width) if upright else (width, height)
    small = turned.resize(size, PIL.Image.Resampling.BILINEAR)
    planes = planes_of(small.transpose(PIL.Image.Transpose.TRANSPOSE) if upright else small)
    if (width, height) == (columns * tile, rows * tile):
        return planes
    padded = [np.full((rows * tile, columns * tile), 255, dtype=np.uint8) for _ in planes]
    for plane, room in zip(planes, padded, strict=True):
        room[top : top + height, left : left + width] = plane
    return padded


def _shrunk(values: np.ndarray, times: int) -> np.ndarray:
    """(times · n, m) to (n, m) as bicubic interpolation without smoothing does, which looks at four rows for each.

    Keys' cubic convolution (IEEE ASSP 29, 1981) with a = −0.75, PyTorch's. Shrunk a whole number of times, every row of
    the result lies on one row of the source, or in the middle of two, where the weights are 19/32 and −3/32: in
    float32 the sums are exact for bytes.
    """
    if times % 2:
        return values[times // 2 :: times]
    first, reach = times // 2 - 2, len(values) - times + 1
    if first < 0:  # the edge stands for what lies beyond it
        values, first = np.pad(values, ((1, 1), (0, 0)), mode="edge"), 0
    one, two, three, four = (values[start : start + reach : times] for start in range(first, first + 4))
    inner, outer = np.add(two, three, dtype=np.float32), np.add(one, four, dtype=np.float32)
    return (19 * inner - 3 * outer) / 32


def _square(options: ImageOptions, own: int, patch: int) -> int:
    size = options.size or own
    if size % patch:
        below = size // patch * patch
        near = f"{below} or {below + patch}" if below else str(patch)
        raise _refused(f"size is {size}, which is no multiple of the patch of {patch} pixels", f"Set {near}.")
    return size


def _refuse_idle(options: ImageOptions, *, high_resolution: bool) -> None:
    given = set(options.model_dump(exclude_none=True))
    idle = ", ".join(sorted(given - {"max_tiles" if high_resolution else "size"}))
    if idle and high_resolution:
        raise _refused(
            f"{idle} has no effect on a 4khd model: its pictures are cut into tiles of one size, padded with white, "
            "and always shown as a whole as well",
            "Remove the key; `max_tiles` decides how much of a picture the model sees.",
        )
    if idle:
        raise _refused(
            f"{idle} has no effect on this model: a picture is stretched to one square, and only 4khd models cut it",
            "Remove the key; `size` decides how much of a picture the model sees.",
        )


def _refused(found: str, remedy: str) -> ConfigError:
    return ConfigError(found, where="model.image", remedy=remedy)
