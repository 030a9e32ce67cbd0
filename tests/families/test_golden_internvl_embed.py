"""The region encoder against numbers recorded from CalliReader's code: resampler, nearest token, crops, a whole page.

Verdicts on regions: *equal* where the record has a result. *refused* by rule: a region that has no pixels after
rounding (the reference sleeps for hours and fails), or none after scaling (it fails); ours lists them in one message.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import golden
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.internvl import InternVLForConditionalGeneration

from vlmtune.cli.main import main
from vlmtune.config.schema import ImageOptions, MediaOptions
from vlmtune.embed.codebook import Codebook
from vlmtune.embed.encoder import RegionEncoder, crops_of
from vlmtune.embed.regions import SquareRule, read_page, refuse_bad_regions
from vlmtune.embed.resampler import load_resampler
from vlmtune.errors import DataError
from vlmtune.models.internvl import pictures
from vlmtune.models.internvl.config import native_config
from vlmtune.models.internvl.weights import official_table

pytestmark = pytest.mark.golden

RESAMPLER, COSINE, ROWS, PIXELS, FEATURES = 1e-5, 1e-5, 1e-4, 1e-6, 1e-4


def records(stem: str) -> list[Any]:
    """Every record of a kind: its JSON, as a parameter."""
    places = sorted((golden.root() / "internvl").glob("eit*"))
    return [
        pytest.param(file, id=golden.name(file.with_suffix("")))
        for place in places
        for file in sorted(place.glob(f"{stem}*.json"))
    ]


def meta(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def beside(file: Path, ending: str) -> dict[str, torch.Tensor]:
    return load_file(file.with_name(f"{file.stem}{ending}.safetensors"))


@pytest.mark.parametrize("file", records("resampler"))
def test_resampler(file: Path) -> None:
    """Result, loss and all gradients; the hyper-parameters but one come from the shapes."""
    record, io = meta(file), beside(file, "_io")
    resampler = load_resampler(beside(file, ""), heads=record["hyperparameters"]["heads"], where=str(file))
    for name, value in record["hyperparameters"].items():
        assert asdict(resampler.shape)[name] == value
    media = io["input.x"].requires_grad_()
    found = resampler(media)
    torch.testing.assert_close(found, io["expected.y"], atol=RESAMPLER, rtol=0)
    loss = torch.nn.functional.mse_loss(found, io["input.target"])
    assert float(loss.detach()) == pytest.approx(record["mse_loss"], abs=RESAMPLER)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in resampler.named_parameters()}
    assert set(grads) == set(record["grad_l2"])
    for name, norm in record["grad_l2"].items():
        assert float(grads[name].norm()) == pytest.approx(norm, rel=1e-4), name
    for key in io:
        if key.startswith("expected.grad."):
            name = key.removeprefix("expected.grad.")
            gradient = media.grad if name == "x" else grads[name]
            torch.testing.assert_close(gradient, io[key], atol=RESAMPLER, rtol=1e-4)


@pytest.mark.parametrize("file", records("vq"))
def test_nearest_token_and_the_way_back(file: Path) -> None:
    io, record = beside(file, ""), meta(file)
    codebook = Codebook(io["input.normed_embedding"], io["input.mu"], io["input.sigma"])
    nearest = codebook.nearest(io["input.output"])
    assert nearest.ids.tolist() == io["expected.indices"].tolist() == record["indices"]
    torch.testing.assert_close(nearest.cosines, io["expected.cos_sim"], atol=COSINE, rtol=0)
    kept = nearest.ids != 0
    assert (int(kept.sum()), kept.numel()) == (record["kept"], record["total"])
    back = codebook.restored(io["input.output"][kept], nearest.ids[kept])
    torch.testing.assert_close(back, io["expected.denormalised_drop_zero"], atol=COSINE, rtol=0)
    # *mended*: the reference loses the batch axis of a batch of one; ours keeps it, the ids are the same
    alone = codebook.nearest(io["input.output"][:1]).ids
    assert alone.shape == nearest.ids[:1].shape
    assert alone.flatten().tolist() == io["expected.indices_first_batch_squeezed"].tolist()


def crops() -> list[Any]:
    return [
        pytest.param(param.values[0], name, id=golden.name(Path(str(param.values[0])).with_suffix(""), name))
        for param in records("crops")
        for name in meta(Path(str(param.values[0])))["crops"]
    ]


@pytest.mark.parametrize(("file", "name"), crops())
def test_a_crop_on_its_square(file: Path, name: str) -> None:
    record, rule = meta(file)["crops"][name], SquareRule()
    crop = PIL.Image.open(file.with_name(record["png"])).convert("RGB")
    square = rule.shown(crop)
    assert list(square.size) == record["padded"] and list(rule.scaled(crop.size)) == record["resized"]
    left, top, right, bottom = record["border_left_top_right_bottom"]
    assert (left + right + record["resized"][0], top + bottom + record["resized"][1]) == square.size
    assert hashlib.sha256(np.asarray(square).tobytes()).hexdigest() == record["padded_rgb_sha256"]
    config = {"vision_config": {"patch_size": 14}, "force_image_size": square.size[0], "max_dynamic_patch": 12}
    config |= {"dynamic_image_size": True, "use_thumbnail": True}
    spec = pictures.official_spec(config, 0, ImageOptions())
    (plan,) = pictures.plan([square.size], spec, [0])
    values = pictures.pixels(square, plan, spec)["pixel_values"]
    assert len(values) == plan.num_tiles == record["n_tiles"]
    assert float(values.double().sum()) == pytest.approx(record["pixel_sum"], rel=1e-7)
    assert float(values.double().abs().sum()) == pytest.approx(record["pixel_abs_sum"], rel=1e-7)
    saved = beside(file, "").get(f"{name}.pixel_values_every_8th")
    if saved is not None:
        torch.testing.assert_close(values[:, :, ::8, ::8], saved, atol=PIXELS, rtol=0)


def degenerate() -> list[Any]:
    return [
        pytest.param(param.values[0], size, id=golden.name(Path(str(param.values[0])).with_suffix(""), size))
        for param in records("crops")
        for size in meta(Path(str(param.values[0]))).get("degenerate", {})
    ]


@pytest.mark.parametrize(("file", "size"), degenerate())
def test_a_crop_of_which_scaling_leaves_nothing_is_refused(file: Path, size: str, tmp_path: Path) -> None:
    width, height = map(int, size.split("x"))
    fails = meta(file)["degenerate"][size] != "ok"
    PIL.Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    shapes = [{"label": "a", "points": [[0, 0], [1, 1]]}, {"label": "b", "points": [[0, 0], [width, 3 * height]]}]
    (tmp_path / "a.json").write_text(json.dumps({"shapes": shapes[:1]}))
    page = read_page(tmp_path / "a.json", tmp_path / "a.png", MediaOptions(exif="ignore"), SquareRule())
    assert bool(page.bad) is fails  # verdict refused, by rule: a side of nothing
    if fails:
        with pytest.raises(DataError, match=r"1 \('a'\) is too thin"):
            refuse_bad_regions([page])
    else:
        assert page.regions[0].size == (width, height)


@pytest.fixture(scope="module")
def furnished(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A record's tower and projector as a model folder, and its resampler and codebook as an encoder beside it."""

    def furnish(file: Path, normed: torch.Tensor | None = None) -> Path:
        record, weights = meta(file), beside(file, "_weights")
        base = tmp_path_factory.mktemp("embed")
        out, source = base / "model", tiny_folder("internvl")
        shutil.copytree(source, out)
        tiny = json.loads((source / "config.json").read_text())
        edge, width = SquareRule().square, record["resampler"]["dim"]  # the reference shows it to any tower
        text = {**tiny["text_config"], "hidden_size": width, "architectures": ["Qwen2ForCausalLM"]}
        ratio = record["downsample_ratio"]
        official = {"vision_config": record["vision_config"], "llm_config": text, "downsample_ratio": ratio}
        tokens = int(edge // record["vision_config"]["patch_size"] * ratio) ** 2
        config = native_config(
            {**official, "ps_version": record["pixel_shuffle"]},
            context_id=tiny["image_token_id"],
            tokens_per_tile=tokens,
            has_head=True,
            where="",
        )
        model = InternVLForConditionalGeneration(config)
        table, state = official_table(None), {}
        for name in [name for name in weights if name.startswith(("vision_model.", "mlp1."))]:
            link = table.link(name)
            assert link is not None, name
            state |= dict(zip(link.parameters, link.op.split(weights.pop(name)), strict=True))
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        assert all(".language_model." in name or name == "lm_head.weight" for name in missing.missing_keys)
        (out / "model.safetensors").unlink()
        model.save_pretrained(out)
        settings = json.loads((out / "preprocessor_config.json").read_text())
        settings |= {"size": {"height": edge, "width": edge}}
        (out / "preprocessor_config.json").write_text(json.dumps(settings))
        encoder = base / "encoder"
        encoder.mkdir()
        if normed is not None:
            weights["normed_embedding.weight"] = normed
        save_file(weights, encoder / "encoder.safetensors")
        (encoder / "config.json").write_text(json.dumps({"model": "../model", "resampler": record["resampler"]}))
        return encoder

    return furnish


def page_of(file: Path, stem: str) -> tuple[Path, Path]:
    """The JSON and the picture that a record is about: `page` with what its own name has behind `stem`."""
    page = file.with_name(file.name.replace(stem, "page", 1))
    page = page if page.is_file() else file.with_name("page.json")
    return page, page.with_name(meta(page)["imagePath"])


@pytest.mark.parametrize("file", records("e2e"))
def test_a_page_from_end_to_end(file: Path, furnished: Callable[..., Path], tmp_path: Path) -> None:
    """In Python, and as a user encodes it: with the command line, one picture and a folder."""
    record, expected, folder = meta(file), beside(file, "_expected"), furnished(file)
    encoder = RegionEncoder.open(folder)
    assert encoder.features.rule == SquareRule()  # by the size of the tower
    boxes, picture = page_of(file, "e2e")
    page = read_page(boxes, picture, MediaOptions(exif="ignore"), encoder.features.rule)
    assert [list(region.size) for region in page.regions] == record["crop_sizes_in_order"] and not page.bad
    cut = list(crops_of(page.open(), page.regions))
    with torch.no_grad():
        features = encoder.features([encoder.features.pixels(crop) for crop in cut])
        torch.testing.assert_close(features[:1], expected["expected.visual_embed_first_region"], atol=FEATURES, rtol=0)
        torch.testing.assert_close(encoder.resampler(features), expected["expected.resampler_out"], atol=ROWS, rtol=0)
    found = encoder.encode_crops(cut)
    assert found.nearest.ids.tolist() == expected["expected.indices"].tolist() == record["indices"]
    rows = expected["expected.embedding"]
    torch.testing.assert_close(found.rows, rows, atol=ROWS, rtol=0)
    assert found.nearest.ids.numel() - len(found.rows) == record["dropped_zero"]
    torch.testing.assert_close(encoder.encode_page(page.open(), page.regions), rows, atol=ROWS, rtol=0)
    for name in ("a.safetensors", "a.pt"):
        arguments = ["embed", str(folder), str(picture), "--json", str(boxes), "-o", str(tmp_path / name)]
        assert main(arguments) == 0
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["embedding"], rows, atol=ROWS, rtol=0)
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=True), rows, atol=ROWS, rtol=0)


@pytest.mark.parametrize("file", records("e2e"))
def test_a_page_in_bfloat16(file: Path, furnished: Callable[..., Path]) -> None:
    """As many rows as the reference gives in bfloat16, and about as near to those of float32."""
    record, expected = meta(file), beside(file, "_expected")["expected.embedding"]
    encoder = RegionEncoder.open(furnished(file), dtype=torch.bfloat16)
    boxes, picture = page_of(file, "e2e")
    page = read_page(boxes, picture, MediaOptions(exif="ignore"), encoder.features.rule)
    found = encoder.encode_page(page.open(), page.regions)
    assert len(found) == record["bf16_rows"]
    if found.shape == expected.shape:
        assert float((found - expected).abs().max()) < 2 * record["bf16_max_abs_diff"]


@pytest.mark.parametrize("file", records("e2e"))
def test_boxes_without_area_are_refused(file: Path, tmp_path: Path) -> None:
    """Verdict *refused*; the reference sleeps. The boxes are made of a good one, by what the record says of them."""
    assert "zero width or height after clamping" in meta(file)["degenerate_boxes"]["case"]
    boxes, picture = page_of(file, "e2e")
    record = meta(boxes)
    (x, y), corner = record["shapes"][0]["points"]
    for number, points in enumerate(
        [[[x, y], [x, corner[1]]], [[x, y], [corner[0], y]], [[1.01, y], [1.2, corner[1]]]]
    ):
        record["shapes"].insert(2 * number, {"label": f"bad {number}", "points": points})
    (tmp_path / "page.json").write_text(json.dumps(record), encoding="utf-8")
    page = read_page(tmp_path / "page.json", picture, MediaOptions(exif="ignore"), SquareRule())
    assert [words.split(" (")[0] for words in page.bad] == ["1", "3", "5"]
    with pytest.raises(DataError) as caught:
        refuse_bad_regions([page])
    text = str(caught.value)
    assert all(f"bad {number}" in text for number in range(3)) and "has no area" in text and "is outside" in text


@pytest.mark.parametrize("file", records("calli_align"))
def test_the_variants_of_inference(file: Path, furnished: Callable[..., Path]) -> None:
    """Dropped or kept padding, nearest tokens in place of poor vectors. The reference hands its crops over in BGR."""
    record, io = meta(file), beside(file, "")
    base = file.with_name(record["weights"].split(",")[0]).name.replace("_weights.safetensors", ".json")
    encoder = RegionEncoder.open(furnished(file.with_name(base), io["input.normed_embedding"]))
    page = PIL.Image.open(file.with_name(record["page"])).convert("RGB")
    cut = []
    for box, channels in record["crop_order_and_channels"]:
        crop = page.crop(tuple(box))
        cut.append(PIL.Image.merge("RGB", crop.split()[::-1]) if channels == "BGR" else crop)
    cases = [key for key in io if key.startswith("expected.drop_zero_")]
    assert cases
    for key in cases:
        drop, hard = ("true" in part for part in key.split(".")[1:])
        variant = RegionEncoder(
            features=encoder.features,
            resampler=encoder.resampler,
            codebook=encoder.codebook,
            padding_id=0 if drop else None,
            hard_below=record["hard_vq_threshold"] if hard else None,
        )
        found = variant.encode_crops(cut)
        assert found.nearest.ids.tolist() == io["expected.indices"].tolist()
        torch.testing.assert_close(found.nearest.cosines, io["expected.cos_sim"], atol=ROWS, rtol=0)
        torch.testing.assert_close(found.rows, io[key], atol=ROWS, rtol=0)


def test_the_records_are_there() -> None:
    golden.skip_if_partial()
    assert all(records(stem) for stem in ("resampler", "vq", "crops", "e2e", "calli_align"))
    kinds = {meta(param.values[0])["degenerate"][param.values[1]] == "ok" for param in degenerate()}
    assert kinds == {True, False} and len(crops()) > 1
