"""data_augment: the quality is a pure function, and a picture is what Pillow makes of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from rows import conversation, write_picture

from vlmtune.config.schema import ImageOptions
from vlmtune.data.augment import as_jpeg, jpeg_quality
from vlmtune.data.collate import collate, row_pixels
from vlmtune.data.encode import encode
from vlmtune.models.load import open_folder


def test_the_same_numbers_give_the_same_quality_and_every_quality_comes() -> None:
    found = [jpeg_quality(3, row, step) for row in range(200) for step in range(20)]
    assert found == [jpeg_quality(3, row, step) for row in range(200) for step in range(20)]
    counts = Counter(found)
    assert sorted(counts) == list(range(75, 101))
    assert min(counts.values()) > 0.6 * 4000 / 26 and max(counts.values()) < 1.4 * 4000 / 26
    assert len({tuple(jpeg_quality(seed, row, 0) for row in range(20)) for seed in range(5)}) == 5
    assert len({tuple(jpeg_quality(0, row, step) for step in range(20)) for row in range(5)}) == 5


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


def test_a_row_with_a_quality_is_collated_from_the_saved_picture(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = open_folder(tiny_folder("internvl"))
    ref = write_picture(tmp_path, (100, 40))
    row = encode(conversation(("user", [ref, "What?"]), ("assistant", ["A cat."])), opened)
    (plain,), (saved,) = (row_pixels(one, opened) for one in (row, replace(row, jpeg_quality=75)))
    picture = PIL.Image.open(ref.path).convert("RGB")
    expected = opened.family.pixels(as_jpeg(picture, 75), row.media[0][1], row.spec)
    assert torch.equal(saved["pixel_values"], expected["pixel_values"])
    assert not torch.equal(saved["pixel_values"], plain["pixel_values"])


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
