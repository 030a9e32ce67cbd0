"""The model class: saved, opened by AutoModelForCausalLM, generating with cache and beams, loud on mismatches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import vlmtune.models  # noqa: F401 # registers the class
from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.models.xcomposer2.model import Projector, XComposer2ForConditionalGeneration
from vlmtune.nn.partial_lora import PartialLoRA

SQUARE, TILED = False, True
_TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 60, "pad_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def model(high_resolution: bool) -> Any:
    torch.manual_seed(0)
    config = XComposer2Config(
        text_config=dict(_TEXT), vision_config=dict(_VISION), high_resolution=high_resolution,
        partial_rank=3, partial_wqkv_rank=2, partial_wqkv_scale=2.0,
    )  # fmt: skip
    made = XComposer2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "_partial.B" in name or "separator" in name:  # zero at first
                parameter.normal_(std=0.3)
            elif parameter.dim() > 1:
                parameter.mul_(4)
    return made


def inputs(high_resolution: bool) -> dict[str, torch.Tensor]:
    """Two rows, padded on the left: two pictures in the first, one in the second."""
    generator = torch.Generator().manual_seed(1)
    sizes = [13, 19, 13] if high_resolution else [16, 16, 16]  # 2 · 2² + 1 + 2 · 2, for 1 × 1 tiles; 2 × 1
    rows = [[4, -sizes[0], 5, -sizes[1], 6, 7], [8, -sizes[2], 9, 10]]
    laid = [[(1, True)] * -part if part < 0 else [(part, False)] for row in rows for part in row]
    first = [item for group in laid[: len(rows[0])] for item in group]
    second = [item for group in laid[len(rows[0]) :] for item in group]
    width = max(len(first), len(second))
    ids, types, mask = (torch.zeros(2, width, dtype=torch.long) for _ in range(3))
    for number, row in enumerate((first, second)):
        start = width - len(row)
        ids[number, start:] = torch.tensor([token for token, _ in row])
        types[number, start:] = torch.tensor([int(picture) for _, picture in row])
        mask[number, start:] = 1
    tiles = [2, 3, 2] if high_resolution else [1, 1, 1]
    pixels = torch.randn(sum(tiles), 3, 16, 16, generator=generator)
    found = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": mask, "pixel_values": pixels}
    return found | ({"tile_grids": torch.tensor([(1, 1), (2, 1), (1, 1)])} if high_resolution else {})


@pytest.mark.parametrize("kind", [SQUARE, TILED])
def test_a_saved_model_is_opened_by_the_auto_class(kind: bool, tmp_path: Path) -> None:
    made = model(kind)
    made.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is XComposer2ForConditionalGeneration
    assert not any(info[kind_of_fault] for kind_of_fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs(kind)).logits, made(**inputs(kind)).logits)


@pytest.mark.parametrize("kind", [SQUARE, TILED])
@pytest.mark.parametrize("cached", [True, False])
def test_generation_equals_the_argmax_of_whole_forwards(kind: bool, cached: bool) -> None:
    made, given = model(kind), inputs(kind)
    found = made.generate(**given, max_new_tokens=4, do_sample=False, use_cache=cached, eos_token_id=None)
    ids = given["input_ids"]
    for _ in range(4):
        longer = {
            **given,
            "input_ids": ids,
            "attention_mask": pad(given["attention_mask"], ids, 1),
            "mm_token_type_ids": pad(given["mm_token_type_ids"], ids, 0),
        }
        positions = (longer["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = made(**longer, position_ids=positions).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)


def pad(tensor: torch.Tensor, like: torch.Tensor, value: int) -> torch.Tensor:
    more = torch.full((len(tensor), like.shape[1] - tensor.shape[1]), value)
    return torch.cat([tensor, more], dim=1)


@pytest.mark.parametrize("kind", [SQUARE, TILED])
def test_beams_keep_the_pictures_of_their_row(kind: bool) -> None:
    made, given = model(kind), inputs(kind)
    rest = {name: value for name, value in given.items() if name != "input_ids"}
    ids, more = made._expand_inputs_for_generation(3, input_ids=given["input_ids"], **rest)
    with torch.no_grad():
        wanted = made(**given).logits.repeat_interleave(3, dim=0)
        assert torch.allclose(made(input_ids=ids, **more).logits, wanted, atol=1e-5)
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3}
    assert made.generate(**given, **settings).shape == (2, given["input_ids"].shape[1] + 3)


def test_pictures_matter_and_partial_lora_with_them() -> None:
    made, given = model(SQUARE), inputs(SQUARE)
    with torch.no_grad():
        before = made(**given).logits[:, -1]
        others = made(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits[:, -1]
        for name, parameter in made.named_parameters():
            if "_partial.B" in name:
                parameter.zero_()
        without = made(**given).logits[:, -1]
    assert (before - others).abs().max() > 1e-3
    assert (before - without).abs().max() > 1e-3


def test_mismatches_are_said() -> None:
    made, given = model(SQUARE), inputs(SQUARE)
    with pytest.raises(ValueError, match="48 visual tokens, but mm_token_type_ids marks 0"):
        made(**{name: value for name, value in given.items() if name != "mm_token_type_ids"})
    with pytest.raises(ValueError, match="32 visual tokens, but mm_token_type_ids marks 48"):
        made(**{**given, "pixel_values": given["pixel_values"][:2]})
    with pytest.raises(ValueError, match="high-resolution"):
        made(**given, tile_grids=torch.tensor([(1, 1)] * 3))
    with pytest.raises(ValueError, match="7 tiles, but tile_grids asks for 6"):
        tiled = inputs(TILED)
        model(TILED)(**{**tiled, "tile_grids": torch.tensor([(1, 1)] * 3)})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        made()


def test_separators_stand_where_the_publisher_puts_them() -> None:
    """View rows, each with a row separator; the global one; rows over all tiles, each with a row separator."""
    projector = Projector(4, 4, separators=True)
    assert projector.global_separator is not None and projector.row_separator is not None
    with torch.no_grad():
        projector.global_separator.fill_(100)
        projector.row_separator.fill_(200)
    seen: list[torch.Tensor] = []
    projector[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    tiles = torch.arange(3.0)[:, None, None].expand(3, 4, 1)  # 2 × 2 patches of one number each; merged: one token
    projector(tiles, torch.tensor([(1, 2)]))
    assert seen[0][:, 0].tolist() == [0, 200, 100, 1, 2, 200]


def test_partial_lora_adds_its_update_at_pictures_only() -> None:
    torch.manual_seed(0)
    layer = PartialLoRA(5, 7, rank=2, scale=3.0, dropout=0.0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 4, 5, dtype=torch.double), torch.randn(2, 4, 7, dtype=torch.double)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    wanted = y + mask[..., None] * linear(linear(x, layer.A), layer.B) * 3.0
    assert torch.allclose(layer(x, y, mask), wanted, atol=1e-12)
    assert layer(x, y, None) is y


def test_a_batch_without_pictures_gives_partial_lora_a_gradient_of_zero() -> None:
    """None would leave its processes waiting for each other; zero is what the reference gives as well."""
    made, given = model(SQUARE), inputs(SQUARE)
    types = torch.zeros_like(given["mm_token_type_ids"])
    made.train()(input_ids=given["input_ids"], mm_token_type_ids=types, labels=given["input_ids"]).loss.backward()
    partial = [parameter for name, parameter in made.named_parameters() if "_partial." in name]
    assert len(partial) == 20
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in partial)


def test_dropout_of_partial_lora_is_for_training_only() -> None:
    layer = PartialLoRA(50, 50, rank=50, scale=1.0, dropout=0.5)
    with torch.no_grad():
        layer.A.copy_(torch.eye(50))
        layer.B.copy_(torch.eye(50))
    x, mask = torch.ones(1, 1, 50), torch.ones(1, 1, dtype=torch.bool)
    torch.manual_seed(0)
    trained = layer.train()(x, torch.zeros_like(x), mask)
    assert set(trained.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(layer.eval()(x, torch.zeros_like(x), mask), x)
