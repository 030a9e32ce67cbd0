"""Pictures as the official XComposer2 code cuts them: every row of the size table, every recorded tensor.

The table's rows are *equal* (those as well where exact arithmetic would give another size: the released weights saw
the size that floats give), or *refused*, where the official code raises an error without saying which row it was.
"""

from __future__ import annotations

import csv
import json
from functools import cache
from typing import Any

import golden
import numpy as np
import PIL.Image
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import CLIPVisionConfig
from verdicts import Rule, decide, report

from vlmtune.config.schema import ImageOptions
from vlmtune.errors import DataError
from vlmtune.models.xcomposer2 import pictures
from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.models.xcomposer2.pictures import XComposer2Spec, hd_size, spec_of

pytestmark = pytest.mark.golden

_ROOT = golden.root() / "xcomposer2"
_EXACT = 1e-6
_PATCH = 14  # of CLIP-L/14-336, where a record does not say
_TILE = 336
_Row = dict[str, str]

_RULES: tuple[Rule[_Row], ...] = (
    Rule(
        "no tile is allowed",
        "refused",
        "the official transform fails on every picture; ours does when the options are read",
        lambda row: int(row["hd_num"]) < 1,
    ),
    Rule(
        "no row of pixels is left",
        "refused",
        "the official transform fails on a picture whose shorter side vanishes; ours says so, with the row",
        lambda row: _shorter_side(row) < 1,
    ),
)


def _shorter_side(row: _Row) -> int:
    """In pixels, after the longer side has been brought to the most tiles that fit; as floats would have it."""
    longer, shorter = sorted((int(row["width"]), int(row["height"])), reverse=True)
    most = int(row["hd_num"])
    fits = [along for along in range(1, most + 1) if along * -(-along * shorter // longer) <= most]
    return int(fits[-1] * _TILE / (longer / shorter))


@cache
def _read(name: str) -> Any:
    path = _ROOT / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def _tensors(name: str) -> dict[str, torch.Tensor]:
    path = _ROOT / name
    return load_file(path) if path.exists() else {}


@cache
def _table() -> list[_Row]:
    path = _ROOT / "hd_transform_table.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _spec(*, high_resolution: bool, size: int, patch: int = _PATCH, max_tiles: int | None = None) -> XComposer2Spec:
    tower = CLIPVisionConfig(image_size=size, patch_size=patch)
    config = XComposer2Config(vision_config=tower, high_resolution=high_resolution)
    return spec_of(config, ImageOptions(max_tiles=max_tiles), where="golden")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=golden.name(_ROOT / "hd_transform_table.csv", str(number)))
        for number, row in enumerate(_table(), start=2)
    ],
)
def test_the_size_table(row: _Row) -> None:
    size, most = (int(row["width"]), int(row["height"])), int(row["hd_num"])
    if decide(row, _RULES).verdict == "refused":
        assert any(value.startswith("error") for value in row.values())  # one column early in the recorded table
    if most < 1:
        with pytest.raises(ValidationError):
            ImageOptions(max_tiles=most)
        return
    spec = _spec(high_resolution=True, size=_TILE, max_tiles=most)
    if decide(row, _RULES).verdict == "refused":
        with pytest.raises(DataError, match=rf"nothing is left of a picture of {size[0]}×{size[1]}"):
            pictures.plan([size], spec)
        return
    numbers = {name: int(value) for name, value in row.items() if name != "note"}
    found = hd_size(*size, most, _TILE)
    assert found.resized == (numbers["resized_w"], numbers["resized_h"])
    assert found.padding == tuple(numbers[f"pad_{side}"] for side in ("left", "top", "right", "bottom"))
    assert found.grid == (numbers["tile_rows"], numbers["tile_cols"])
    assert (numbers["out_w"], numbers["out_h"]) == (found.grid[1] * _TILE, found.grid[0] * _TILE)
    (plan,) = pictures.plan([size], spec)
    assert plan.num_tokens == numbers["visual_tokens"]
    assert plan.num_tiles == numbers["tile_rows"] * numbers["tile_cols"] + 1


def test_the_verdicts_on_the_size_table() -> None:
    golden.skip_if_partial()
    report(_table(), _RULES)
    assert sum(decide(row, _RULES).verdict == "refused" for row in _table()) > 0
    assert sum(row["note"] == "float_rounding" for row in _table()) > 0  # *equal*: the floats are followed


def _preprocessed() -> list[Any]:
    return [
        pytest.param(name, id=golden.name(_ROOT / "preprocess.json", name)) for name in sorted(_read("preprocess.json"))
    ]


@pytest.mark.parametrize("name", _preprocessed())
def test_pictures_at_the_real_sizes(name: str) -> None:
    facts, tensors = _read("preprocess.json")[name], _tensors("preprocess.safetensors")
    image, _, kind = name.partition(".")
    kind, _, number = kind.rpartition("_")
    picture = PIL.Image.fromarray(tensors[f"{image}.uint8"].numpy())
    _, height, width = facts["shape"]
    if kind == "square":
        spec = _spec(high_resolution=False, size=int(number), patch=1)
        assert facts["shape"] == [3, int(number), int(number)]
        (values,) = _pixels(picture, spec)["pixel_values"]
        assert abs(values.double().mean().item() - facts["mean"]) < _EXACT
        assert abs(values.double().std().item() - facts["std"]) < _EXACT
    else:
        spec = _spec(high_resolution=True, size=_TILE, max_tiles=int(number))
        values = _joined(_pixels(picture, spec))
        seen = _bytes(values, spec)
        assert seen.shape == (height, width, 3)
        assert int(seen.sum()) == facts["uint8_sum"]
        assert abs(values.double().mean().item() - facts["mean"]) < _EXACT
    for key, expected in tensors.items():
        if not key.startswith(f"{name}."):
            continue
        part, step = _step(key)
        found = torch.from_numpy(seen[::step, ::step]) if part == "uint8" else values[:, ::step, ::step]
        assert found.shape == expected.shape
        assert (found.double() - expected.double()).abs().max() <= (0 if part == "uint8" else _EXACT)


def _step(key: str) -> tuple[str, int]:
    """("uint8" or "values", stride) of a recorded slice: ``img0.hd_2.uint8_slice8``, ``img0.square_490.slice9``."""
    last = key.rpartition(".")[2]
    what, _, step = last.rpartition("slice")
    assert what in ("", "uint8_") and step.isdigit(), f"{key}: a record of a new form"
    return what.rstrip("_") or "values", int(step)


def _hd_cases() -> list[Any]:
    tensors = _tensors("hd4k/cases.safetensors")
    return [
        pytest.param(name, case, id=golden.name(_ROOT / "hd4k", "cases", name))
        for name, case in sorted(_read("hd4k/cases.json").items())
        if f"{name}.image_uint8" in tensors
    ]


@pytest.mark.parametrize(("name", "case"), _hd_cases())
def test_pictures_of_the_4khd_cases(name: str, case: dict[str, Any]) -> None:
    tensors, tower = _tensors("hd4k/cases.safetensors"), _read("hd4k/vision_tower_config.json")
    tile, patch = _read("hd4k/constants.json")["tile"], tower["patch_size"]
    picture = PIL.Image.fromarray(tensors[f"{name}.image_uint8"].numpy())
    spec = _spec(high_resolution=True, size=tile, patch=patch, max_tiles=case["hd_num"])
    (plan,) = pictures.plan([picture.size], spec)
    assert list(picture.size) == case["image_wh"]
    assert list(plan.layout) == case["tiles_hw"]
    assert [plan.num_tokens] == case["n_visual_tokens"] == [int(tensors[f"{name}.im_mask"].sum())]
    found = _pixels(picture, spec)
    values = _joined(found)
    whole = tensors[f"{name}.hd_transformed_uint8"]
    assert np.array_equal(_bytes(values, spec), whole.numpy())
    mean, std = (torch.tensor(triple)[:, None, None] for triple in (spec.mean, spec.std))
    expected = tensors.get(f"{name}.pixel_values", (whole.permute(2, 0, 1) / 255 - mean)[None] / std)
    assert (values - expected[0]).abs().max() <= _EXACT
    # The global view is not recorded as pixels; the reference says how it is made.
    view = torch.nn.functional.interpolate(expected, size=(tile, tile), mode="bicubic")[0]
    assert (found["pixel_values"][0] - view).abs().max() <= _EXACT


def _square_cases() -> list[Any]:
    found = [name for name in _tensors("vl/cases.safetensors") if "_uint8" in name]
    return [pytest.param(name, id=golden.name(_ROOT / "vl", "cases", name)) for name in sorted(found)]


@pytest.mark.parametrize("name", _square_cases())
def test_pictures_of_the_square_cases(name: str) -> None:
    tensors = _tensors("vl/cases.safetensors")
    case, _, image = name.rpartition(".")
    expected = tensors[f"{case}.pixel_values"][int(image.split("_")[1])]
    spec = _spec(high_resolution=False, size=expected.shape[-1], patch=1)
    (values,) = _pixels(PIL.Image.fromarray(tensors[name].numpy()), spec)["pixel_values"]
    assert (values - expected).abs().max() <= _EXACT


def test_every_kind_of_record_was_there() -> None:
    golden.skip_if_partial()
    assert all((_table(), _preprocessed(), _hd_cases(), _square_cases()))


def _pixels(picture: PIL.Image.Image, spec: XComposer2Spec) -> dict[str, torch.Tensor]:
    (plan,) = pictures.plan([picture.size], spec)
    return pictures.pixels(picture, plan, spec)


def _joined(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tiles without the global view as one picture (3, H, W)."""
    rows, columns = found["tile_grids"][0].tolist()
    tiles = found["pixel_values"][1:]
    _, _, edge, _ = tiles.shape
    laid = tiles.reshape(rows, columns, 3, edge, edge).permute(2, 0, 3, 1, 4)
    return laid.reshape(3, rows * edge, columns * edge)


def _bytes(values: torch.Tensor, spec: XComposer2Spec) -> np.ndarray:
    mean, std = (torch.tensor(triple, dtype=torch.float64)[:, None, None] for triple in (spec.mean, spec.std))
    grey = (values.double() * std + mean) * 255
    assert (grey - grey.round()).abs().max() < 1e-3
    return grey.round().permute(1, 2, 0).to(torch.uint8).numpy()
