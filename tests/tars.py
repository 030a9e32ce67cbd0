"""Small tars and parts of tars for tests, made by the standard library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image


def picture_bytes(seed: int = 0, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    """A small picture of noise, `size` = (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes | str | tarfile.TarInfo]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar of (name, content); a `TarInfo` in place of the content is written as it is, under the name."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            raw = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def special(kind: bytes, link: str = "") -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def cut(path: Path, places: Sequence[int], names: Sequence[str]) -> list[Path]:
    """The file in parts that end at `places` (and at its end); the whole is taken away."""
    content = path.read_bytes()
    bounds = [0, *places, len(content)]
    parts = []
    for name, start, end in zip(names, bounds, bounds[1:], strict=False):
        part = path.with_name(name)
        part.write_bytes(content[start:end])
        parts.append(part)
    path.unlink()
    return parts
