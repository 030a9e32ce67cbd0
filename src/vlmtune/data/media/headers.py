"""Sizes of ordinary JPEG and PNG files from their first bytes, for passes over millions of them.

Pillow needs about five times as long for the same answer. Whatever is not plain (an orientation to look up, a rare
kind of JPEG, a header longer than what was read, damage) gets None here and goes the long way through Pillow, which
also words the errors. Markers after ITU-T T.81 (JPEG), annex B; chunks after ISO/IEC 15948 (PNG), clause 5.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Literal

from vlmtune.data.sample import MediaRef, Size

HEAD = 8192  # bytes; nearly all headers without an embedded thumbnail are shorter

_SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman frames
_SOS, _APP1 = 0xDA, 0xE1
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type: bit depths
_MAY_TURN = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def quick_size(ref: MediaRef, exif: Literal["apply", "ignore"] | None) -> Size | None:
    """(width, height) of a JPEG or PNG that needs no turning; None for everything that has to be looked at closely."""
    if ref.frame is not None or ref.more:
        return None
    head = ref.inline[:HEAD] if ref.inline is not None else _head(ref)
    if head[:2] == b"\xff\xd8":
        return _jpeg(head, turned=exif != "ignore")
    if head[:8] == _PNG:
        return _png(head, turned=exif != "ignore")
    return None


def _head(ref: MediaRef) -> bytes:
    try:
        descriptor = os.open(ref.path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, HEAD if ref.length is None else min(HEAD, ref.length), ref.offset)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _jpeg(head: bytes, *, turned: bool) -> Size | None:
    size: Size | None = None
    at, end = 2, len(head) - 4
    while at <= end:
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == _SOS:
            return size
        length = (head[at + 2] << 8) + head[at + 3]
        if length < 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        if marker == _APP1 and turned:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _SOF or size is not None or at + 10 > len(head):
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", head, at + 4)
            if precision != 8 or not height or not width or components not in (1, 3, 4) or length != 8 + 3 * components:
                return None
            size = (width, height)
        at += 2 + length
    return None


def _png(head: bytes, *, turned: bool) -> Size | None:
    size: Size | None = None
    at = 8
    while at + 8 <= len(head):
        length, kind = struct.unpack_from(">I4s", head, at)
        if kind == b"IDAT":
            return size
        body = head[at + 4 : at + 8 + length]
        check = head[at + 8 + length : at + 12 + length]
        if len(check) < 4 or zlib.crc32(body) != int.from_bytes(check, "big") or (turned and kind in _MAY_TURN):
            return None
        if kind == b"IHDR":
            if length != 13 or size is not None:
                return None
            width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", body, 4)
            if depth not in _PNG_KINDS.get(colour, ()) or compression or filtering or interlace > 1:
                return None
            size = (width, height) if width and height else None
        elif size is None:
            return None
        at += 12 + length
    return None
