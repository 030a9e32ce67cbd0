"""From pictures to normalised tensors: three table look-ups per pixel, written where the model reads them.

An image processor rescales, subtracts a mean and divides by a deviation, channel by channel. A channel has 256 values,
so all of that is a table of 3 × 256 numbers that transformers' own functions fill in: whatever the settings are, the
result is theirs to the last bit. A picture is cut while its pixels are still bytes, a quarter of the memory, and each
tile is written straight into the tensor that holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import ChannelDimension

from vlmtune.data.sample import Size

Triple = tuple[float, float, float]


@lru_cache(maxsize=16)
def tone_table(scale: float | None, mean_and_std: tuple[Triple, Triple] | None) -> np.ndarray:
    """What each of the 256 values of each channel becomes: float32 (3, 256).

    Args:
        scale: the factor of the image processor's `do_rescale` (1/255); None without.
        mean_and_std: per channel, as in `do_normalize`; None without.
    """
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    values = ramp if scale is None else rescale(ramp, scale, input_data_format=ChannelDimension.FIRST)
    if mean_and_std is not None:
        mean, std = mean_and_std
        values = normalize(values, mean, std, input_data_format=ChannelDimension.FIRST)
    return np.ascontiguousarray(values[:, 0], dtype=np.float32)


def tiles(parts: Sequence[tuple[PIL.Image.Image, tuple[int, int]]], tile: Size, table: np.ndarray) -> torch.Tensor:
    """Pictures cut into tiles: float32 (n, 3, H, W), row by row, one picture after the other.

    Args:
        parts: RGB pictures with their (rows, columns); each is rows × columns times as large as a tile.
        tile: (width, height) of a tile.
        table: see `tone_table`.
    """
    width, height = tile
    result = torch.empty(sum(rows * columns for _, (rows, columns) in parts), 3, height, width)
    out = result.numpy()
    first = 0
    for picture, (rows, columns) in parts:
        if picture.size != (columns * width, rows * height):
            raise ValueError(f"a picture of {picture.size} is not {columns}×{rows} tiles of {tile}")
        for channel, plane in enumerate(_planes(picture)):
            cut = plane.reshape(rows, height, columns, width)
            for number in range(rows * columns):
                row, column = divmod(number, columns)
                _look_up(table[channel], cut[row, :, column], out[first + number, channel])
        first += rows * columns
    return result


def patches(picture: PIL.Image.Image, *, edge: int, merge: int, frames: int, table: np.ndarray) -> torch.Tensor:
    """An RGB picture as the rows that Qwen-VL towers read: float32 (patches, 3 · frames · edge · edge).

    Patches come in blocks of merge × merge; a row holds channel, frame, height and width of one patch in this order. A
    still picture stands in each of the `frames` (arXiv 2409.12191, 2.1).

    Args:
        edge: pixels of a patch; both edges of the picture are multiples of edge × merge.
        frames: how many equal frames a patch spans.
        table: see `tone_table`.
    """
    across, down = (length // (edge * merge) for length in picture.size)
    result = torch.empty(down * across * merge * merge, 3 * frames * edge * edge)
    out = result.numpy().reshape(-1, 3, frames, edge, edge)
    for channel, plane in enumerate(_planes(picture)):
        blocks = plane.reshape(down, merge, edge, across, merge, edge).transpose(0, 3, 1, 4, 2, 5)
        _look_up(table[channel], blocks.reshape(-1, edge, edge), out[:, channel, 0])
        out[:, channel, 1:] = out[:, channel, :1]
    return result


def seen_tiles(values: torch.Tensor, table: np.ndarray) -> list[PIL.Image.Image]:
    """The pictures that `tiles` was given: (n, 3, H, W) back to bytes, exactly."""
    return [PIL.Image.fromarray(_bytes(tile, table)) for tile in values.numpy().transpose(0, 2, 3, 1)]


def seen_patches(
    values: torch.Tensor, grid: tuple[int, int], *, edge: int, merge: int, frames: int, table: np.ndarray
) -> PIL.Image.Image:
    """The picture that `patches` was given; grid: its (rows, columns) of patches."""
    down, across = grid
    first = values.numpy().reshape(down // merge, across // merge, merge, merge, 3, frames, edge, edge)[:, :, :, :, :, 0]
    laid = first.transpose(0, 2, 5, 1, 3, 6, 4).reshape(down * edge, across * edge, 3)
    return PIL.Image.fromarray(_bytes(laid, table))


def _bytes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Normalised (…, 3) back to uint8: a channel's table is a straight line."""
    steps = (table[:, 255] - table[:, 0]) / 255
    return np.rint((values - table[:, 0]) / steps).clip(0, 255).astype(np.uint8)


def _planes(picture: PIL.Image.Image) -> list[np.ndarray]:
    """The three channels, uint8 (H, W); Pillow takes them apart faster than NumPy strides over them."""
    return [np.asarray(band) for band in picture.split()]


def _look_up(table: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    # No byte is out of range; with `clip` NumPy writes into `out` at once, where `raise` would fill a copy first.
    np.take(table, values, out=out, mode="clip")
