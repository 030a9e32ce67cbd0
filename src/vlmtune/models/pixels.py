"""From bytes to normalised tensors, written where the model reads them.

An image processor rescales, subtracts a mean and divides by a deviation, channel by channel. A channel has 256 values,
so all of that is a table of 3 × 256 numbers that transformers' own functions fill in: whatever the settings are, the
result is theirs to the last bit. A picture is cut while its pixels are still bytes, a quarter of the memory, and each
tile is written straight into the tensor that holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import ChannelDimension

from vlmtune.data.sample import Retouch, Size
from vlmtune.models.resample import planes_of, resized_planes

Triple = tuple[float, float, float]
Planes = Sequence[np.ndarray]
"""Three channels, uint8 (H, W)."""


@dataclass(frozen=True, slots=True)
class Tones:
    """What each of the 256 values of each channel becomes.

    table: float32 (3, 256). arithmetic: (divisor, means, deviations) that give the table bit by bit, if there are such;
    they are a fifth faster than looking up.
    """

    table: np.ndarray
    arithmetic: tuple[np.float32, np.ndarray, np.ndarray] | None

    def write(self, channel: int, values: np.ndarray, out: np.ndarray) -> None:
        """uint8 `values` of one channel as float32 into `out` of the same shape."""
        if self.arithmetic is None:
            # No byte is out of range; with `clip` NumPy writes into `out` at once, where `raise` would copy first.
            np.take(self.table[channel], values, out=out, mode="clip")
            return
        divisor, mean, std = self.arithmetic
        np.divide(values, divisor, out=out, dtype=np.float32)
        np.subtract(out, mean[channel], out=out)
        np.divide(out, std[channel], out=out)


@lru_cache(maxsize=16)
def make_tones(scale: float | None, mean_and_std: tuple[Triple, Triple] | None) -> Tones:
    """The tones of an image processor.

    Args:
        scale: the factor of its `do_rescale` (1/255); None without.
        mean_and_std: per channel, as in `do_normalize`; None without.
    """
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    values = ramp if scale is None else rescale(ramp, scale, input_data_format=ChannelDimension.FIRST)
    if mean_and_std is not None:
        values = normalize(values, *mean_and_std, input_data_format=ChannelDimension.FIRST)
    table = np.ascontiguousarray(values[:, 0], dtype=np.float32)
    mean, std = np.array(mean_and_std or ((0, 0, 0), (1, 1, 1)), dtype=np.float32)
    found = Tones(table, (np.float32(1 if scale is None else 1 / scale), mean, std))
    again = np.empty_like(table)
    for channel in range(3):
        found.write(channel, ramp[channel, 0], again[channel])
    return found if np.array_equal(again, table) else Tones(table, None)


def tiles(
    parts: Sequence[tuple[Planes, tuple[int, int]]], tile: Size, tones: Tones, *, before: int = 0
) -> torch.Tensor:
    """Pictures cut into tiles: float32 (n, 3, H, W), row by row, one picture after the other.

    Args:
        parts: the channels of pictures with their (rows, columns) of tiles; each is rows × columns tiles large.
        tile: (width, height) of a tile.
        before: tiles in front that are left for the caller to fill.
    """
    width, height = tile
    result = torch.empty(before + sum(rows * columns for _, (rows, columns) in parts), 3, height, width)
    out = result.numpy()
    first = before
    for planes, (rows, columns) in parts:
        for channel, plane in enumerate(planes):
            if plane.shape != (rows * height, columns * width):
                raise ValueError(f"a picture of {plane.shape[::-1]} is not {columns}×{rows} tiles of {tile}")
            cut = plane.reshape(rows, height, columns, width)
            for number in range(rows * columns):
                row, column = divmod(number, columns)
                tones.write(channel, cut[row, :, column], out[first + number, channel])
        first += rows * columns
    return result


def grid_tiles(
    picture: PIL.Image.Image,
    grid: tuple[int, ...],
    tile: Size,
    *,
    thumbnail: bool,
    resample: int,
    tones: Tones,
    retouch: Retouch | None = None,
) -> torch.Tensor:
    """An RGB picture stretched over a grid and cut, as `tiles`; and once more as a whole after several tiles.

    Args:
        grid: (columns, rows).
        tile: (width, height) of a tile.
        thumbnail: whether the whole picture follows the tiles of a grid of more than one.
        resample: Pillow's number of the filter.
        retouch: what is done to each tile before it becomes numbers.
    """
    columns, rows = grid
    width, height = tile
    parts = [(resized_planes(picture, (columns * width, rows * height), resample), (rows, columns))]
    if thumbnail and columns * rows > 1:
        parts.append((resized_planes(picture, tile, resample), (1, 1)))
    if retouch is not None:
        parts = [(_retouched(planes, tile, retouch), shape) for planes, shape in parts]
    return tiles(parts, tile, tones)


def on_square(picture: PIL.Image.Image, mean: Sequence[float]) -> PIL.Image.Image:
    """An RGB picture in the middle of a square of the mean colour (0 to 1 per channel); a square one as it is."""
    width, height = picture.size
    if width == height:
        return picture
    edge = max(width, height)
    red, green, blue = (int(value * 255) for value in mean)
    square = PIL.Image.new("RGB", (edge, edge), (red, green, blue))
    square.paste(picture, ((edge - width) // 2, (edge - height) // 2))
    return square


def _retouched(planes: Planes, tile: Size, retouch: Retouch) -> list[np.ndarray]:
    """The channels of a picture whose tiles were retouched one by one, row by row."""
    values = np.stack(planes, axis=-1)
    width, height = tile
    for top in range(0, values.shape[0], height):
        for left in range(0, values.shape[1], width):
            place = values[top : top + height, left : left + width]
            place[:] = np.asarray(retouch(PIL.Image.fromarray(np.ascontiguousarray(place))))
    return planes_of(PIL.Image.fromarray(values))


def patches(planes: Planes, *, edge: int, merge: int, frames: int, tones: Tones) -> torch.Tensor:
    """A picture as the rows that Qwen-VL towers read: float32 (patches, 3 · frames · edge · edge).

    Patches come in blocks of merge × merge; a row holds channel, frame, height and width of one patch in this order. A
    still picture stands in each of the `frames` (arXiv 2409.12191, 2.1).

    Args:
        edge: pixels of a patch; both edges of the picture are multiples of edge × merge.
        frames: how many equal frames a patch spans.
    """
    down, across = (length // (edge * merge) for length in planes[0].shape)
    result = torch.empty(down * across * merge * merge, 3 * frames * edge * edge)
    out = result.numpy().reshape(-1, 3, frames, edge, edge)
    for channel, plane in enumerate(planes):
        blocks = plane.reshape(down, merge, edge, across, merge, edge).transpose(0, 3, 1, 4, 2, 5)
        tones.write(channel, blocks.reshape(-1, edge, edge), out[:, channel, 0])
        out[:, channel, 1:] = out[:, channel, :1]
    return result


def seen_tiles(values: torch.Tensor, tones: Tones) -> list[PIL.Image.Image]:
    """The pictures that `tiles` was given: (n, 3, H, W) back to bytes, exactly."""
    return [PIL.Image.fromarray(_bytes(tile, tones.table)) for tile in values.numpy().transpose(0, 2, 3, 1)]


def seen_patches(
    values: torch.Tensor, grid: tuple[int, int], *, edge: int, merge: int, frames: int, tones: Tones
) -> PIL.Image.Image:
    """The picture that `patches` was given; grid: its (rows, columns) of patches."""
    down, across = grid
    first = values.numpy().reshape(down // merge, across // merge, merge, merge, 3, frames, edge, edge)[
        :, :, :, :, :, 0
    ]
    laid = first.transpose(0, 2, 5, 1, 3, 6, 4).reshape(down * edge, across * edge, 3)
    return PIL.Image.fromarray(_bytes(laid, tones.table))


def _bytes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Normalised (…, 3) back to uint8: a channel's table is a straight line."""
    steps = (table[:, 255] - table[:, 0]) / 255
    return np.rint((values - table[:, 0]) / steps).clip(0, 255).astype(np.uint8)
