from __future__ import annotations

import pickle
from fractions import Fraction
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig

from vlmtune.config.schema import ImageOptions
from vlmtune.data.collate import smallest_picture
from vlmtune.data.sample import Encoded, Span
from vlmtune.errors import ConfigError, DataError, WeightsError
from vlmtune.models.xcomposer2 import pictures
from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.models.xcomposer2.pictures import XComposer2Spec, hd_size, spec_of

_TILE, _PATCH = 28, 7  # with 4khd 2 × 2 tokens a tile


def _spec(options: ImageOptions | None = None, *, hd: bool = True, size: int = _TILE, **keys: Any) -> XComposer2Spec:
    tower = CLIPVisionConfig(image_size=size, patch_size=_PATCH)
    config = XComposer2Config(vision_config=tower, high_resolution=hd, **keys)
    return spec_of(config, options or ImageOptions(), where="folder")


def _noise(width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def _pixels(picture: PIL.Image.Image, spec: XComposer2Spec) -> dict[str, torch.Tensor]:
    (plan,) = pictures.plan([picture.size], spec)
    return pictures.pixels(picture, plan, spec)


def _official(picture: PIL.Image.Image, spec: XComposer2Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """(global view, tiles) by plain steps in float64: the picture pasted on white, normalised, interpolated, cut."""
    resized, (left, top, right, bottom), (rows, columns) = hd_size(*picture.size, spec.max_tiles, spec.size)
    if picture.width < picture.height:
        turned = picture.transpose(PIL.Image.Transpose.TRANSPOSE).resize(resized[::-1], PIL.Image.Resampling.BILINEAR)
        small = turned.transpose(PIL.Image.Transpose.TRANSPOSE)
    else:
        small = picture.resize(resized, PIL.Image.Resampling.BILINEAR)
    canvas = PIL.Image.new("RGB", (resized[0] + left + right, resized[1] + top + bottom), "white")
    canvas.paste(small, (left, top))
    mean, std = (torch.tensor(triple, dtype=torch.float64)[:, None, None] for triple in (spec.mean, spec.std))
    values = (torch.from_numpy(np.array(canvas)).permute(2, 0, 1).double() / 255 - mean) / std
    whole = torch.nn.functional.interpolate(values[None], size=(spec.size, spec.size), mode="bicubic")[0]
    tiles = [
        values[:, row * spec.size : (row + 1) * spec.size, column * spec.size : (column + 1) * spec.size]
        for row in range(rows)
        for column in range(columns)
    ]
    return whole, torch.stack(tiles)


def test_a_4khd_picture_is_its_global_view_and_tiles() -> None:
    spec = _spec(max_tiles=6)
    (plan,) = pictures.plan([(100, 60)], spec)
    assert (plan.layout, plan.num_tiles, plan.resized) == ((2, 3), 7, None)
    assert plan.num_tokens == 7 * 4 + 1 + 3 * 2
    ids, slots = pictures.span_ids(plan, spec)
    assert ids.dtype == np.int32 and ids.tolist() == [0] * 35 and slots.all()
    found = pictures.pixels(_noise(100, 60), plan, spec)
    assert found["pixel_values"].shape == (7, 3, 28, 28) and found["pixel_values"].dtype == torch.float32
    assert found["tile_grids"].dtype == torch.int64 and found["tile_grids"].tolist() == [[2, 3]]


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (28, 28), (5, 3), (3, 5), (150, 40), (41, 300), (1, 1)])
@pytest.mark.parametrize("max_tiles", [1, 2, 5, 9, 16, 40])
def test_views_are_those_of_plain_steps(size: tuple[int, int], max_tiles: int) -> None:
    spec = _spec(max_tiles=max_tiles)
    whole, tiles = _official(_noise(*size), spec)
    found = _pixels(_noise(*size), spec)["pixel_values"].double()
    assert (found[1:] - tiles).abs().max() < 1e-6
    assert (found[0] - whole).abs().max() < 1e-6


def test_several_pictures_of_a_row_keep_their_grids() -> None:
    spec = _spec(max_tiles=6)
    sizes = [(100, 60), (60, 100), (28, 28)]
    plans = pictures.plan(sizes, spec)
    assert [plan.layout for plan in plans] == [(2, 3), (3, 2), (2, 2)]  # each has all tiles
    each = [pictures.pixels(_noise(*size), plan, spec) for size, plan in zip(sizes, plans, strict=True)]
    found = pictures.collate_pixels(each, spec)
    assert found["tile_grids"].tolist() == [[2, 3], [3, 2], [2, 2]]
    assert torch.equal(found["pixel_values"], torch.cat([one["pixel_values"] for one in each]))
    assert len(found["pixel_values"]) == 7 + 7 + 5
    assert pictures.collate_pixels([], spec) == {}


def test_square_pictures_are_stretched() -> None:
    spec = _spec(hd=False)
    (plan, other) = pictures.plan([(100, 60), (3, 900)], spec)
    assert (plan.layout, plan.num_tiles, plan.num_tokens, plan.resized) == ((1, 1), 1, 16, (28, 28))
    found = pictures.pixels(_noise(100, 60), plan, spec)
    assert list(found) == ["pixel_values"] and found["pixel_values"].shape == (1, 3, 28, 28)
    (seen,) = pictures.view(found, spec)
    assert np.array_equal(seen, _noise(100, 60).resize((28, 28), PIL.Image.Resampling.BICUBIC))
    tall = pictures.pixels(_noise(3, 900), other, spec)
    assert list(pictures.collate_pixels([found, tall], spec)) == ["pixel_values"]


def test_the_view_has_the_global_view_first() -> None:
    picture = PIL.Image.new("RGB", (56, 28), "white")
    picture.paste("black", (0, 0, 28, 28))
    seen = pictures.view(_pixels(picture, _spec(max_tiles=2)), _spec(max_tiles=2))
    assert [tile.size for tile in seen] == [(28, 28)] * 3
    left, right = (np.asarray(tile).mean() for tile in seen[1:])
    assert left < 3 and right > 252
    assert 115 < np.asarray(seen[0]).mean() < 205  # half the picture black, and white above and below


def test_a_picture_is_retouched_before_it_is_cut() -> None:
    for spec in (_spec(max_tiles=2), _spec(hd=False)):
        (plan,) = pictures.plan([(30, 20)], spec)
        found = pictures.pixels(_noise(30, 20), plan, spec, lambda picture: PIL.Image.new("RGB", picture.size, "white"))
        assert found["pixel_values"].min() > 1.9


def test_frames_of_videos_have_one_tile() -> None:
    spec = _spec(max_tiles=6)
    plans = pictures.plan([(100, 60), (100, 60)], spec, [None, 3])
    assert [(plan.layout, plan.is_frame) for plan in plans] == [((2, 3), False), ((1, 1), True)]
    assert pictures.pixels(_noise(100, 60), plans[1], spec)["pixel_values"].shape[0] == 2
    assert pictures.plan([(9, 9)], _spec(hd=False), [0])[0].is_frame


def test_a_picture_that_is_not_the_planned_one_is_an_error() -> None:
    spec = _spec(max_tiles=6)
    (plan,) = pictures.plan([(100, 60)], spec)
    with pytest.raises(ValueError, match="not"):
        pictures.pixels(_noise(60, 100), plan, spec)


def test_sizes_where_exact_arithmetic_gives_another() -> None:
    # 2352 / (77 / 33) is 1008 exactly, three tiles; the floats stay below it, and a row of white is added.
    assert 2352 / Fraction(77, 33) == 1008
    assert hd_size(77, 33, 25, 336).resized == (2352, 1007)
    assert hd_size(33, 77, 25, 336) == ((1007, 2352), (0, 0, 1, 0), (7, 3))


def test_a_size_fits_its_tiles() -> None:
    generator = np.random.default_rng(5)
    for width, height, most in generator.integers([1, 1, 1], [900, 900, 60], (300, 3)).tolist():
        (new_width, new_height), (left, top, right, bottom), (rows, columns) = hd_size(width, height, most, 336)
        assert (left + new_width + right, top + new_height + bottom) == (columns * 336, rows * 336)
        assert rows * columns <= most and 0 <= right - left <= 1 and 0 <= bottom - top <= 1
        longer, shorter = max(width, height), min(width, height)
        along = max(rows, columns)
        assert (along + 1) * ceil(Fraction((along + 1) * shorter, longer)) > most  # no larger size would do


@pytest.mark.parametrize("size", [(90000, 1), (1, 90000)])
def test_so_long_a_picture_that_nothing_is_left_is_refused(size: tuple[int, int]) -> None:
    spec = _spec(max_tiles=16)
    with pytest.raises(DataError) as error:
        pictures.plan([(30, 30), size], spec)
    assert str(error.value) == (
        f"nothing is left of a picture of {size[0]}×{size[1]} when its longer side has 448 pixels. Crop the picture."
    )
    assert pictures.plan([size], _spec(hd=False))[0].num_tokens == 16  # a square is stretched, whatever it was
    (thin,) = pictures.plan([(448, 1) if size[1] == 1 else (1, 448)], spec)
    assert thin.num_tiles == 17  # one row of pixels is enough


def test_options() -> None:
    assert _spec().max_tiles == 16  # the official scripts' hd_num
    assert _spec(ImageOptions(max_tiles=25), max_tiles=9).max_tiles == 25
    assert _spec(max_tiles=9).max_tiles == 9
    assert (_spec(hd=False).size, _spec(ImageOptions(size=42), hd=False).size) == (28, 42)
    # A square need not be a whole number of pairs of patches; a tile must.
    assert pictures.plan([(9, 9)], _spec(hd=False, size=35))[0].num_tokens == 25


@pytest.mark.parametrize(
    ("hd", "options", "message"),
    [
        (False, {"size": 30}, "size is 30, which is no multiple of the patch of 7 pixels. Set 28 or 35."),
        (False, {"size": 5}, "size is 5, which is no multiple of the patch of 7 pixels. Set 7."),
        (False, {"max_tiles": 16}, "max_tiles has no effect on this model: a picture is stretched to one square"),
        (False, {"fit": "pad_square", "size": 28}, "fit has no effect on this model"),
        (True, {"size": 28}, "size has no effect on a 4khd model"),
        (True, {"thumbnail": False, "min_tiles": 2}, "min_tiles, thumbnail has no effect on a 4khd model"),
    ],
)
def test_options_without_effect_or_sense_are_refused(hd: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _spec(ImageOptions(**options), hd=hd)
    assert error.value.where == "model.image" and message in str(error.value) and error.value.remedy


@pytest.mark.parametrize("max_tiles", [0, -1])
def test_no_tiles_are_refused(max_tiles: int) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):  # `config.load` makes it a ConfigError
        ImageOptions(max_tiles=max_tiles)
    with pytest.raises(StrictDataclassError, match=f"max_tiles is {max_tiles}"):  # the family makes it a WeightsError
        _spec(max_tiles=max_tiles)


@pytest.mark.parametrize(("hd", "size"), [(True, 35), (False, 30), (True, 30)])
def test_a_folder_whose_sizes_do_not_fit_is_refused(hd: bool, size: int) -> None:
    with pytest.raises(WeightsError, match=rf"folder: the tower's pictures of {size} pixels are not a whole number"):
        _spec(hd=hd, size=size)


def test_what_info_says() -> None:
    assert pictures.about(_spec(hd=False)) == "stretched to a square of 28 pixels"
    assert pictures.about(_spec(max_tiles=9)).startswith("enlarged to fill up to 9 tiles of 28 pixels, padded with ")


def test_specs_travel_to_workers() -> None:
    for spec in (_spec(), _spec(hd=False)):
        assert pickle.loads(pickle.dumps(spec)) == spec


def _encoded(length: int, *spans: tuple[int, int]) -> Encoded:
    ids = np.zeros(length, dtype=np.int32)  # literal <unk> ids: text wherever no span says otherwise
    places = tuple(Span(start, size, "image", index) for index, (start, size) in enumerate(spans))
    return Encoded(input_ids=ids, labels=ids, spans=places, media=(), origin="row")


def test_the_mask_says_where_pictures_stand() -> None:
    one, two, text = _encoded(6, (1, 2), (4, 1)), _encoded(3, (0, 3)), _encoded(2)
    assert pictures.image_mask([[one], [two], [text]]).int().tolist() == [
        [0, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    packed = pictures.image_mask([[text, one, two]])
    assert packed.dtype == torch.bool and packed.int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1]]
    assert pictures.image_mask([[one], [two]], left=True)[1].int().tolist() == [0, 0, 0, 1, 1, 1]


def test_the_picture_of_a_batch_without_pictures_is_one_tile() -> None:
    # `max_tiles` of the smallest picture would be as many as of the largest: 4khd enlarges whatever it gets.
    opened: Any = SimpleNamespace(family=pictures, spec=_spec(max_tiles=16))
    found = smallest_picture(opened)
    assert found["tile_grids"].tolist() == [[1, 1]] and len(found["pixel_values"]) == 2


@pytest.mark.parametrize(("most", "said"), [(1, "up to 1 tile of 56 pixels"), (16, "up to 16 tiles of 56 pixels")])
def test_a_single_tile_is_said_as_such(most: int, said: str) -> None:
    assert said in pictures.about(XComposer2Spec(high_resolution=True, size=56, patch=14, max_tiles=most))
