"""Rows take the place of embeddings where the mask says so, in a copy of the embedding too, and reach the gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtune.nn.pseudo_text import MASK, ROWS, install_pseudo_text
from vlmtune.nn.side_inputs import hand_over


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    install_pseudo_text(model)
    return model


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
HERE = torch.tensor([[False, True, True, False], [False, False, False, True]])


def inputs() -> dict[str, Any]:
    rows = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return {"input_ids": IDS, ROWS: rows, MASK: HERE}


def test_logits_and_gradients_are_those_of_embeddings_that_are_given() -> None:
    model, given = tiny(), inputs()
    logits = model(**hand_over(model, given)).logits
    logits.square().sum().backward()
    found, weight = given[ROWS].grad, model.get_input_embeddings().weight
    grad, weight.grad = weight.grad, None
    plain = torch.nn.functional.embedding(IDS, weight)
    rows = given[ROWS].detach().requires_grad_()
    first = torch.stack([plain[0, 0], *rows[:2].float(), plain[0, 3]])
    by_hand = torch.stack([first, torch.stack([*plain[1, :3], rows[2].float()])])
    expected = model(inputs_embeds=by_hand).logits
    expected.square().sum().backward()
    assert torch.equal(logits, expected)
    torch.testing.assert_close(found, rows.grad)
    torch.testing.assert_close(grad, weight.grad)
    assert not grad[IDS[HERE]].any(), "the words under the rows learn nothing"


@torch.no_grad()
def test_a_copy_of_the_embedding_splices_for_itself() -> None:
    """PEFT trains a copy beside the old one."""
    model, given = tiny(), inputs()
    expected = model(**hand_over(model, given)).logits
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    hand_over(model, {})
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model(**hand_over(model, given)).logits, expected)


@torch.no_grad()
def test_tokens_that_generation_adds_pass_by() -> None:
    model, given = tiny(), inputs()
    rest = hand_over(model, {**given, ROWS: given[ROWS].detach()})
    made = model.generate(**rest, max_new_tokens=3, do_sample=False, eos_token_id=None)
    longer = {ROWS: given[ROWS].detach(), MASK: torch.cat([HERE, torch.zeros(2, 2, dtype=torch.bool)], 1)}
    again = model(**hand_over(model, {"input_ids": made[:, :6], **longer})).logits[:, -1].argmax(-1)
    assert torch.equal(made[:, 6], again)


def test_rows_and_positions_must_agree() -> None:
    model, given = tiny(), inputs()
    with pytest.raises(ValueError, match="2 rows of pseudo-text for 3 positions"):
        hand_over(model, {**given, ROWS: given[ROWS][:2]})
    with pytest.raises(ValueError, match="pseudo_text alone"):
        hand_over(model, {ROWS: given[ROWS]})
