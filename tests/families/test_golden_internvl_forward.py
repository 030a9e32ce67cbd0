"""Official InternVL folders against numbers recorded from the official implementation: features, logits, loss,
gradients, a few steps of AdamW, generation; and the way to the other layout and back.

Tolerances are those of the records' README: float32 on a CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from furnished import official_grads
from safetensors.torch import load_file
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from vlmtune.models.family import ModelFolder
from vlmtune.models.internvl.config import decoder_heads, native_config
from vlmtune.models.internvl.weights import official_table
from vlmtune.models.load import load_weights, read_folder
from vlmtune.models.registry import detect
from vlmtune.weights.layout import Link
from vlmtune.weights.names import saved_links
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

CASES = [folder for folder in golden.folders("internvl/forward") if (folder / "config.json").is_file()]
TOWERS = [folder for folder in golden.folders("internvl/forward") if (folder / "vision_config.json").is_file()]
FEATURES, LOGITS, LOSS, CURVE = 1e-4, 2e-4, 2e-5, 5e-4


def meta(case: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((case / "meta.json").read_text(encoding="utf-8"))
    return record


def batches(case: Path, *, fits: bool) -> list[str]:
    """The batches of a case whose tiles give as many features as there are placeholders; or those that do not."""
    io, record = load_file(case / "io.safetensors"), meta(case)
    found = []
    for name in sorted({key.split(".")[0] for key in io if key.endswith("input.labels")}):
        tiles = int(io[f"{name}.input.image_flags"].sum())
        places = int((io[f"{name}.input.input_ids"] == record["img_context_token_id"]).sum())
        if (places == tiles * record["num_image_token"]) == fits:
            found.append(name)
    return found


def each_batch(*, fits: bool) -> list[Any]:
    return [pytest.param(case, name, id=golden.name(case, name)) for case in CASES for name in batches(case, fits=fits)]


def load(case: Path) -> Any:
    """As the program does; the folder has no tokenizer, so the record says which id is the placeholder."""
    folder, record = read_folder(case), meta(case)
    names = Shards(case).infos
    config = native_config(
        folder.config,
        context_id=record["img_context_token_id"],
        tokens_per_tile=record["num_image_token"],
        has_head=any(name.endswith(("lm_head.weight", "output.weight")) for name in names),
        where=str(case),
    )
    return load_weights(folder, detect(folder), config, table_of(folder)).eval()


def table_of(folder: ModelFolder) -> Any:
    return official_table(decoder_heads(folder.config))


def inputs(case: Path, name: str) -> dict[str, Any]:
    io = load_file(case / "io.safetensors")
    shown = io[f"{name}.input.image_flags"].bool()
    pixels = io[f"{name}.input.pixel_values"][shown]
    return {
        "input_ids": io[f"{name}.input.input_ids"],
        "attention_mask": io[f"{name}.input.attention_mask"],
        "labels": io[f"{name}.input.labels"],
        **({"pixel_values": pixels} if len(pixels) else {}),
        "use_cache": False,
    }


def features(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of the tower that are used, and the features of the projector."""
    found = model.model.get_image_features(pixel_values=pixels, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    hidden = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
    return hidden, found.pooler_output


@pytest.mark.parametrize(("case", "name"), each_batch(fits=True))
@torch.no_grad()
def test_features_logits_and_loss(case: Path, name: str) -> None:
    model, io = load(case), load_file(case / "io.safetensors")
    hidden, found = features(model, io[f"{name}.input.pixel_values"])
    torch.testing.assert_close(hidden, io[f"{name}.expected.vit_hidden_selected"], atol=FEATURES, rtol=0)
    torch.testing.assert_close(found, io[f"{name}.expected.vit_embeds"], atol=FEATURES, rtol=0)
    given = inputs(case, name)
    output = model(**given)
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(output.logits[seen], io[f"{name}.expected.logits"][seen], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.loss, io[f"{name}.expected.loss"], atol=LOSS, rtol=0)


@pytest.mark.parametrize(("case", "name"), each_batch(fits=False))
@torch.no_grad()
def test_features_that_do_not_fit_their_placeholders_are_refused(case: Path, name: str) -> None:
    """Verdict *refused*: the official code truncates features, warns, and multiplies the loss by 0."""
    assert float(load_file(case / "io.safetensors")[f"{name}.expected.loss"]) == 0.0
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        load(case)(**inputs(case, name))


def links(case: Path) -> list[Link]:
    table = table_of(read_folder(case))
    return [link for disk in Shards(case).infos if (link := table.link(disk))]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=golden.name(case, name))
        for case in CASES
        for name, batch in meta(case)["batches"].items()
        if "grad_l2" in batch
    ],
)
def test_gradients(case: Path, name: str) -> None:
    model, record, io = load(case), meta(case)["batches"][name], load_file(case / "io.safetensors")
    model(**inputs(case, name)).loss.backward()
    grads = official_grads(model, links(case))
    assert set(record["grad_l2"]) <= set(grads)
    for key, expected in record["grad_l2"].items():
        assert float(grads[key].norm()) == pytest.approx(expected, rel=1e-3, abs=1e-6), key
    total = math.sqrt(sum(float(grads[key].norm()) ** 2 for key in record["grad_l2"]))
    assert total == pytest.approx(record["grad_l2_total"], rel=1e-3)
    for key, rows in record.get("grad_rows_saved", {}).items():
        expected = io[f"{name}.expected.grad.{key}"]
        limit = 1e-3 * float(expected.abs().max()) + 1e-9
        torch.testing.assert_close(grads[key][:rows], expected, atol=limit, rtol=0)


@pytest.mark.parametrize("case", [pytest.param(case, id=golden.name(case, "adamw")) for case in CASES])
def test_a_few_steps_of_adamw(case: Path) -> None:
    model, record = load(case), meta(case)
    curve, table = record["adamw_curve_batch_b"], table_of(read_folder(case))
    decayed = {name for disk in record["trainer_decay_params"] for name in table.link(disk).parameters}
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, curve["weight_decay"]), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=curve["lr"], betas=curve["betas"], eps=curve["eps"])
    losses, norms = [], []
    for _ in range(curve["steps"]):
        loss = model(**inputs(case, "b")).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), curve["max_grad_norm"])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(curve["loss"], abs=CURVE)
    assert norms == pytest.approx(curve["grad_norm_before_clip"], rel=5e-3)


def generations() -> list[Any]:
    found = []
    for case in CASES:
        for name, record in (meta(case).get("generation") or {}).items():
            found.append(pytest.param(case, name, record, id=golden.name(case, name)))
    return found


@pytest.mark.parametrize(("case", "name", "record"), generations())
@torch.no_grad()
def test_greedy_generation(case: Path, name: str, record: dict[str, Any]) -> None:
    """The official code counts repetitions among the generated ids alone, since it prompts with embeddings."""
    model, io = load(case), load_file(case / "io.safetensors")
    prompt = name.split("_")[0]
    ids = io[f"{prompt}.input.input_ids"]
    penalty = LogitsProcessorList()
    if "repetition_penalty" in record:
        penalty.append(
            RepetitionPenaltyLogitsProcessor(record["repetition_penalty"], prompt_ignore_length=ids.shape[1])
        )
    output = model.generate(
        input_ids=ids,
        attention_mask=io[f"{prompt}.input.attention_mask"],
        pixel_values=io[f"{prompt}.input.pixel_values"],
        do_sample=False,
        max_new_tokens=max(map(len, record["new_tokens"])),
        eos_token_id=record["eos_token_id"],
        pad_token_id=record.get("pad_token_id", 0),
        logits_processor=penalty,
    )
    assert output[:, ids.shape[1] :].tolist() == record["new_tokens"]


def own_heads() -> list[Any]:
    return [pytest.param(case, id=golden.name(case, "with_lm_head")) for case in CASES if "with_lm_head" in meta(case)]


@pytest.mark.parametrize("case", own_heads())
def test_a_head_in_the_files_is_used_although_the_config_says_tied(case: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    io, record = load_file(case / "io.safetensors"), meta(case)["with_lm_head"]
    head = {key.removeprefix("with_lm_head."): io[key] for key in io if key.startswith("with_lm_head.")}
    for file in case.glob("*.json"):
        shutil.copy(file, tmp_path)
    save_file({**load_file(case / "model.safetensors"), **head}, tmp_path / "model.safetensors")
    model, given = load(tmp_path), inputs(case, "b")
    output = model(**given)
    seen = given["attention_mask"].bool()
    expected = io["b.expected_with_lm_head.logits"]
    torch.testing.assert_close(output.logits[seen], expected[seen], atol=LOGITS, rtol=0)
    assert float(output.loss.detach()) == pytest.approx(record["loss"], abs=LOSS)
    output.loss.backward()
    grads = official_grads(model, links(tmp_path))
    for key, norm in record["grad_l2"].items():
        assert float(grads[key].norm()) == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("case", [pytest.param(case, id=golden.name(case, "table")) for case in CASES])
def test_official_to_native_and_back_is_bit_exact(case: Path) -> None:
    """The table against the model itself: what it loaded is what the files hold, and all of it."""
    model, shards, table = load(case), Shards(case), table_of(read_folder(case))
    state = model.state_dict()
    for disk in shards.infos:
        link = table.link(disk)
        assert link is not None, disk
        assert torch.equal(link.op.join(tuple(state[name] for name in link.parameters)), shards.read(disk)), disk
    filled = {name for link in links(case) for name in link.parameters} | set(model.all_tied_weights_keys)
    assert filled == set(state)
    back = saved_links(model, [name for link in links(case) for name in link.parameters], table)
    assert set(back) == set(shards.infos)


@pytest.mark.parametrize("case", [pytest.param(case, id=golden.name(case, "saved")) for case in CASES])
def test_a_model_from_an_official_folder_is_saved_as_a_native_one(case: Path, tmp_path: Path) -> None:
    """The names are those that transformers itself writes for this architecture, and loads without our table."""
    model = load(case)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(not key.startswith(("vision_model.", "mlp1.")) for key in load_file(tmp_path / "model.safetensors"))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tower", [pytest.param(tower, id=golden.name(tower)) for tower in TOWERS])
@torch.no_grad()
def test_tiles_of_another_size(tower: Path) -> None:
    """Position embeddings are stretched while the model runs, for square and other tiles; the official training code
    stretches them once and for all (`resize_pos_embeddings`), by the same arithmetic."""
    from transformers import InternVLVisionModel
    from transformers.models.internvl import InternVLVisionConfig

    vision = json.loads((tower / "vision_config.json").read_text(encoding="utf-8"))
    size = int(vision["image_size"])
    decoder = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    decoder["num_attention_heads"] = 1
    official = {"vision_config": vision, "llm_config": decoder, "ps_version": "v2"}
    config: Any = native_config(official, context_id=0, tokens_per_tile=1, has_head=True, where=str(tower))
    assert isinstance(config.vision_config, InternVLVisionConfig)
    model = InternVLVisionModel(config.vision_config).eval()
    table = official_table(None)
    state = {}
    for name, tensor in load_file(tower / "vision_model.safetensors").items():
        link = table.link(f"vision_model.{name}")
        assert link is not None, name
        for parameter, part in zip(link.parameters, link.op.split(tensor), strict=True):
            state[parameter.removeprefix("model.vision_tower.")] = part
    model.load_state_dict(state)
    io = load_file(tower / "io.safetensors")
    pixels, wide = io["input.pixel_values"], io["input.pixel_values_rect"]
    assert pixels.shape[-1] != size
    for given, expected in (
        (pixels, "runtime_interp.last_hidden_state"),
        (wide, "runtime_interp.rect_last_hidden_state"),
        (pixels, "resized.last_hidden_state"),
    ):
        torch.testing.assert_close(
            model(given).last_hidden_state, io[f"expected.{expected}"], atol=FEATURES, rtol=0, msg=expected
        )
    embeddings = model.embeddings(pixels)
    torch.testing.assert_close(embeddings, io["expected.runtime_interp.embeddings"], atol=1e-6, rtol=0)
    height, width = pixels.shape[-2:]
    stretched = model.embeddings.interpolate_pos_encoding(embeddings, height, width)
    torch.testing.assert_close(stretched, io["expected.resized.position_embedding"], atol=1e-6, rtol=0)


def test_the_records_are_there() -> None:
    golden.skip_if_partial()
    assert CASES and TOWERS and generations() and own_heads()
    assert each_batch(fits=True) and each_batch(fits=False)
