"""Pictures: sizes from headers, all orientations, all modes, and every kind of damage."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import pictures
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

LIMIT = 10_000_000


def photo(width: int = 24, height: int = 16) -> PIL.Image.Image:
    """No two quarters alike, so that a wrong turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    pixels[height // 2 :, width // 2 :] = (240, 240, 240)
    return PIL.Image.fromarray(pixels)


def both(path: Path) -> tuple[tuple[int, int], PIL.Image.Image]:
    ref = MediaRef(path=str(path))
    return pictures.size(ref, MediaOptions(max_image_pixels=LIMIT)), pictures.open_image(
        ref, MediaOptions(max_image_pixels=LIMIT)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_all_orientations_as_pillow_turns_them(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    photo().save(path, exif=exif, **options)
    size, picture = both(path)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    assert size == picture.size == expected.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    corner = np.asarray(picture)[2, 2].argmax() if orientation not in (3, 7) else -1
    assert corner == {1: 0, 2: 1, 3: -1, 4: 2, 5: 0, 6: 2, 7: -1, 8: 1}[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_orientations_that_are_ignored_are_as_plain_pillow_loads_them(
    tmp_path: Path, orientation: int, ending: str
) -> None:
    """As loaders that only `convert("RGB")` see them; a TIFF is turned by Pillow itself, in either setting."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    photo().save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    ref, ignoring = MediaRef(path=str(path)), MediaOptions(exif="ignore")
    picture = pictures.open_image(ref, ignoring)
    expected = PIL.Image.open(path).convert("RGB")
    assert pictures.size(ref, ignoring) == picture.size == expected.size
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    if ending != "tiff":
        assert picture.size == (24, 16)
        assert pictures.size(ref, MediaOptions(exif="apply")) == ((16, 24) if orientation >= 5 else (24, 16))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_orientation_of_compressed_tiff(tmp_path: Path, compression: str | None) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "a.tif", exif=exif, compression=compression)
    size, picture = both(tmp_path / "a.tif")
    assert size == picture.size == (16, 24)
    assert np.asarray(picture)[2, 2].argmax() == 2


def test_png_whose_exif_follows_the_pixels_is_taken_as_it_lies(tmp_path: Path) -> None:
    """Its orientation cannot be known from the header, so neither size nor pixels may apply it."""
    raw = io.BytesIO()
    photo().save(raw, "png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    whole = raw.getvalue()
    end = whole.rindex(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(whole[:end] + chunk + whole[end:])
    size, picture = both(tmp_path / "a.png")
    assert size == picture.size == (24, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    if mode == "I;16":
        values = (np.asarray(photo().convert("L")).astype(np.uint16)) * 257
        PIL.Image.fromarray(values).save(path)
    else:
        image = photo().quantize(8) if mode == "P" else photo().convert(mode)
        image.save(path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))
    size, picture = both(path)
    assert picture.mode == "RGB" and size == picture.size == (24, 16)
    reference = photo().convert("L" if mode in ("1", "L", "LA", "I;16") else "RGB").convert("RGB")
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(reference).astype(int))
    assert difference.mean() < (100 if mode == "1" else 12)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = photo().convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=8)
    image.info["transparency"] = bytes([0, 255, 128, 255, 255, 255, 255, 255])
    image.save(tmp_path / "a.png")
    _, picture = both(tmp_path / "a.png")
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(photo()).astype(int)).max() < 12


def test_animated_gif_gives_the_first_frame(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    size, picture = both(tmp_path / "a.gif")
    assert size == (20, 10) and picture.getpixel((3, 3)) == (255, 0, 0)


def test_slice_of_a_file_and_inline_bytes(tmp_path: Path) -> None:
    raw = io.BytesIO()
    photo().save(raw, "png")
    (tmp_path / "shard").write_bytes(b"x" * 77 + raw.getvalue() + b"y" * 50)
    part = MediaRef(path=str(tmp_path / "shard"), offset=77, length=len(raw.getvalue()))
    inline = MediaRef(path="data:image/png", inline=raw.getvalue())
    for ref in (part, inline):
        assert pictures.size(ref, MediaOptions(max_image_pixels=LIMIT)) == (24, 16)
        assert np.array_equal(
            np.asarray(pictures.open_image(ref, MediaOptions(max_image_pixels=LIMIT))), np.asarray(photo())
        )
        assert pictures.read_bytes(ref) == raw.getvalue()


def refused(path: Path, *, limit: int = LIMIT, by_header: bool = True) -> str:
    ref = MediaRef(path=str(path))
    if by_header:
        with pytest.raises(DataError):
            pictures.size(ref, MediaOptions(max_image_pixels=limit))
    else:
        pictures.size(ref, MediaOptions(max_image_pixels=limit))
    with pytest.raises(DataError) as caught:
        pictures.open_image(ref, MediaOptions(max_image_pixels=limit))
    assert not caught.value.where, "the caller knows the row"
    return caught.value.reason


def test_text_named_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello, I am text")
    assert "a.png is not a picture: it begins with b'hello, I am text'; expected a JPEG" in refused(tmp_path / "a.png")


def test_empty_file_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "is an empty file" in refused(tmp_path / "a.png")
    assert "cannot be opened (No such file" in refused(tmp_path / "b.png")
    assert "cannot be opened (Is a directory)" in refused(tmp_path)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_truncated_pixels_show_when_decoding(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{ending}"
    PIL.Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reason = refused(path, by_header=ending == "webp")  # a WebP says its length in front
    assert f"a.{ending}" in reason and ("cannot be decoded" in reason or "damaged" in reason or "not a" in reason)


def test_every_cut_of_a_header_is_an_error_of_ours(tmp_path: Path) -> None:
    for ending in ("jpg", "png", "gif", "bmp", "tiff", "webp"):
        raw = io.BytesIO()
        photo().save(raw, {"jpg": "jpeg"}.get(ending, ending))
        whole = raw.getvalue()
        for cut in range(1, min(len(whole), 120)):
            ref = MediaRef(path="x", inline=whole[:cut])
            try:
                pictures.open_image(ref, MediaOptions(max_image_pixels=LIMIT))
            except DataError:
                continue
            assert cut >= 54, f"{ending} cut to {cut} bytes passed"  # Pillow forgives a missing end in some formats


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that promises a huge picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bomb(60_000, 60_000))
    assert "decompression bomb" in refused(tmp_path / "a.png", limit=178_956_970)
    (tmp_path / "b.png").write_bytes(bomb(12_000, 10_000))
    reason = refused(tmp_path / "b.png", limit=100_000_000)
    assert "12000×10000 = 120,000,000 pixels; expected at most 100,000,000 (data.max_image_pixels)" in reason
    assert pictures.size(MediaRef(path=str(tmp_path / "b.png")), MediaOptions(max_image_pixels=178_956_970)) == (
        12_000,
        10_000,
    )


def test_float_and_32_bit_pictures_are_refused_not_clipped(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tiff")
    assert "floating-point" in refused(tmp_path / "a.tiff", by_header=False)
    PIL.Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "b.tiff")
    assert "32-bit" in refused(tmp_path / "b.tiff", by_header=False)


def test_formats_that_start_other_programs_are_not_tried(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "is not a picture" in refused(tmp_path / "a.png")


def test_names_with_spaces_and_chinese(tmp_path: Path) -> None:
    photo().save(tmp_path / "图 片.png")
    assert both(tmp_path / "图 片.png")[0] == (24, 16)
