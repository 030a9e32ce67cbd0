"""The merging tower: pictures end to end against one at a time written out; hooks, copies, adapters, precisions."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import naive_merging
import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlmtune.models.llava.tower import GRIDS, MergingTower
from vlmtune.nn.side_inputs import hand_over

PATCH, IMAGE = 8, 9
# Height, width and r: sizes and ratios mixed, some not whole patches, twins apart from each other, r beyond the half.
GRIDS_MIXED = [(32, 32, 0), (24, 48, 2), (32, 32, 4), (24, 48, 2), (20, 65, 1), (16, 64, 99), (32, 32, 0), (8, 8, 3)]
KINDS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


def model_of(kind: str, strategy: str = "default", *, attention: str = "sdpa", layer: int = -2) -> Any:
    """A LLaVA model with random numbers, positions and norms among them, in float64."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": kind, "image_size": 32, "patch_size": PATCH, **vision},
        text_config={"model_type": "llama", "vocab_size": 12, "num_key_value_heads": 2, **text},
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tower = model.model.vision_tower
    assert MergingTower.wrap(tower, strategy=strategy) is tower is model.model.vision_tower
    return model


def drawn(grids: list[tuple[int, int, int]] = GRIDS_MIXED) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, height, width, dtype=torch.float64) for height, width, _ in grids]


def inputs(pictures: list[torch.Tensor], grids: list[tuple[int, int, int]] = GRIDS_MIXED) -> dict[str, torch.Tensor]:
    patches = torch.cat([naive_merging.patches_of(picture, PATCH) for picture in pictures])
    return {"pixel_values": patches, GRIDS: torch.tensor(grids)}


def one_by_one(model: Any, pictures: list[torch.Tensor], *, first: int = 1, state: int = -2) -> list[torch.Tensor]:
    """The features of each picture before the projector."""
    tower = model.model.vision_tower
    return [
        naive_merging.states(tower, picture, r)[state][0][first:]
        for picture, (_, _, r) in zip(pictures, GRIDS_MIXED, strict=True)
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    return found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("way", ["sdpa", "eager", "checkpointed", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end_equals_one_picture_at_a_time(kind: str, way: str) -> None:
    """Loss and every gradient of the whole model, that of the position table among them."""
    model, pictures = model_of(kind, attention="eager" if way == "eager" else "sdpa").train(), drawn()
    if way in ("checkpointed", "reentrant"):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": way == "reentrant"})
    features = one_by_one(model, pictures)
    ids = [1]
    for feature in features:
        ids += [IMAGE] * len(feature) + [2, 3]
    ids_row = torch.tensor([ids])
    labels = torch.where(ids_row == IMAGE, -100, ids_row)

    embedded = model.get_input_embeddings()(ids_row)
    projected = model.model.multi_modal_projector(torch.cat(features))
    places = torch.nonzero(ids_row[0] == IMAGE)[:, 0]
    embedded = embedded.index_put((torch.zeros_like(places), places), projected)
    expected = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
    expected.backward()
    by_hand = gradients(model)

    given = hand_over(model, {"input_ids": ids_row, **inputs(pictures)})
    found = model(**given, labels=labels, use_cache=False).loss
    found.backward()
    # transformers' eager attention takes its softmax in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5 if way == "eager" else 1e-11, atol=0)
    ours = gradients(model)
    assert "model.vision_tower.embeddings.position_embedding.weight" in ours
    if way != "eager":
        close(ours, by_hand)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_strategy_keeps_the_first_token_and_all_states_can_be_had(kind: str) -> None:
    model, pictures = model_of(kind, "full").eval(), drawn()
    tower = model.model.vision_tower
    found = tower(**hand_over(model, inputs(pictures)), output_hidden_states=True).hidden_states
    assert len(found) == 5
    for number, hidden in enumerate(found):
        expected = torch.cat(one_by_one(model, pictures, first=0, state=number))
        torch.testing.assert_close(hidden[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [-1, -2, 0, 2, -5])
@torch.no_grad()
def test_only_the_layers_that_are_needed_run(layer: int) -> None:
    model, pictures = model_of("clip_vision_model", layer=layer).eval(), drawn()
    tower, ran = model.model.vision_tower, Counter[int]()
    for number, encoder_layer in enumerate(tower.encoder.layers):
        encoder_layer.register_forward_hook(lambda *_, number=number: ran.update([number]))
    given = hand_over(model, inputs(pictures))
    found = model.model.get_image_features(**given).pooler_output
    assert ran == Counter(range(layer % 5))
    expected = model.model.multi_modal_projector(torch.cat(one_by_one(model, pictures, state=layer)))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_called_once_whatever_the_pictures(kind: str) -> None:
    """On several processes, modules that are called unequally often make them wait for each other for ever."""
    model = model_of(kind)
    tower, calls = model.model.vision_tower, Counter[str]()
    for name, module in tower.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    seen = []
    for chosen in (GRIDS_MIXED, GRIDS_MIXED[:1], GRIDS_MIXED[3:5]):
        calls.clear()
        tower(**hand_over(model, inputs(drawn(chosen), chosen)), output_hidden_states=-2)
        seen.append(dict(calls))
    assert seen[0] == seen[1] == seen[2] and set(seen[0].values()) == {1}
    assert {name for name in seen[0] if name.endswith("proj")} == {
        f"encoder.layers.{layer}.self_attn.{which}_proj" for layer in range(3) for which in ("q", "k", "v", "out")
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_plain_tower_without_grids_and_where_nothing_is_merged(kind: str) -> None:
    model = model_of(kind, "full").eval()
    tower = model.model.vision_tower
    reference = KINDS[kind](tower.config).double().eval()
    assert list(reference.state_dict()) == list(tower.state_dict())
    reference.load_state_dict(tower.state_dict())
    pictures = drawn([(32, 32, 0)] * 3)
    expected = reference(torch.stack(pictures), output_hidden_states=True)
    given = hand_over(model, inputs(pictures, [(32, 32, 0)] * 3))
    merged = tower(**given, output_hidden_states=True).hidden_states
    hand_over(model, {})
    again = tower(torch.stack(pictures), output_hidden_states=True)
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state)
    for found, whole, hidden in zip(merged, again.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(whole, hidden)
        torch.testing.assert_close(found[0], hidden.flatten(0, 1), rtol=1e-10, atol=1e-10)


def test_a_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = model_of("clip_vision_model")
    model.save_pretrained(tmp_path)
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not isinstance(again.model.vision_tower, MergingTower)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_layers_are_found_under_the_names_by_which_they_are_sharded() -> None:
    model = model_of("clip_vision_model")
    for name in ("CLIPVisionModel", "CLIPVisionEmbeddings", "CLIPEncoderLayer"):
        found = get_module_class_from_name(model, name)
        assert found is not None and any(type(module) is found for module in model.modules())
    layers = model.model.vision_tower.encoder.layers
    assert len({type(layer) for layer in layers}) == 1, "all layers of one class"
    MergingTower.wrap(model.model.vision_tower, strategy="default")
    assert {type(layer) for layer in layers} == {type(layers[0])}, "wrapping again changes nothing"


@torch.no_grad()
def test_a_copy_is_a_tower_of_its_own() -> None:
    model, pictures = model_of("siglip_vision_model").eval(), drawn()
    tower = model.model.vision_tower
    twin = copy.deepcopy(tower)
    given = inputs(pictures)
    hand_over(torch.nn.ModuleList([tower, twin]), given)
    before = tower(given["pixel_values"], output_hidden_states=-2).hidden_states[-2]
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(before, tower(given["pixel_values"], output_hidden_states=-2).hidden_states[-2])
    assert not twin(given["pixel_values"], output_hidden_states=-2).hidden_states[-2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_the_tower_work_and_equal_merged_weights(kind: str) -> None:
    pictures = drawn()
    model = model_of(kind).eval()
    plain = torch.cat(model.model.get_image_features(**hand_over(model, inputs(pictures))).pooler_output)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "patch_embedding", "position_embedding"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).double().eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = torch.cat(model.model.get_image_features(**hand_over(wrapped, inputs(pictures))).pooler_output)
    assert not torch.allclose(found, plain)
    found.sum().backward()
    for name, parameter in wrapped.named_parameters():
        if "vision_tower" in name and "lora_" in name and ".layers.3." not in name and ".head." not in name:
            assert parameter.grad is not None and parameter.grad.any(), name
    merged = wrapped.merge_and_unload()
    again = torch.cat(merged.model.get_image_features(**hand_over(merged, inputs(pictures))).pooler_output)
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-9)


def test_a_tower_that_is_trained_in_full_beside_an_adapter() -> None:
    """PEFT trains a copy of the tower; both are in the model."""
    model, pictures = model_of("clip_vision_model"), drawn()
    plain = torch.cat(model.model.get_image_features(**hand_over(model, inputs(pictures))).pooler_output)
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["vision_tower"])
    wrapped = get_peft_model(model, config).double()
    found = torch.cat(model.model.get_image_features(**hand_over(wrapped, inputs(pictures))).pooler_output)
    assert torch.equal(found, plain)
    found.sum().backward()
    grads = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("modules_to_save.default.embeddings.position_embedding" in name for name in grads)
    assert not any("original_module" in name for name in grads)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, autocast: bool) -> None:
    """Same counts, whatever pairs are chosen; finite gradients."""
    model, pictures = model_of(kind).train(), drawn()
    model = model.float() if autocast else model.bfloat16()
    counts = [len(feature) for feature in one_by_one(model_of(kind), pictures)]
    given = inputs(pictures)
    given["pixel_values"] = given["pixel_values"].to(torch.float32 if autocast else torch.bfloat16)
    model.activation_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (found,) = model.model.get_image_features(**hand_over(model, given)).pooler_output
    assert found.dtype == torch.bfloat16 and len(found) == sum(counts)
    found.float().pow(2).mean().backward()
    table = model.model.vision_tower.embeddings.position_embedding.weight
    assert table.grad is not None and table.grad.isfinite().all() and table.grad.any()


def test_what_it_refuses() -> None:
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="not in a ViTModel"):
        MergingTower.wrap(vit, strategy="default")
    model = model_of("clip_vision_model")
    with pytest.raises(ValueError, match="'cls'"):
        MergingTower.wrap(model.model.vision_tower, strategy="cls")
    given = inputs(drawn())
    given["pixel_values"] = given["pixel_values"][:-1]
    with pytest.raises(ValueError, match=r"\d+ patches, but the pictures have \d+"):
        model.model.get_image_features(**hand_over(model, given))
