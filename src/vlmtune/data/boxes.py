"""Boxes: from what a row says to what a model reads, and back onto a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmtune.data.sample import Box, MediaPlan, Size
from vlmtune.errors import DataError
from vlmtune.models.family import BoxFormat

Corners = tuple[float, float, float, float]

_SLACK = 0.5  # pixels that a corner may lie outside of the picture: annotation tools round


def write_box(box: Box, pictures: Sequence[MediaPlan], style: BoxFormat) -> str:
    """The box as text.

    Args:
        pictures: the plans of the row's pictures, frames of videos not among them.

    Raises:
        DataError: there is no such picture, or the box is reversed or lies outside of it.
    """
    corners = _share(box, pictures)
    plan = pictures[box.picture]
    names = ("x1", "y1", "x2", "y2")
    if style.unit == "unit":
        return style.template.format(**{n: f"{c:.{style.decimals}f}" for n, c in zip(names, corners, strict=True)})
    width, height = (1000, 1000) if style.unit == "thousand" else plan.resized or plan.size
    scaled = scale(corners, (width, height))
    # Halves go up, not to the even neighbour as `round` would have them.
    return style.template.format(**{n: math.floor(c + 0.5) for n, c in zip(names, scaled, strict=True)})


def box_on(plan: MediaPlan, box: Box, size: Size | None = None) -> Corners:
    """The corners in pixels of the picture when it is drawn at `size`: after the family's resize, if left out.

    Raises:
        DataError: the box is reversed or lies outside of the picture.
    """
    return scale(_share_of(box, plan), size or plan.resized or plan.size)


def scale(corners: Corners, size: Size) -> Corners:
    (x1, y1, x2, y2), (width, height) = corners, size
    return x1 * width, y1 * height, x2 * width, y2 * height


def _share(box: Box, pictures: Sequence[MediaPlan]) -> Corners:
    if not 0 <= box.picture < len(pictures):
        held = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'}"
        raise DataError(f"a box lies on picture {box.picture + 1} of the row, which has {held}")
    return _share_of(box, pictures[box.picture])


def _share_of(box: Box, plan: MediaPlan) -> Corners:
    """The corners as shares of the picture's width and height, from 0 to 1."""
    width, height = {"pixels": plan.size, "thousand": (1000, 1000), "unit": (1, 1)}[box.unit]
    x1, y1, x2, y2 = box.corners
    shares = x1 / width, y1 / height, x2 / width, y2 / height
    said = ", ".join(f"{value:g}" for value in box.corners)
    if not all(math.isfinite(share) for share in shares):
        raise DataError(f"the box [{said}] holds a value that is no number")
    if x1 > x2 or y1 > y2:
        raise DataError(
            f"the box [{said}] is reversed",
            expected="[left, top, right, bottom]",
            remedy="If the last two are width and height, add the first two to them.",
        )
    slack = _SLACK / plan.size[0], _SLACK / plan.size[1]
    if any(not -slack[i % 2] <= share <= 1 + slack[i % 2] for i, share in enumerate(shares)):
        raise DataError(
            f"the box [{said}] lies outside of its picture",
            expected=f"0 … {width:g} across and 0 … {height:g} down, in {_WORDS[box.unit]}",
        )
    left, top, right, bottom = (min(max(share, 0.0), 1.0) for share in shares)
    return left, top, right, bottom


_WORDS = {"pixels": "pixels", "thousand": "thousandths", "unit": "parts of 1"}
