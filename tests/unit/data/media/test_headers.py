"""The short way to a picture's size says what Pillow says, or nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.media.headers import quick_size
from vlmtune.data.sample import MediaRef


def saved(kind: str, size: tuple[int, int] = (37, 21), mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(noise).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def quick(content: bytes, exif: Any = "apply") -> tuple[int, int] | None:
    return quick_size(MediaRef(path="", inline=content), exif)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2, "quality": 20}, {"dpi": (72, 72)}])
def test_plain_jpegs(mode: str, options: dict[str, Any]) -> None:
    assert quick(saved("JPEG", mode=mode, **options)) == (37, 21)
    assert quick(saved("JPEG", (1, 5000), mode=mode, **options)) == (1, 5000)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16"])
def test_plain_pngs(mode: str) -> None:
    content = saved("PNG", mode="L" if mode == "I;16" else mode)
    assert quick(content) == (37, 21)


def test_what_may_be_turned_goes_the_long_way() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    notes = PIL.PngImagePlugin.PngInfo()
    notes.add_text("Comment", "upright")
    for content in (saved("JPEG", exif=exif), saved("PNG", exif=exif), saved("PNG", pnginfo=notes)):
        assert quick(content) is None
        assert quick(content, "ignore") == (37, 21)


def test_files_and_slices(tmp_path: Path) -> None:
    content = saved("JPEG")
    (tmp_path / "a").write_bytes(b"x" * 11 + content + b"y" * 7)
    assert quick_size(MediaRef(path=str(tmp_path / "a"), offset=11, length=len(content)), "apply") == (37, 21)
    assert quick_size(MediaRef(path=str(tmp_path / "a")), "apply") is None
    assert quick_size(MediaRef(path=str(tmp_path / "gone")), "apply") is None
    assert quick_size(MediaRef(path=str(tmp_path / "a"), offset=11, length=len(content), frame=0), "apply") is None
    assert quick(saved("WEBP")) is None


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_headers_never_give_a_size_that_pillow_does_not_give(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([saved("JPEG"), saved("PNG"), saved("JPEG", progressive=True)])))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content) - 1, 700)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(20, len(content)))]
    found = quick(bytes(content), "ignore")
    if found is not None:
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                assert image.size == found
        except (OSError, SyntaxError, ValueError, KeyError):
            # Pillow also reads what says nothing about the size (tables, resolution) and may stumble over it; decoding
            # the picture in training, or `check --decode`, says so.
            assert found[0] > 0 and found[1] > 0
