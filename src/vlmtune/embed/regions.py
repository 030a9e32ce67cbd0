"""Pages with marked regions, as labelme writes them, and what a tower is shown of a region.

A page is a picture and a JSON: `shapes`, each with a `label` (text, perhaps empty) and two `points` (opposite corners,
in any order), and `imageWidth` and `imageHeight`. Reading order is the order of the shapes.

**Normalised or pixels?** Decided once per page: if any coordinate of it is beyond `MOST_NORMALISED` to either side, all
are pixels; else all are shares of width and height. (An annotation may lie a little outside of the picture, so
normalised ones exceed 1; in pixels, everything would have to lie in a corner of 2 × 2 pixels to be mistaken.)

**Which way up?** labelme turns photos as EXIF says, official loaders do not. `imageWidth` and `imageHeight` tell which
of the two the annotator saw; without them the model's own habit counts (`data.exif`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import pictures
from vlmtune.data.sample import MediaRef, Size
from vlmtune.errors import DataError

MOST_NORMALISED = 2.0

_MOST_BYTES = 256 * 2**20  # of a JSON; labelme may put the picture itself into it
_FARTHEST = 1e15  # a coordinate; floats count pixels up to here one by one
_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can write and UTF-8 cannot
_LISTED = 20  # bad regions that a message shows


@dataclass(frozen=True, slots=True)
class Region:
    """label: may be empty, where nobody has read the region.
    box: (left, top, right, bottom) in whole pixels of the picture, inside it, right and bottom exclusive.
    """

    label: str
    box: tuple[int, int, int, int]

    @property
    def size(self) -> Size:
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """
    media: how its picture is opened (`exif` is decided).
    bad: for each region that cannot be cut out its number, counted from 1, its label, and why.
    cut: how many of `regions` reach beyond the picture and were cut at its edge.
    """

    picture: Path
    json: Path
    media: MediaOptions
    regions: tuple[Region, ...]
    bad: tuple[str, ...]
    cut: int

    def open(self) -> PIL.Image.Image:
        """The picture as RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        try:
            return pictures.open_image(MediaRef(path=str(self.picture.absolute())), self.media)
        except DataError as error:
            raise at(error, self.picture) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareRule:
    """How a region becomes the picture that the tower sees (CalliReader's numbers are the defaults).

    square: edge in pixels of the white square on which it is centred, an odd remainder being to the right and below.
    least, most: a region whose longer side is at most `least` or at least `most` is scaled to that side, both sides
    rounded down; one in between keeps its size.
    """

    square: int = 448
    least: int = 200
    most: int = 350

    @staticmethod
    def of_edge(edge: int) -> SquareRule:
        """The same proportions for a tower whose pictures are `edge` pixels wide."""
        own = SquareRule()
        least, most = (max(1, edge * length // own.square) for length in (own.least, own.most))
        return SquareRule(square=edge, least=least, most=most)

    def scaled(self, size: Size) -> Size:
        """(width, height) at which a region of `size` is shown; a side may come out as 0."""
        longest = max(size)
        factor = 1.0
        if longest <= self.least:
            factor = self.least / longest
        elif longest >= self.most:
            factor = self.most / longest
        # In floating point and rounded down, as in the reference: 3/5 of 200 may be 119.
        return int(size[0] * factor), int(size[1] * factor)

    def shown(self, crop: PIL.Image.Image) -> PIL.Image.Image:
        """The square (RGB) for a region that was cut out of its page; bicubic, Pillow's default."""
        width, height = self.scaled(crop.size)
        square = PIL.Image.new("RGB", (self.square, self.square), (255, 255, 255))
        square.paste(crop.resize((width, height)), ((self.square - width) // 2, (self.square - height) // 2))
        return square


def read_page(file: Path, picture: Path, media: MediaOptions, rule: SquareRule) -> Page:
    """A page's regions as pixels of its picture, of which only the header is read.

    Args:
        media: `exif` is the model's habit, for a page that says no size.
        rule: regions that it would leave nothing of are bad ones.

    Raises:
        DataError: a picture that cannot be opened or has too many pixels; a file that is no labelme JSON, or one that
            was made for a picture of another size. Regions that cannot be cut out are no error here: see `Page.bad`.
    """
    record = _record(file)
    ref = MediaRef(path=str(picture.absolute()))
    try:
        media, size = _as_annotated(ref, media, _stated_size(record, file), file)
    except DataError as error:
        raise at(error, picture) from error
    shapes = record["shapes"]
    corners = [_corners(shape) for shape in shapes]
    flat = [number for found in corners if isinstance(found, tuple) for number in found]
    in_pixels = any(abs(number) > MOST_NORMALISED for number in flat)
    regions, bad, cut = [], [], 0
    for number, (shape, found) in enumerate(zip(shapes, corners, strict=True), start=1):
        if isinstance(found, str):
            bad.append(f"{_name(number, shape)} {found}")
        elif why := _why_not(found, size, rule, in_pixels=in_pixels):
            bad.append(f"{_name(number, shape)} {why}")
        else:
            box, inside = _box(found, size, in_pixels=in_pixels)
            regions.append(Region(shape.get("label") or "", box))
            cut += not inside
    return Page(picture=picture, json=file, media=media, regions=tuple(regions), bad=tuple(bad), cut=cut)


def refuse_bad_regions(pages: Sequence[Page]) -> None:
    """All regions that cannot be cut out, of all pages, in one message.

    Raises:
        DataError: there are some.
    """
    lines = [f"{page.json}: region {words}" for page in pages for words in page.bad]
    if not lines:
        return
    files = sum(bool(page.bad) for page in pages)
    shown = "\n".join(f"  {line}" for line in lines[:_LISTED])
    more = f"\n  and {len(lines) - _LISTED:,} more" if len(lines) > _LISTED else ""
    raise DataError(
        f"{len(lines):,} region{'s' if len(lines) > 1 else ''} of {files:,} page{'s' if files > 1 else ''} cannot be "
        f"cut out:\n{shown}{more}\n",
        expected="two opposite corners with an area inside the picture",
        remedy="Correct them, or leave them out with --skip-bad-regions.",
    )


def at(error: DataError, where: Path) -> DataError:
    """The error with a place, if it has none."""
    if error.where:
        return error
    return DataError(error.found, where=str(where), expected=error.expected, remedy=error.remedy)


def _record(file: Path) -> dict[str, Any]:
    """A labelme JSON as it stands, with a list of shapes."""
    expected = "a labelme JSON: an object with `shapes`, imageWidth and imageHeight"
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise DataError(f"the file has {file.stat().st_size:,} bytes", where=str(file), expected=expected)
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})", where=str(file), expected=expected,
            remedy="Put the JSON beside its picture, or name it with --json.",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", where=str(file), expected=expected) from None
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise DataError("there are no `shapes` in it", where=str(file), expected=expected)
    if not record["shapes"]:
        raise DataError("no region is marked on this page", where=str(file), remedy="Mark some, or take the file away.")
    return record


def _stated_size(record: Mapping[str, Any], file: Path) -> Size | None:
    """imageWidth and imageHeight; None if neither is there."""
    found: tuple[Any, Any] = (record.get("imageWidth"), record.get("imageHeight"))
    if found == (None, None):
        return None
    width, height = (int(number) if _is_number(number) and number >= 1 else 0 for number in found)
    if 0 in (width, height) or (width, height) != found:
        raise DataError(
            f"imageWidth is {found[0]!r:.40}, imageHeight {found[1]!r:.40}", where=str(file), expected="pixels"
        )
    return width, height


def _as_annotated(ref: MediaRef, media: MediaOptions, stated: Size | None, file: Path) -> tuple[MediaOptions, Size]:
    """How the picture has to be opened to have the size that its JSON states; and that size."""
    habit = pictures.size(ref, media)
    if stated is None or habit == stated:
        return media, habit
    other = media.model_copy(update={"exif": "apply" if media.exif == "ignore" else "ignore"})
    if pictures.size(ref, other) == stated:
        return other, stated
    raise DataError(
        f"the JSON was made for a picture of {stated[0]}×{stated[1]} pixels, and {Path(ref.path).name} has "
        f"{habit[0]}×{habit[1]}",
        where=str(file),
        remedy="Put the picture that was annotated beside it, or correct imageWidth and imageHeight.",
    )


def _name(number: int, shape: Any) -> str:
    label = shape.get("label") if isinstance(shape, dict) else None
    return f"{number} ({label!r:.40})" if label else str(number)


def _corners(shape: Any) -> tuple[float, float, float, float] | str:
    """(left, top, right, bottom) as they stand in the file; or a clause on why there are none."""
    if not isinstance(shape, dict):
        return "is no object"
    label = shape.get("label") or ""
    if not isinstance(label, str) or _HALF.search(label):
        return f"has the label {label!r:.40}, which is no text"
    kind, points = shape.get("shape_type", "rectangle"), shape.get("points")
    if kind not in ("rectangle", None):
        return f"is a {kind!s:.40}, not a rectangle"
    if not isinstance(points, list) or len(points) != 2:
        return f"has {len(points) if isinstance(points, list) else 'no'} points instead of two corners"
    if not all(isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in points):
        return f"has the points {points!r:.80}, which are not two pairs of numbers"
    (x1, y1), (x2, y2) = points
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _is_number(value: Any) -> bool:
    """Whether it is finite and no larger than pixels can be: JSON has integers that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FARTHEST


def _box(
    corners: tuple[float, float, float, float], size: Size, *, in_pixels: bool
) -> tuple[tuple[int, int, int, int], bool]:
    """Whole pixels inside the picture, rounded down; and whether the corners were inside.

    The order of the operations is the reference's: first into the picture, then to pixels, then rounded.
    """
    whole = size if in_pixels else (1, 1)
    factor = (1, 1) if in_pixels else size
    inside = [min(max(0, number), whole[axis % 2]) for axis, number in enumerate(corners)]
    left, top, right, bottom = (int(number * factor[axis % 2]) for axis, number in enumerate(inside))
    return (left, top, right, bottom), list(corners) == inside


def _why_not(
    corners: tuple[float, float, float, float], size: Size, rule: SquareRule, *, in_pixels: bool
) -> str | None:
    """A clause on why a region cannot be cut out; None if it can."""
    (left, top, right, bottom), _ = _box(corners, size, in_pixels=in_pixels)
    whole = size if in_pixels else (1, 1)
    place = f"x {corners[0]:g} to {corners[2]:g}, y {corners[1]:g} to {corners[3]:g}"
    if corners[2] <= 0 or corners[3] <= 0 or corners[0] >= whole[0] or corners[1] >= whole[1]:
        return f"is outside of the picture: {place} of {whole[0]} × {whole[1]}"
    if left == right or top == bottom:
        return f"has no area: {place} is {right - left} × {bottom - top} pixels of {size[0]} × {size[1]}"
    if 0 in rule.scaled((right - left, bottom - top)):
        return f"is too thin: of {right - left} × {bottom - top} pixels nothing is left at {rule.most} pixels' length"
    return None
