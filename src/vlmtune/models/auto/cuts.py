"""What the known image processors do to a picture, without their detours: the same tensors, bit by bit.

Each function takes (image processor, RGB picture, layout) and returns None for settings that it does not follow; the
caller then asks the image processor itself. `models.pixels` turns bytes into numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmtune.data.sample import Size
from vlmtune.models.pixels import Tones, grid_tiles, make_tones, patches, seen_patches, seen_tiles, tiles
from vlmtune.models.resample import planes_of, resized_planes

Pixels = dict[str, torch.Tensor]

_SMOLVLM_LIMIT = 4096  # SmolVLM's image processor never resizes beyond this edge


def tiled(processor: Any, picture: PIL.Image.Image, layout: tuple[int, ...]) -> Pixels | None:
    """Aya Vision, GOT-OCR2: the picture over the grid of tiles that is most like it, and once more as a thumbnail."""
    edges, tones = _edges(processor.size), _tones(processor)
    if edges is None or tones is None:
        return None
    width, height = edges
    grid = (1, 1)
    if processor.crop_to_patches and processor.max_patches > 1:
        grid = get_optimal_tiled_canvas(
            picture.size[::-1], (height, width), processor.min_patches, processor.max_patches
        )
    elif not processor.do_resize:
        return None
    values = grid_tiles(picture, grid, edges, thumbnail=True, resample=processor.resample, tones=tones)
    return {"pixel_values": values, "num_patches": torch.tensor([len(values)])}


def gridded(processor: Any, picture: PIL.Image.Image, layout: tuple[int, ...]) -> Pixels | None:
    """Qwen-VL: the picture resized to whole patches, one row of numbers per patch."""
    tones = _tones(processor)
    if tones is None or not processor.do_resize:
        return None
    rows, columns = layout
    edge = int(processor.patch_size)
    values = patches(
        resized_planes(picture, (columns * edge, rows * edge), processor.resample),
        edge=edge,
        merge=int(processor.merge_size),
        frames=int(processor.temporal_patch_size),
        tones=tones,
    )
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, rows, columns]])}


def split(processor: Any, picture: PIL.Image.Image, layout: tuple[int, ...]) -> Pixels | None:
    """SmolVLM: resized to its longest edge, then to whole tiles; the thumbnail is made from the latter."""
    tones, longest = _tones(processor), processor.size["longest_edge"]
    if tones is None or not processor.do_resize or not processor.do_pad or not longest:
        return None
    rows, columns = layout
    edge = int(processor.max_image_size["longest_edge"])
    first = _resized(picture, below_limit(*to_longest_edge(*picture.size, longest)), processor)
    whole = _resized(first, (max(columns, 1) * edge, max(rows, 1) * edge), processor)
    parts = [(planes_of(whole), (rows, columns))] if rows else []
    parts.append((resized_planes(whole, (edge, edge), processor.resample), (1, 1)))
    values = tiles(parts, (edge, edge), tones)[None]
    return {
        "pixel_values": values,
        "pixel_attention_mask": torch.ones(1, values.shape[1], edge, edge, dtype=torch.long),
    }


def whole(processor: Any, picture: PIL.Image.Image, layout: tuple[int, ...]) -> Pixels | None:
    """CLIP and SigLIP: resized, and cut to the middle where the image processor does so."""
    tones = _tones(processor)
    if tones is None or not processor.do_resize or processor.do_pad:
        return None
    edges = _edges(processor.size)
    if edges is None:
        shortest = _edge_alone(processor.size)
        if shortest is None:
            return None
        edges = to_shortest_edge(picture.size, shortest)
    width, height = edges
    left = top = 0
    if processor.do_center_crop:
        middle = _edges(processor.crop_size)
        if middle is None or middle[0] > edges[0] or middle[1] > edges[1]:
            return None  # the image processor frames what is too small in black
        left, top = (edges[0] - middle[0]) // 2, (edges[1] - middle[1]) // 2
        width, height = middle
    planes = [
        plane[top : top + height, left : left + width] for plane in resized_planes(picture, edges, processor.resample)
    ]
    return {"pixel_values": tiles([(planes, (1, 1))], (width, height), tones)}


def seen(processor: Any, pixels: Pixels) -> list[PIL.Image.Image]:
    """What the tower sees of one picture, from its tensors; nothing where the tones are of another kind."""
    tones = _tones(processor)
    if tones is None:
        return []
    values = pixels["pixel_values"]
    if "image_grid_thw" not in pixels:
        return seen_tiles(values.reshape(-1, *values.shape[-3:]), tones)
    _, rows, columns = pixels["image_grid_thw"][0].tolist()
    edge, merge, frames = int(processor.patch_size), int(processor.merge_size), int(processor.temporal_patch_size)
    return [seen_patches(values, (rows, columns), edge=edge, merge=merge, frames=frames, tones=tones)]


def to_longest_edge(width: int, height: int, longest: int) -> Size:
    """SmolVLM's first size: the longer edge as given, the other one even."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def below_limit(width: int, height: int) -> Size:
    aspect = width / height
    if width >= height and width > _SMOLVLM_LIMIT:
        width, height = _SMOLVLM_LIMIT, int(_SMOLVLM_LIMIT / aspect)
    elif height > width and height > _SMOLVLM_LIMIT:
        width, height = int(_SMOLVLM_LIMIT * aspect), _SMOLVLM_LIMIT
    return max(width, 1), max(height, 1)


def to_shortest_edge(size: Size, shortest: int) -> Size:
    """(width, height) with the shorter edge as given and the other in proportion, rounded down."""
    width, height = size
    longest = int(shortest * max(size) / min(size))
    return (shortest, longest) if width <= height else (longest, shortest)


def _edges(size: Any) -> Size | None:
    """(width, height) of an image processor's size, if that is all it says."""
    given = {name: value for name, value in dict(size or {}).items() if value is not None}
    return (int(given["width"]), int(given["height"])) if set(given) == {"width", "height"} else None


def _edge_alone(size: Any) -> int | None:
    given = {name: value for name, value in dict(size or {}).items() if value is not None}
    return int(given["shortest_edge"]) if set(given) == {"shortest_edge"} else None


def _resized(picture: PIL.Image.Image, size: Size, processor: Any) -> PIL.Image.Image:
    return picture.resize(size, processor.resample)


def _tones(processor: Any) -> Tones | None:
    """The tones of this image processor; None where its numbers or its filter are of another kind."""
    if not isinstance(processor.resample, int) or not (processor.do_rescale or processor.do_normalize):
        return None
    mean_and_std = None
    if processor.do_normalize:
        if np.shape(processor.image_mean) != (3,) or np.shape(processor.image_std) != (3,):
            return None
        mean_and_std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
    return make_tones(float(processor.rescale_factor) if processor.do_rescale else None, mean_and_std)
