"""Open a picture: its size from the header alone, or all of its pixels as RGB.

Both go through `_checked_size` and `_orientation`, so the size that plans a row is the size that training sees.
Errors are `DataError` without a place; the caller knows the row and adds it.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import PurePath
from typing import BinaryIO

import numpy as np
import PIL.Image

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media.headers import quick_size
from vlmtune.data.media.pieces import Pieces
from vlmtune.data.sample import MediaRef, Size
from vlmtune.errors import DataError

# What Pillow may try. Not its whole list: a picture file comes from strangers, and some readers start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# What Pillow's readers raise on damaged bytes (its own UnidentifiedImageError is an OSError).
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_SWAPPING = (5, 6, 7, 8)


def size(ref: MediaRef, options: MediaOptions) -> Size:
    """(width, height) of a picture as it is looked at: from the header, EXIF orientation applied.

    Raises:
        DataError: missing, unreadable or foreign file, or more than `max_image_pixels` pixels.
    """
    plain = quick_size(ref, options.exif)
    if plain is not None and plain[0] * plain[1] <= options.max_image_pixels:
        return plain
    with _header(ref, options) as (_, upright, _turned):
        return upright


def open_image(ref: MediaRef, options: MediaOptions) -> PIL.Image.Image:
    """The first frame as RGB, 8 bit a channel, EXIF orientation applied, fully decoded.

    Raises:
        DataError: as `size`, and for damaged pixel data.
    """
    with _header(ref, options) as (image, upright, orientation):
        try:
            image.load()
            picture = _rgb(image, ref)
        except _DAMAGE as error:
            raise DataError(
                f"the picture {name_of(ref)} cannot be decoded ({_clause(error)})",
                remedy="The file is damaged; replace it or take the row out.",
            ) from error
        if orientation in _TRANSPOSE:
            picture = picture.transpose(_TRANSPOSE[orientation])
    if picture.size != upright:
        raise DataError(
            f"the header of {name_of(ref)} says {upright[0]}×{upright[1]}, its pixels are "
            f"{picture.size[0]}×{picture.size[1]}",
            remedy="Save the picture again with any image tool.",
        )
    return picture


def read_bytes(ref: MediaRef) -> bytes:
    """The encoded bytes of a medium.

    Raises:
        DataError: the file cannot be read.
    """
    with open_bytes(ref) as stream:
        try:
            return stream.read()
        except OSError as error:
            raise DataError(f"{name_of(ref)} cannot be read ({_clause(error)})") from error


@contextmanager
def _header(ref: MediaRef, options: MediaOptions) -> Iterator[tuple[PIL.Image.Image, Size, int]]:
    """The lazily opened picture, its upright size and its orientation (1 … 8)."""
    with open_bytes(ref) as stream, warnings.catch_warnings():
        # Pillow warns at half of its refusal point; `max_image_pixels` is the limit here.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        try:
            with PIL.Image.open(stream, formats=_formats()) as image:
                orientation = 1 if options.exif == "ignore" else _orientation(image)
                upright = _checked_size(image, orientation, ref, options.max_image_pixels)
                yield image, upright, orientation
        except PIL.Image.DecompressionBombError as error:
            raise DataError(
                f"the picture {name_of(ref)} is a decompression bomb ({_clause(error)})",
                remedy="Take the row out, or make the picture smaller.",
            ) from error
        except _DAMAGE as error:
            raise _not_a_picture(ref, error) from error


def _checked_size(image: PIL.Image.Image, orientation: int, ref: MediaRef, max_pixels: int) -> Size:
    width, height = image.size
    refuse_bomb(image.size, f"the picture {name_of(ref)}", max_pixels)
    return (height, width) if orientation in _SWAPPING else (width, height)


def refuse_bomb(size: Size, what: str, max_pixels: int) -> None:
    """Raises DataError: no pixels, or more of them than `max_pixels`."""
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{what} has {width}×{height} = {width * height:,} pixels",
            expected=f"at most {max_pixels:,} (data.max_image_pixels)",
            remedy="Make it smaller, raise the limit, or take the row out.",
        )
    if min(width, height) < 1:
        raise DataError(f"{what} is empty ({width}×{height} pixels)")


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, as far as it stands before the pixels; 1 when there is none."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFFs itself, their size included
    if image.format == "PNG" and not ({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & set(image.info)):
        return 1  # asking Pillow further would decode the whole picture
    if image.format == "PNG" and "exif" not in image.info:
        exif: PIL.Image.Exif = PIL.Image.Image.getexif(image)  # PngImageFile.getexif would decode the picture first
    else:
        exif = image.getexif()
    found = exif.get(_ORIENTATION_TAG, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb(image: PIL.Image.Image, ref: MediaRef) -> PIL.Image.Image:
    """Any mode as 8-bit RGB; transparency is dropped, 16 bits keep their upper eight."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):  # I;16, I;16B, I (Pillow's own conversion clips at 255)
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"the picture {name_of(ref)} has 32-bit values",
                expected="8 or 16 bits a channel",
                remedy="Save it as an 8-bit PNG.",
            )
        gray = (values.astype(np.uint16) >> 8).astype(np.uint8)
        return PIL.Image.fromarray(gray).convert("RGB")
    if image.mode == "F":
        raise DataError(
            f"the picture {name_of(ref)} holds floating-point values",
            expected="8 or 16 bits a channel",
            remedy="Save it as an 8-bit PNG.",
        )
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # a palette with transparency has no direct way that is exact
    return image.convert("RGB")


@contextmanager
def open_bytes(ref: MediaRef) -> Iterator[BinaryIO]:
    """A seekable stream of the encoded bytes of a medium; nothing of it is read ahead of what is asked for.

    Raises:
        DataError: a file cannot be opened.
    """
    if ref.inline is not None:
        yield io.BytesIO(ref.inline)
        return
    try:
        if not ref.offset and ref.length is None and not ref.more:
            stream: BinaryIO = open(ref.path, "rb")  # noqa: SIM115 (closed below; opening has an error of its own)
        else:
            length = os.path.getsize(ref.path) - ref.offset if ref.length is None else ref.length
            stream = io.BufferedReader(Pieces(((ref.path, ref.offset, length), *ref.more)))
    except OSError as error:
        raise DataError(
            f"the file {error.filename or ref.path} cannot be opened ({error.strerror or _clause(error)})",
            remedy="Correct the path in the row, or put the file there.",
        ) from error
    with stream:
        yield stream


def _not_a_picture(ref: MediaRef, error: BaseException) -> DataError:
    with open_bytes(ref) as stream:
        try:
            first = stream.read(24)
        except OSError as unreadable:
            return DataError(f"{name_of(ref)} cannot be read ({_clause(unreadable)})")
    if not first:
        found = f"the picture {name_of(ref)} is an empty file"
    elif isinstance(error, PIL.UnidentifiedImageError):
        found = f"{name_of(ref)} is not a picture: it begins with {first!r}"
    else:
        found = f"the header of the picture {name_of(ref)} is damaged ({_clause(error)})"
    return DataError(found, expected="a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file")


@cache
def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def name_of(ref: MediaRef) -> str:
    """What messages call a medium."""
    if ref.inline is not None:
        return ref.path
    name = PurePath(ref.path).name
    return name if ref.length is None else f"{name} at byte {ref.offset:,}"


def _clause(error: BaseException) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
