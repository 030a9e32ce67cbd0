from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from vlmtune.config.schema import ImageOptions
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.internvl import pictures
from vlmtune.models.internvl.pictures import InternVLSpec, native_spec, official_spec

_CONFIG = {
    "vision_config": {"image_size": 28, "patch_size": 7},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
_NATIVE = {"vision_config": {"image_size": [28, 28], "patch_size": [7, 7]}, "downsample_ratio": 0.5}
_PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "crop_to_patches": False,
    "size": {"height": 28, "width": 28},
    "min_patches": 1,
    "max_patches": 12,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _official(options: ImageOptions | None = None, **keys: Any) -> InternVLSpec:
    return official_spec({**_CONFIG, **keys}, 9, options or ImageOptions())


def _native(options: ImageOptions | None = None, **keys: Any) -> InternVLSpec:
    return native_spec(_NATIVE, {**_PREPROCESSOR, **keys}, 9, options or ImageOptions())


def _noise(width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def _tiles(picture: PIL.Image.Image, spec: InternVLSpec) -> torch.Tensor:
    (plan,) = pictures.plan([picture.size], spec)
    return pictures.pixels(picture, plan, spec)["pixel_values"]


def test_one_picture_is_context_ids_and_tiles_in_step() -> None:
    spec = _official()
    (plan,) = pictures.plan([(100, 80)], spec)
    assert (plan.layout, plan.num_tiles, plan.num_tokens, plan.resized) == ((3, 2), 7, 28, (84, 56))
    ids, slots = pictures.span_ids(plan, spec)
    assert ids.dtype == np.int32 and ids.tolist() == [9] * 28 and slots.all()
    values = pictures.pixels(_noise(100, 80), plan, spec)["pixel_values"]
    assert values.shape == (7, 3, 28, 28) and values.dtype == torch.float32
    assert pictures.collate_pixels([{"pixel_values": values}] * 2, spec)["pixel_values"].shape[0] == 14
    assert pictures.collate_pixels([], spec) == {}


def test_the_view_is_what_the_tower_was_given() -> None:
    picture = _noise(30, 90)
    spec = _official()
    seen = pictures.view({"pixel_values": _tiles(picture, spec)}, spec)
    stretched = picture.resize((28, 84), PIL.Image.Resampling.BICUBIC)
    assert [np.array_equal(seen[row], np.asarray(stretched)[row * 28 : row * 28 + 28]) for row in range(3)] == [
        True
    ] * 3
    assert np.array_equal(seen[3], picture.resize((28, 28), PIL.Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("pictures_of_row", "most"), [(1, 6), (2, 3), (3, 2), (4, 1), (6, 1), (7, 0), (9, 0)])
def test_pictures_of_an_official_row_share_the_tiles(pictures_of_row: int, most: int) -> None:
    spec = _official()
    plans = pictures.plan([(600, 100)] * pictures_of_row, spec)
    alone = pictures.plan([(600, 100)], replace(spec, max_tiles=most))
    assert (
        [plan.layout for plan in plans] == [alone[0].layout] * pictures_of_row == [(max(most, 1), 1)] * pictures_of_row
    )
    assert [plan.layout for plan in pictures.plan([(600, 100)] * 2, _native())] == [(6, 1)] * 2


def test_too_many_pictures_for_the_fewest_tiles_are_one_tile_each() -> None:
    assert [plan.num_tiles for plan in pictures.plan([(80, 80)] * 4, _official(min_dynamic_patch=2))] == [1] * 4


def test_frames_are_one_tile_and_take_nothing_from_pictures() -> None:
    plans = pictures.plan([(600, 100)] * 4, _official(), [None, 0, 5, 9])
    assert [plan.layout for plan in plans] == [(6, 1), (1, 1), (1, 1), (1, 1)]
    assert pictures.pixels(_noise(600, 100), plans[1], _official())["pixel_values"].shape[0] == 1


def test_an_uncut_picture_is_stretched_or_padded() -> None:
    picture = PIL.Image.new("RGB", (60, 20), "white")
    stretched = _official(dynamic_image_size=False)
    assert len(_tiles(picture, stretched)) == 1 and _tiles(picture, stretched).min() > 2
    padded = _official(dynamic_image_size=False, pad2square=True)
    values = _tiles(picture, padded)[0]
    assert values[:, 14].min() > 2 and values[:, [0, -1]].abs().max() < 0.02  # bars of the mean colour
    assert pictures.plan([picture.size], padded)[0].resized is None


def test_defaults_of_the_official_configuration_class() -> None:
    spec = official_spec({"vision_config": {}}, 1, ImageOptions())
    assert (spec.image_size, spec.tokens_per_tile, spec.min_tiles, spec.max_tiles) == (224, 64, 1, 6)
    assert not spec.dynamic and not spec.thumbnail and not spec.pad_square
    big = official_spec(
        {"force_image_size": 448, "vision_config": {"image_size": 224, "patch_size": 14}}, 1, ImageOptions()
    )
    assert (big.image_size, big.tokens_per_tile) == (448, 256)


def test_specs_travel_to_workers() -> None:
    for spec in (_official(), _native()):
        assert pickle.loads(pickle.dumps(spec)) == spec


_SIZES = [(w, h) for w in (1, 13, 28, 57, 80, 333, 700) for h in (1, 20, 28, 56, 90, 200, 701)]


@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 6), (1, 1), (1, 40), (4, 3)])
def test_counts_of_a_native_folder_are_those_of_transformers(least: int, most: int) -> None:
    # InternVLProcessor passes crop_to_patches=True on, whatever the file says.
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=least, max_patches=most
    )
    spec = _native(min_patches=least, max_patches=most)
    for width, height in _SIZES:
        (plan,) = pictures.plan([(width, height)], spec)
        assert plan.num_tiles == theirs.get_number_of_image_patches(height, width), (width, height)


@pytest.mark.parametrize("changed", [{}, {"do_normalize": False}, {"resample": 2, "image_std": [1, 0.5, 0.25]}])
@pytest.mark.parametrize("size", [(100, 80), (37, 120), (28, 28), (5, 3), (150, 40)])
def test_tiles_of_a_native_folder_are_those_of_transformers(size: tuple[int, int], changed: dict[str, Any]) -> None:
    picture = _noise(*size)
    theirs = GotOcr2ImageProcessorPil.from_dict({**_PREPROCESSOR, **changed, "crop_to_patches": True})
    expected = theirs([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(_tiles(picture, _native(**changed)), expected)


def test_each_layout_keeps_its_order_of_equal_grids() -> None:
    # The recorded order of the official loader has 4×1 before 2×2 up to four tiles; transformers goes by columns.
    official, native = (pictures.candidates(1, 4, hash_order=kind) for kind in (True, False))
    assert official != native and sorted(official) == sorted(native)
    assert [grid for grid in official if grid[0] * grid[1] == 4] == [(4, 1), (1, 4), (2, 2)]
    assert [grid for grid in native if grid[0] * grid[1] == 4] == [(1, 4), (2, 2), (4, 1)]
    # 4×1 and 2×2 are equally like 2.5 : 1; the later one wins where the picture has pixels enough for it.
    layouts = [
        pictures.plan([(100, 40)], spec)[0].layout
        for spec in (_official(min_dynamic_patch=4, max_dynamic_patch=4), _native(min_patches=4, max_patches=4))
    ]
    assert layouts == [(2, 2), (4, 1)]


def test_many_tiles_are_counted_at_once() -> None:
    assert len(pictures.candidates(1, 1000, hash_order=True)) == 7069  # the sum of the divisors' numbers up to 1000


def test_settings_read_back_are_the_same() -> None:
    spec = _official(ImageOptions(max_tiles=4))
    assert official_spec({**_CONFIG, **pictures.official_settings(spec)}, 9, ImageOptions()) == spec
    native = native_spec(_NATIVE, pictures.picture_settings(spec), 9, ImageOptions())
    assert native == replace(spec, shared=False, hash_order=False)
    uncut = pictures.picture_settings(_official(dynamic_image_size=False))
    assert pictures.plan([(90, 20)], native_spec(_NATIVE, uncut, 9, ImageOptions()))[0].num_tiles == 1


def test_what_a_native_folder_cannot_say_is_told() -> None:
    assert not pictures.native_gaps(_native())
    assert not pictures.native_gaps(_official(dynamic_image_size=False))
    assert len(pictures.native_gaps(_official(use_thumbnail=False))) == 2
    assert "padded" in pictures.native_gaps(_official(dynamic_image_size=False, pad2square=True))[0]


def test_options_act() -> None:
    assert _official(ImageOptions(max_tiles=3, min_tiles=2)) == _official(max_dynamic_patch=3, min_dynamic_patch=2)
    assert _official(ImageOptions(thumbnail=False)) == _official(use_thumbnail=False)
    assert _official(ImageOptions(size=56)) == _official(force_image_size=56)
    assert _official(ImageOptions(size=56)).tokens_per_tile == 16
    uncut = _official(ImageOptions(max_tiles=1, fit="pad_square"))
    assert uncut == _official(max_dynamic_patch=1, dynamic_image_size=False, pad2square=True)
    assert _official(ImageOptions(max_tiles=6), dynamic_image_size=False) == _official()
    assert _native(ImageOptions(max_tiles=2, size=56)) == replace(
        _native(max_patches=2), image_size=56, tokens_per_tile=16
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_pixels": 5}, "max_pixels has no effect"),
        ({"size": 30}, "multiple of 14"),
        ({"min_tiles": 7}, "min_tiles is 7 and max_tiles is 6"),
        ({"max_tiles": 1, "thumbnail": True}, "thumbnail has no effect"),
        ({"max_tiles": 1, "min_tiles": 1}, "min_tiles has no effect"),
        ({"fit": "pad_square"}, "fit: pad_square has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _official(ImageOptions(**options))


@pytest.mark.parametrize("options", [{"thumbnail": False}, {"fit": "pad_square"}])
def test_a_native_folder_refuses_what_its_processor_cannot_do(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="InternVLProcessor"):
        _native(ImageOptions(**options))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_dynamic_patch": "six"}, "`max_dynamic_patch` is 'six'"),
        ({"force_image_size": 30}, "multiple of 14"),
        ({"downsample_ratio": 0}, "downsample_ratio 0"),
        ({"vision_config": {"patch_size": 0}}, "patch_size is 0"),
    ],
)
def test_an_official_config_without_sense(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        _official(**keys)


def test_a_native_folder_with_a_foreign_image_processor() -> None:
    with pytest.raises(WeightsError, match="CLIPImageProcessor"):
        _native(image_processor_type="CLIPImageProcessor")
    with pytest.raises(WeightsError, match="a square"):
        _native(size={"height": 28, "width": 56})


def test_tiles_are_retouched_one_by_one() -> None:
    spec, seen = _official(), []

    def invert(tile: PIL.Image.Image) -> PIL.Image.Image:
        seen.append(tile.size)
        return tile.point(lambda value: 255 - value)

    picture = _noise(100, 80)
    (plan,) = pictures.plan([picture.size], spec)
    values = pictures.pixels(picture, plan, spec, retouch=invert)["pixel_values"]
    assert seen == [(28, 28)] * 7
    changed, plain = (
        pictures.view(given, spec) for given in ({"pixel_values": values}, pictures.pixels(picture, plan, spec))
    )
    assert all(np.array_equal(255 - np.asarray(a), np.asarray(b)) for a, b in zip(plain, changed, strict=True))
