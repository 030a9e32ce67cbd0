"""Pictures as the official InternVL code cuts them: every row of the tiling table, every recorded tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import golden
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from vlmtune.config.schema import ImageOptions, MediaOptions
from vlmtune.data.media.pictures import open_image, size
from vlmtune.data.sample import MediaRef
from vlmtune.models.internvl import pictures
from vlmtune.models.internvl.pictures import InternVLSpec, official_spec

pytestmark = pytest.mark.golden

_PLACE = "internvl/tiling"
_CONTEXT = 7
_EXACT = 1e-6


def _file(name: str) -> Path:
    return golden.root() / _PLACE / name


@cache
def _read(name: str) -> Any:
    path = _file(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _spec(**keys: Any) -> InternVLSpec:
    config = {"vision_config": {"patch_size": 1}, "downsample_ratio": 1.0, "dynamic_image_size": True, **keys}
    return official_spec(config, _CONTEXT, ImageOptions())


def _rows() -> list[Any]:
    table = _read("tiling_table.json")
    return [
        pytest.param(
            dict(zip(table["columns"], row, strict=True)), id=golden.name(_file("tiling_table.json"), str(number))
        )
        for number, row in enumerate(table.get("rows", []))
    ]


@pytest.mark.parametrize("row", _rows())
def test_the_tiling_table(row: dict[str, Any]) -> None:
    spec = _spec(
        force_image_size=row["image_size"],
        min_dynamic_patch=row["min_num"],
        max_dynamic_patch=row["max_num"],
        use_thumbnail=row["use_thumbnail"],
    )
    (plan,) = pictures.plan([(row["width"], row["height"])], spec)
    assert plan.layout == (row["cols"], row["rows"])
    assert plan.num_tiles == row["n_tiles"]
    assert plan.num_tokens == row["n_tiles"] * row["image_size"] ** 2


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, id=golden.name(_file("candidate_order.json"), key)) for key in _read("candidate_order.json")],
)
def test_the_order_of_the_grids(key: str) -> None:
    least, most = map(int, key.split(","))
    recorded = [tuple(grid) for grid in _read("candidate_order.json")[key]]
    assert list(pictures.candidates(least, most, hash_order=True)) == recorded


def _tensors() -> dict[str, torch.Tensor]:
    path = _file("pixels.safetensors")
    return load_file(path) if path.exists() else {}


@pytest.mark.parametrize(
    "key", [pytest.param(key, id=golden.name(_file("pixels.safetensors"), key)) for key in _tensors()]
)
def test_the_tiles_as_numbers(key: str) -> None:
    expected = _tensors()[key]
    image, _, kind = key.rpartition(".")
    facts = _read("pixels.json")
    about = facts["images"].get(image)
    if about is None:
        assert image == "text_only_white"  # what the official loader makes up for a row without a picture
        about = {"image_size": expected.shape[-1], "min_num": 1, "max_num": 1, "use_thumbnail": True}
        picture = PIL.Image.new("RGB", (5, 3), "white")
    else:
        ref, options = MediaRef(path=str(_file(about["file"]))), MediaOptions(exif="ignore")
        assert size(ref, options) == (about["width"], about["height"])
        picture = open_image(ref, options)
    spec = _spec(
        force_image_size=about["image_size"],
        min_dynamic_patch=about["min_num"],
        max_dynamic_patch=about["max_num"],
        use_thumbnail=about["use_thumbnail"],
        dynamic_image_size=kind == "dynamic",
        pad2square=kind == "pad2square",
    )
    mean, std = facts[kind] if kind in facts else (facts["mean"], facts["std"])
    if (spec.mean, spec.std) != (tuple(mean), tuple(std)):
        assert kind in facts  # other numbers than ImageNet's by an option only
        spec = replace(spec, mean=tuple(mean), std=tuple(std))
    (plan,) = pictures.plan([picture.size], spec)
    found = pictures.pixels(picture, plan, spec)["pixel_values"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= _EXACT
