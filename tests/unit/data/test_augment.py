"""data_augment: the qualities are a pure function, and a tile is what Pillow makes of it."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rows import conversation, write_picture

from vlmtune.config.schema import ImageOptions
from vlmtune.data import augment
from vlmtune.data.augment import JpegNoise, as_jpeg
from vlmtune.data.collate import collate, row_pixels
from vlmtune.data.encode import encode
from vlmtune.models.load import open_folder


def _qualities(noise: JpegNoise, medium: int, pictures: int) -> list[int]:
    """What `noise` draws for so many pictures of one medium."""
    flat = PIL.Image.new("RGB", (8, 8))
    retouch = noise(medium)
    with pytest.MonkeyPatch.context() as patch:
        drawn: list[int] = []
        patch.setattr(augment, "as_jpeg", lambda picture, quality: drawn.append(quality) or picture)
        assert all(retouch(flat) is flat for _ in range(pictures))
    return drawn


def test_the_same_numbers_give_the_same_qualities_and_every_quality_comes() -> None:
    found = [
        quality for row in range(100) for step in range(10) for quality in _qualities(JpegNoise(3, row, step), 0, 4)
    ]
    assert found == [
        quality for row in range(100) for step in range(10) for quality in _qualities(JpegNoise(3, row, step), 0, 4)
    ]
    counts = Counter(found)
    assert sorted(counts) == list(range(75, 101))
    assert min(counts.values()) > 0.6 * 4000 / 26 and max(counts.values()) < 1.4 * 4000 / 26
    ways = [JpegNoise(3, 1, 1), JpegNoise(4, 1, 1), JpegNoise(3, 2, 1), JpegNoise(3, 1, 2)]
    assert len({tuple(_qualities(noise, medium, 20)) for noise in ways for medium in range(3)}) == 12


def test_a_picture_is_what_pillow_saves() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = PIL.Image.fromarray(noise)
    errors = []
    for quality in (75, 100):
        raw = io.BytesIO()
        picture.save(raw, "JPEG", quality=quality)
        found = as_jpeg(picture, quality)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(PIL.Image.open(raw)))
        errors.append(np.abs(np.asarray(found).astype(int) - noise).mean())
    assert errors[0] > errors[1] > 0


def test_each_tile_of_internvl_is_saved_for_itself(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_folder(tiny_folder("internvl"))
    row = encode(conversation(("user", [write_picture(tmp_path, (100, 40)), "What?"]), ("assistant", ["A."])), opened)
    noise = JpegNoise(0, 5, 9)
    assert pickle.loads(pickle.dumps(replace(row, retouch=noise))).retouch == noise
    (plain,), (found,), (again,) = (row_pixels(one, opened) for one in (row, *[replace(row, retouch=noise)] * 2))
    tiles, noisy = (opened.family.view(pixels, opened.spec) for pixels in (plain, found))
    qualities = _qualities(noise, 0, len(tiles))
    assert len(set(qualities)) > 1
    for tile, saved, quality in zip(tiles, noisy, qualities, strict=True):
        assert np.array_equal(np.asarray(saved), np.asarray(as_jpeg(tile, quality)))
    assert torch.equal(found["pixel_values"], again["pixel_values"])


def test_a_picture_of_another_family_is_saved_before_it_is_cut(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = open_folder(tiny_folder("smolvlm"))
    ref = write_picture(tmp_path, (100, 40))
    row = encode(conversation(("user", [ref, "What?"]), ("assistant", ["A cat."])), opened)
    noise = JpegNoise(0, 5, 9)
    (found,) = row_pixels(replace(row, retouch=noise), opened)
    picture = as_jpeg(PIL.Image.open(ref.path).convert("RGB"), *_qualities(noise, 0, 1))
    assert torch.equal(found["pixel_values"], opened.family.pixels(picture, row.media[0][1], row.spec)["pixel_values"])


def test_sources_that_cut_pictures_in_their_own_way_share_a_pack(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = open_folder(tiny_folder("internvl"))
    sample = conversation(("user", [write_picture(tmp_path, (200, 40)), "What?"]), ("assistant", ["A cat."]))
    one = opened.with_image(ImageOptions(max_tiles=1))
    rows = [encode(sample, opened), encode(sample, one)]
    assert [row.media[0][1].num_tiles for row in rows] == [5, 1]
    inputs = collate([rows], opened, stand_in=False).inputs
    assert len(inputs["pixel_values"]) == 6
    alone = [collate([[row]], opened, stand_in=False).inputs["pixel_values"] for row in rows]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))
    assert one.boxes == opened.boxes and one.media.exif == opened.media.exif
