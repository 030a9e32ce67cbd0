"""Pictures resized as Pillow does, to the last bit, and taken apart into channels.

Pillow resizes in two passes, across and then down, with weights in whole numbers. Most of the time goes into the second
pass where pictures grow, as they do on their way to a grid of tiles. When the two heights have a large common divisor
(480 and 896: 32), every 28th row of the result has the same weights, so the pass is a few operations over many rows at
once. Each pair of heights is compared with Pillow before it is used; every other case is left to Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL.Image
import torch

from vlmtune.data.sample import Size

_MOST_PHASES = 32  # over this many the operations are so short that Pillow is as fast
_BITS = 22  # of the fraction in Pillow's weights (32 less 8 for the values and 2 for the sum)


def resized_planes(picture: PIL.Image.Image, size: Size, resample: int) -> list[np.ndarray]:
    """The channels of an RGB picture at (width, height) `size`: uint8 (H, W) each, the rows perhaps apart in memory."""
    width, height = size
    rows = _row_sums(picture.height, height) if resample == PIL.Image.Resampling.BICUBIC else None
    if rows is None:
        return planes_of(picture.resize(size, resample))
    across = picture.resize((width, picture.height), PIL.Image.Resampling.BICUBIC)
    down = rows.apply(np.concatenate(planes_of(across), axis=1))
    return [down[:, channel * width : (channel + 1) * width] for channel in range(3)]


def planes_of(picture: PIL.Image.Image) -> list[np.ndarray]:
    """The channels, uint8 (H, W) each; Pillow takes them apart faster than NumPy strides over them."""
    return [np.asarray(band) for band in picture.split()]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Rows `out`, `out` + period, … (count of them) of the result; each is the weighted sum of as many source rows."""

    out: int
    count: int
    source: int
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _RowSums:
    """The second pass for one pair of heights. step: source rows from one row of a phase to the next."""

    height: int
    period: int
    step: int
    sums: tuple[_Sums, ...]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """uint8 (h, n) to uint8 (height, n)."""
        rows = torch.from_numpy(values).int()
        result = torch.empty(self.height, rows.shape[1], dtype=torch.uint8)
        room = torch.empty(max(part.count for part in self.sums), rows.shape[1], dtype=torch.int32)
        for part in self.sums:
            total = room[: part.count].fill_(1 << (_BITS - 1))
            for number, weight in enumerate(part.weights):
                first = part.source + number
                total.add_(rows[first : first + (part.count - 1) * self.step + 1 : self.step], alpha=weight)
            total.bitwise_right_shift_(_BITS).clamp_(0, 255)
            result[part.out : part.out + (part.count - 1) * self.period + 1 : self.period] = total
        return result.numpy()


@lru_cache(maxsize=64)
def _row_sums(source: int, height: int) -> _RowSums | None:
    """None where Pillow is as fast, or does not agree."""
    common = math.gcd(source, height)
    if height <= source or height // common > _MOST_PHASES:
        return None
    starts, weights = _weights(source, height)
    sums: list[_Sums] = []
    for phase in range(height // common):
        ys = np.arange(phase, height, height // common)
        # The rows at both ends lack neighbours and have weights of their own; those between them are alike.
        changes = np.flatnonzero((np.diff(weights[ys], axis=0) != 0).any(1) | (np.diff(starts[ys]) != source // common))
        for group in np.split(ys, changes + 1):
            own = weights[group[0]]
            sums.append(
                _Sums(int(group[0]), len(group), int(starts[group[0]]), tuple(own[: own.nonzero()[0][-1] + 1].tolist()))
            )
    found = _RowSums(height, height // common, source // common, tuple(sums))
    noise = np.random.default_rng(0).integers(0, 256, (source, 16), dtype=np.uint8)
    wanted = PIL.Image.fromarray(noise).resize((16, height), PIL.Image.Resampling.BICUBIC)
    return found if np.array_equal(found.apply(noise), np.asarray(wanted)) else None


def _weights(source: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The first source row (height,) of each row of an enlarged picture, and its whole-number weights (height, taps).

    Keys' cubic convolution (IEEE ASSP 29, 1981) with a = −0.5 over two rows to either side of a row's middle.
    """
    middle = (np.arange(height) + 0.5) * (source / height)
    starts = np.maximum((middle - 1.5).astype(int), 0)
    ends = np.minimum((middle + 2.5).astype(int), source)
    rows = starts[:, None] + np.arange((ends - starts).max())
    away = np.abs(rows - middle[:, None] + 0.5)
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    shares = np.where(away < 1, near, np.where(away < 2, far, 0.0)) * (rows < ends[:, None])
    shares /= shares.sum(axis=1, keepdims=True)
    return starts, np.trunc(shares * (1 << _BITS) + np.copysign(0.5, shares)).astype(np.int64)
