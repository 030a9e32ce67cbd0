"""InternLM-XComposer2 against numbers recorded from the official code: tower, logits, loss, gradients, adapters.

Tolerances are those of the records' README: float32 on a CPU.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from xcomposer2_models import furnish

import vlmtune
from vlmtune.export.write import export
from vlmtune.models.load import load_weights, read_folder
from vlmtune.models.registry import detect
from vlmtune.models.xcomposer2.config import native_config
from vlmtune.models.xcomposer2.weights import official_table, resize_positions

pytestmark = pytest.mark.golden

MODELS = [folder for folder in golden.folders("xcomposer2") if (folder / "cases.json").is_file()]
LOGITS, LOSS, FEATURES, TABLE, MERGED = 2e-4, 1e-5, 1e-4, 1e-5, 1e-4
KEY_BIAS = 1e-6  # a gradient that is zero by algebra, and noise in float32


@cache
def cases(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    return found


@cache
def records(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "cases.safetensors")


def each_case() -> list[Any]:
    """The cases with a whole conversation: the record says where in it pictures stand."""
    return [
        pytest.param(folder, name, id=golden.name(folder, name))
        for folder in MODELS
        for name in cases(folder)
        if f"{name}.im_mask" in records(folder)
    ]


def load(folder: Path, **changes: Any) -> Any:
    found = read_folder(folder)
    config = native_config(found)
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    return load_weights(found, detect(found), config, official_table()).eval()


def inputs(folder: Path, name: str, like: str = "") -> dict[str, Any]:
    """Arguments of our forward for a case; `like` is the case whose text and pictures it has."""
    io, case = records(folder), cases(folder)[like or name]
    mask = io[f"{like or name}.im_mask"].long()
    ids = torch.zeros_like(mask)
    if f"{like or name}.input_ids" in io:
        ids = io[f"{like or name}.input_ids"].clone()
    else:
        text = [token for part in case["tokenised_parts"] for row in part["ids"] for token in row]
        places = mask[0] == 0
        ids[0, places] = torch.tensor(text[: int(places.sum())])
    padding = io[f"{like or name}.attention_mask"]
    return {"input_ids": ids, "mm_token_type_ids": mask, "attention_mask": padding, **pictures(folder, like or name)}


def pictures(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The pictures of a case; those of 4khd as the official tower cuts them, done here with torch alone."""
    io, case = records(folder), cases(folder)[name]
    source = _named(case, name)
    if f"{name}.hd_transformed_uint8" in io:
        return high_resolution(folder, [name])
    return {"pixel_values": io[f"{source}.pixel_values"]} if f"{source}.pixel_values" in io else {}


def _named(case: dict[str, Any], name: str) -> str:
    """A record may say that its pictures are those of another case."""
    words = str(case.get("pixel_values", "")).split()
    return words[-1] if words else name


def high_resolution(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    io = records(folder)
    tile = json.loads((folder / "constants.json").read_text(encoding="utf-8"))["tile"]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    views, grids = [], []
    for name in names:
        picture = (io[f"{name}.hd_transformed_uint8"].float() / 255 - mean) / std
        whole = picture.permute(2, 0, 1)[None]
        views.append(interpolate(whole, size=(tile, tile), mode="bicubic", align_corners=False))
        rows, columns = whole.shape[2] // tile, whole.shape[3] // tile
        cut = whole.view(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).reshape(-1, 3, tile, tile)
        views.append(cut)
        grids.append((rows, columns))
    return {"pixel_values": torch.cat(views), "tile_grids": torch.tensor(grids)}


def targets(folder: Path, name: str) -> torch.Tensor:
    return records(folder)[f"{name}.targets"]


@pytest.mark.parametrize(("folder", "name"), each_case())
def test_logits_loss_and_gradients_are_the_recorded_ones(folder: Path, name: str) -> None:
    io, case = records(folder), cases(folder)[name]
    if case["loss_is_nan"]:  # mended: the plan refuses a row without a target; its logits hold all the same
        assert (targets(folder, name)[..., 1:] == -100).all()
        wanted = inputs(folder, name)
        with torch.no_grad():
            logits = load(folder)(**wanted).logits
        assert_close(logits[:, io[f"{name}.logit_rows"]], io[f"{name}.logits"], LOGITS)
        return
    model = load(folder)
    outputs = model(**inputs(folder, name), labels=targets(folder, name))
    assert_close(outputs.logits[:, io[f"{name}.logit_rows"]], io[f"{name}.logits"], LOGITS)
    assert abs(outputs.loss.item() - case["loss"]) < LOSS
    outputs.loss.backward()
    check_gradients(
        model, case.get("grad_norms", {}), {key: io[key] for key in io if key.startswith(f"{name}.grad.")}, name
    )


def check_gradients(model: Any, norms: dict[str, float | None], whole: dict[str, torch.Tensor], name: str) -> None:
    gradients = {parameter: tensor.grad for parameter, tensor in model.named_parameters()}
    table = official_table()
    for disk, norm in norms.items():
        link = table.link(disk)
        assert link is not None, disk
        gradient = gradients[link.parameters[0]]
        if norm is None or norm == 0.0:
            assert gradient is None or not gradient.any(), disk
        else:
            assert math.isclose(gradient.norm().item(), norm, rel_tol=1e-3, abs_tol=KEY_BIAS), disk
    for key, wanted in whole.items():
        link = table.link(key.removeprefix(f"{name}.grad."))
        assert link is not None, key
        assert torch.allclose(gradients[link.parameters[0]], wanted, atol=1e-5, rtol=1e-3), key


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() < tolerance


FEATURED = [
    pytest.param(folder, key, id=golden.name(folder, key))
    for folder in MODELS
    for key in records(folder)
    if key.endswith((".vit_features", ".projected", ".vit_tokens", ".global_patch_features", ".inputs_embeds"))
]


@pytest.mark.parametrize(("folder", "key"), FEATURED)
@torch.no_grad()
def test_tower_and_projector_give_the_recorded_features(folder: Path, key: str) -> None:
    model, wanted = load(folder), records(folder)[key]
    name, what = key.rsplit(".", 1)
    if what == "inputs_embeds":
        seen: list[torch.Tensor] = []
        model.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs(folder, name))
        return assert_close(seen[0], wanted, FEATURES)
    shown = pictures(folder, name) if name in each_name(folder) else of_several(folder, name)
    found = model.get_image_features(**shown)
    patches = found.last_hidden_state[:, 1:]
    if what == "vit_tokens":
        before: list[torch.Tensor] = []
        model.vision_proj[0].register_forward_pre_hook(lambda _module, args: before.append(args[0]))
        model.get_image_features(**shown)
        return assert_close(before[0][None], wanted, FEATURES)
    if what == "global_patch_features":
        return assert_close(patches[:1], wanted, FEATURES)
    rows = patches if what == "vit_features" else found.pooler_output.view(len(wanted), -1, wanted.shape[-1])
    return assert_close(rows, wanted, FEATURES)


def each_name(folder: Path) -> set[str]:
    return {key.split(".")[0] for key in records(folder) if ".im_mask" in key}


def of_several(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Pictures of several cases in one call, as the record names them in its words."""
    words = cases(folder)[name]["inputs"].replace(",", " ").split()
    return high_resolution(folder, [word for word in words if word in each_name(folder)])


PLAIN = [folder for folder in MODELS if "plain_ids.input_ids" in records(folder)]


@pytest.mark.parametrize("folder", PLAIN, ids=[golden.name(folder, "plain_ids") for folder in PLAIN])
@torch.no_grad()
def test_a_text_by_its_ids_alone(folder: Path) -> None:
    io = records(folder)
    found = load(folder)(input_ids=io["plain_ids.input_ids"], output_hidden_states=True)
    assert_close(found.logits, io["plain_ids.logits"], LOGITS)
    assert_close(found.hidden_states[1], io["plain_ids.hidden_1"], FEATURES)


LONG = [folder for folder in MODELS if "ntk.input_ids" in records(folder)]


@pytest.mark.parametrize("folder", LONG, ids=[golden.name(folder, "ntk") for folder in LONG])
@torch.no_grad()
def test_a_text_beyond_the_original_range(folder: Path) -> None:
    """Mended: the reference keeps the frequencies of the longest row; a short row after it is here as before it."""
    io, record = records(folder), cases(folder)["ntk"]
    scaling = record["rope_scaling"]
    rope = {"rope_type": scaling["type"], "factor": scaling["factor"], "rope_theta": 1e6}
    model = load(folder, max_position_embeddings=record["max_position_embeddings"], rope_parameters=rope)
    ids, fresh = io["ntk.input_ids"], io["ntk.logits_short_fresh"]
    short = ids[:, : fresh.shape[1]]
    assert_close(model(input_ids=short).logits, fresh, LOGITS)
    assert_close(model(input_ids=ids).logits, io["ntk.logits"], LOGITS)
    assert_close(model(input_ids=short).logits, fresh, LOGITS)


TABLES = [folder for folder in MODELS if (folder / "resize_pos.safetensors").is_file()]


@pytest.mark.parametrize("folder", TABLES, ids=[golden.name(folder, "resize_pos") for folder in TABLES])
def test_position_tables_are_resized_as_recorded(folder: Path) -> None:
    tables = load_file(folder / "resize_pos.safetensors")
    resized = [key for key in tables if ".resized" in key]
    for key in resized:
        native = tables[f"{key.split('.resized')[0]}.native"]
        wanted = tables[key]
        side = round((len(wanted) - 1) ** 0.5)
        assert_close(resize_positions(native, side), wanted, TABLE)
    assert resized


@pytest.mark.parametrize("folder", TABLES, ids=[golden.name(folder, "resize_pos", "down") for folder in TABLES])
@torch.no_grad()
def test_a_tower_with_a_smaller_table_gives_the_recorded_features(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tables = load_file(folder / "resize_pos.safetensors")
    weights = load_file(folder / "clip_tower_native.safetensors")
    pixels = tables["down.pixel_values"]
    known = json.loads((folder / "vision_tower_config.json").read_text(encoding="utf-8"))
    tower = CLIPVisionModel(CLIPVisionConfig(**{**known, "image_size": pixels.shape[-1]})).eval()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    name = "embeddings.position_embedding.weight"
    state[name] = resize_positions(state[name], pixels.shape[-1] // known["patch_size"])
    tower.load_state_dict(state, strict=False)
    assert_close(tower(pixels).last_hidden_state[:, 1:], tables["down.features"], FEATURES)


ADAPTERS = [folder for folder in golden.folders("xcomposer2") if (folder / "adapter_config.json").is_file()]


def each_adapted() -> list[Any]:
    return [
        pytest.param(folder, name, id=golden.name(folder, name))
        for folder in ADAPTERS
        for name, case in json.loads((folder / "expected.json").read_text(encoding="utf-8")).items()
        if isinstance(case, dict) and "source_case_in_vl" in case
    ]


def base_of(folder: Path) -> Path:
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    return (folder / named).resolve() if not Path(named).is_absolute() else folder.parent / Path(named).name


@pytest.mark.parametrize(("folder", "name"), each_adapted())
def test_an_adapter_of_the_official_script_on_our_model(folder: Path, name: str) -> None:
    """Its names and shapes are ours: partial LoRA stands beside the layers that it goes on."""
    base = folder.parent / base_of(folder).name
    record = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[name]
    expected = load_file(folder / "expected.safetensors")
    wanted = inputs(base, record["source_case_in_vl"])
    rows = expected[f"{name}.logit_rows"]

    model: Any = PeftModel.from_pretrained(load(base), folder, is_trainable=True).eval()
    outputs = model(**wanted, labels=expected[f"{name}.targets"])
    assert_close(outputs.logits[:, rows], expected[f"{name}.logits"], LOGITS)
    assert abs(outputs.loss.item() - record["loss"]) < LOSS
    outputs.loss.backward()
    gradients = {parameter: tensor.grad for parameter, tensor in model.named_parameters()}
    for parameter, norm in record["grad_norms"].items():
        assert math.isclose(gradients[parameter].norm().item(), norm, rel_tol=1e-3), parameter
    for key in (key for key in expected if key.startswith(f"{name}.grad.")):
        assert torch.allclose(gradients[key.removeprefix(f"{name}.grad.")], expected[key], atol=1e-5, rtol=1e-3), key

    merged = model.merge_and_unload()
    with torch.no_grad():
        after = merged(**wanted, labels=expected[f"{name}.targets"])
    assert_close(after.logits[:, rows], expected[f"{name}.merged_logits"], LOGITS)
    assert_close(after.logits[:, rows], outputs.logits[:, rows].detach(), MERGED)
    state = merged.state_dict()
    for key in (key for key in expected if key.startswith("merged.")):
        assert_close(state[key.removeprefix("merged.")], expected[key], 1e-6)


@pytest.mark.parametrize(("folder", "name"), each_adapted())
def test_an_adapter_of_the_official_script_as_users_have_it(folder: Path, name: str, tmp_path: Path) -> None:
    """Opened and exported by its folder, although its base is not where it says."""
    recorded = folder.parent / base_of(folder).name
    base = furnish(recorded, tmp_path / "base")
    case = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[name]["source_case_in_vl"]
    expected, wanted = load_file(folder / "expected.safetensors"), inputs(recorded, case)
    rows = expected[f"{name}.logit_rows"]
    out = export(folder, tmp_path / "out", base=base, device="cpu").out
    merged = load_file(out / "model.safetensors")
    for key in (key for key in expected if key.startswith("merged.")):
        assert_close(merged[key.removeprefix("merged.")], expected[key], 1e-6)
    for path, options, logits in ((folder, {"base": base}, f"{name}.logits"), (out, {}, f"{name}.merged_logits")):
        model = vlmtune.load(path, device="cpu", **options).model
        with torch.no_grad():
            assert_close(model(**wanted).logits[:, rows], expected[logits], LOGITS)


def test_records_of_every_kind_were_met() -> None:
    golden.skip_if_partial()
    assert len(each_case()) >= 10 and ADAPTERS and TABLES and LONG and PLAIN and FEATURED
