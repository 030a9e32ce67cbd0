"""data_augment: the quality is a pure function, and a picture is what Pillow makes of it."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import PIL.Image

from vlmtune.data.augment import as_jpeg, jpeg_quality


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
