"""The short way from a picture to its tensors gives what transformers' image processors give, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media.pictures import open_image
from vlmtune.data.sample import MediaRef
from vlmtune.models import resample
from vlmtune.models.auto import pictures
from vlmtune.models.auto.pictures import AutoSpec, find_kind, picture_pixels
from vlmtune.models.pixels import make_tones, patches, seen_patches, seen_tiles, tiles
from vlmtune.models.resample import planes_of, resized_planes

SIZES = [
    (1, 1),
    (48, 32),
    (32, 16),
    (3, 3),
    (3, 90),
    (31, 33),
    (64, 64),
    (65, 64),
    (100, 40),
    (40, 199),
    (333, 97),
    (320, 240),
]
SQUARE = {"height": 32, "width": 32}

FOLLOWED: dict[str, Any] = {
    "aya vision": lambda: transformers.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True),
    "aya vision, 2 to 5 tiles": lambda: transformers.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=2, max_patches=5
    ),
    "aya vision, oblong tiles": lambda: transformers.GotOcr2ImageProcessorPil(
        size={"height": 20, "width": 44}, crop_to_patches=True
    ),
    "aya vision, whole": lambda: transformers.GotOcr2ImageProcessorPil(size=SQUARE),
    "aya vision, one tile at most": lambda: transformers.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, max_patches=1
    ),
    "clip": lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "clip, odd crop": lambda: transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 45}, crop_size={"height": 32, "width": 21}
    ),
    "clip, no crop": lambda: transformers.CLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
    "siglip": lambda: transformers.SiglipImageProcessorPil(size=SQUARE),
    "siglip, bilinear": lambda: transformers.SiglipImageProcessorPil(size=SQUARE, resample=2),
    "siglip, 0 to 255": lambda: transformers.SiglipImageProcessorPil(size=SQUARE, do_rescale=False),
    "siglip, 0 to 1": lambda: transformers.SiglipImageProcessorPil(size=SQUARE, do_normalize=False),
    "siglip, another scale": lambda: transformers.SiglipImageProcessorPil(size=SQUARE, rescale_factor=1 / 127.5),
    "qwen": lambda: transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140}, patch_size=14
    ),
    "qwen, merge 3": lambda: transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 48 * 48, "longest_edge": 140 * 140}, patch_size=8, merge_size=3, temporal_patch_size=3
    ),
    "smolvlm": lambda: transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
    ),
    "smolvlm, whole": lambda: transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    ),
    "idefics3": lambda: transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 100}, max_image_size={"longest_edge": 40}
    ),
}

# Settings that change more than the tones: transformers' own processor has to be asked, and is.
LEFT_ALONE: dict[str, Any] = {
    "clip, not resized": lambda: transformers.CLIPImageProcessorPil(crop_size=SQUARE, do_resize=False),
    "clip, crop beyond the picture": lambda: transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size=SQUARE
    ),
    "clip, padded": lambda: transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size=SQUARE, do_pad=True, pad_size={"height": 50, "width": 50}
    ),
    "clip, longest edge as well": lambda: transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 33, "longest_edge": 400}, crop_size=SQUARE
    ),
    "siglip, bytes": lambda: transformers.SiglipImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "qwen, not resized": lambda: transformers.Qwen2VLImageProcessorPil(do_resize=False, patch_size=8),
    "smolvlm, without a mask": lambda: transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_pad=False
    ),
}


def spec_of(image_processor: Any) -> AutoSpec:
    return AutoSpec(image_processor=image_processor, processor=None, placeholder_id=0, rope_config=None)


def noise(size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def official(spec: AutoSpec, picture: PIL.Image.Image) -> dict[str, torch.Tensor]:
    kind = spec.kind
    outputs = spec.image_processor([[picture]] if kind and kind.nested else [picture], return_tensors="pt")
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("name", FOLLOWED)
def test_equal_to_transformers_without_asking_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(FOLLOWED[name]())
    expected = {size: official(spec, noise(size)) for size in SIZES}
    monkeypatch.setattr(type(spec.image_processor), "__call__", lambda *args, **more: pytest.fail("the long way"))
    for size in SIZES:
        same(picture_pixels(noise(size), spec), expected[size])


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_settings_are_left_to_transformers(name: str) -> None:
    spec = spec_of(LEFT_ALONE[name]())
    kind = find_kind(spec.image_processor)
    assert kind is not None
    for size in [(64, 64), (48, 96)]:
        picture = noise(size)
        assert kind.cut(spec.image_processor, picture, kind.layout(spec.image_processor, size)) is None
        same(picture_pixels(picture, spec), official(spec, picture))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_every_mode(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    noise((70, 50)).convert(mode).save(file)
    picture = open_image(MediaRef(path=str(file)), MediaOptions(exif="apply"))
    for name in ("aya vision", "clip", "qwen", "smolvlm"):
        spec = spec_of(FOLLOWED[name]())
        same(picture_pixels(picture, spec), official(spec, picture))


def test_a_picture_that_is_not_rgb_takes_the_long_way() -> None:
    spec = spec_of(FOLLOWED["clip"]())
    gray = noise((50, 40)).convert("L")
    same(picture_pixels(gray, spec), official(spec, gray))


def test_every_kind_is_covered() -> None:
    covered = {type(make()).__name__ for make in FOLLOWED.values()}
    assert covered == {name for kind in pictures.KINDS for name in kind.processors}


def test_tones_are_the_formula() -> None:
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)
    tones = make_tones(1 / 255, (mean, std))
    wanted = (np.arange(256)[None] / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    assert tones.table.dtype == np.float32 and np.abs(tones.table - wanted).max() < 1e-6


def test_arithmetic_only_where_it_gives_the_table() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    scales = [1 / 255, None, 1 / 127.5, 0.0123, 1.0, 1 / 254]
    means = [None, ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    ways = set()
    for tones in (make_tones(scale, mean) for scale in scales for mean in means):
        ways.add(tones.arithmetic is None)
        for channel in range(3):
            out = np.empty(256, np.float32)
            tones.write(channel, ramp, out)
            assert np.array_equal(out, tones.table[channel])
    assert ways == {True, False}
    assert make_tones(1 / 255, means[-1]).arithmetic is not None


HEIGHTS = [(480, 896), (640, 896), (480, 1344), (64, 448), (1, 32), (2, 64), (3, 96), (7, 224), (32, 64), (448, 896)]


@pytest.mark.parametrize("heights", HEIGHTS, ids=str)
def test_resized_as_pillow_does_by_the_short_way(heights: tuple[int, int]) -> None:
    source, height = heights
    for width in (40, 61):
        picture = noise((50, source), seed=source)
        found = resized_planes(picture, (width, height), PIL.Image.Resampling.BICUBIC)
        assert resample._row_sums(source, height) is not None
        wanted = np.asarray(picture.resize((width, height), PIL.Image.Resampling.BICUBIC))
        assert np.array_equal(np.stack(found, axis=-1), wanted)


def test_other_heights_and_filters_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resample._row_sums(479, 896) is None and resample._row_sums(896, 448) is None
    monkeypatch.setattr(resample, "_weights", lambda source, height: (np.zeros(height, int), np.ones((height, 1), int)))
    resample._row_sums.cache_clear()
    assert resample._row_sums(480, 896) is None  # does not agree with Pillow
    resample._row_sums.cache_clear()
    for way in (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.LANCZOS, PIL.Image.Resampling.NEAREST):
        picture = noise((64, 48))
        wanted = np.asarray(picture.resize((100, 96), way))
        assert np.array_equal(np.stack(resized_planes(picture, (100, 96), way), axis=-1), wanted)


def test_a_grid_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="is not 2×1 tiles"):
        tiles([(planes_of(noise((60, 32))), (1, 2))], (32, 32), make_tones(1 / 255, None))


def test_patches_stand_in_blocks() -> None:
    picture = PIL.Image.fromarray(np.arange(8 * 8, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    rows = patches(planes_of(picture), edge=2, merge=2, frames=1, tones=make_tones(1.0, None))
    assert rows.shape == (16, 12)
    assert rows[:, 0].tolist() == [0, 2, 16, 18, 4, 6, 20, 22, 32, 34, 48, 50, 36, 38, 52, 54]
    assert rows[0, :4].tolist() == [0, 1, 8, 9]


def test_pictures_come_back_from_their_tensors() -> None:
    picture = noise((64, 32))
    tones = make_tones(1 / 255, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    left, right = seen_tiles(tiles([(planes_of(picture), (1, 2))], (32, 32), tones), tones)
    assert np.array_equal(np.concatenate([left, right], axis=1), np.asarray(picture))
    rows = patches(planes_of(picture), edge=4, merge=2, frames=3, tones=tones)
    again = seen_patches(rows, (8, 16), edge=4, merge=2, frames=3, tones=tones)
    assert np.array_equal(np.asarray(again), np.asarray(picture))
