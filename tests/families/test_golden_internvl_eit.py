"""Pseudo-text embeddings against numbers recorded from the official e-IT code: logits, loss, gradients.

The record says by an id where the rows go; here positions say it, whatever ids stand there. Tolerances are those of the
records' README.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from conversations import opened, with_counts
from furnished import furnish, official_grads
from rows import write_embedding, write_picture
from safetensors.torch import load_file
from transformers import LlamaConfig

from vlmtune.data.encode import RESERVED, encode
from vlmtune.data.sample import Encoded, Image, Message, Part, PseudoText, Sample, Text
from vlmtune.infer.session import load
from vlmtune.models.internvl.config import decoder_heads
from vlmtune.models.internvl.weights import official_table
from vlmtune.models.load import read_folder
from vlmtune.nn.attention import PACKED
from vlmtune.nn.pseudo_text import MASK, ROWS
from vlmtune.nn.side_inputs import hand_over
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

EIT = golden.root() / "internvl" / "eit"
RECORD: dict[str, Any] = (
    json.loads((EIT / "forward.json").read_text(encoding="utf-8")) if (EIT / "forward.json").is_file() else {}
)
IO = load_file(EIT / "forward.safetensors") if RECORD else {}
CASES = sorted({key.split(".")[0] for key in IO if key.endswith("input.input_ids")})
EACH = pytest.mark.parametrize("name", [pytest.param(name, id=golden.name(EIT, "forward", name)) for name in CASES])
LOGITS, LOSS = 2e-4, 2e-5


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load(furnish(base(), tmp_path / "base"), device="cpu").model


def base() -> Path:
    found = golden.root() / "internvl" / str(RECORD["base"])
    if not found.is_dir():
        pytest.skip(f"these records do not hold the base of e-IT ({found})")
    return found


def given(name: str, *, rows: torch.Tensor | None = None) -> dict[str, Any]:
    """A recorded batch as the collator gives it; a picture of zeros only is the official code's "no picture"."""
    ids = IO[f"{name}.input.input_ids"]
    pixels = IO[f"{name}.input.pixel_values_flat"]
    here = ids == RECORD["embeds_token_id"]
    return {
        "input_ids": ids.masked_fill(here, 0),  # ids say nothing at these positions
        "attention_mask": IO[f"{name}.input.attention_mask"].long(),
        "pixel_values": pixels[pixels.flatten(1).any(1)],
        "labels": IO[f"{name}.input.labels"],
        "use_cache": False,
        ROWS: IO[f"{name}.input.embedding_flat"] if rows is None else rows,
        MASK: here,
    }


def compute(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**hand_over(model, inputs))


@EACH
def test_logits_loss_and_gradients(name: str, model: Any) -> None:
    facts, rows = RECORD[name], IO[f"{name}.input.embedding_flat"].clone().requires_grad_()
    inputs = given(name, rows=rows)
    output = compute(model, inputs)
    output.loss.backward()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[seen], IO[f"{name}.expected.logits"][seen], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.loss, IO[f"{name}.expected.loss"], atol=LOSS, rtol=0)
    grads = gradients(model)
    grads["embedding_flat"] = rows.grad
    for key, expected in facts["grad_l2"].items():
        assert float(grads[key].norm()) == pytest.approx(expected, rel=1e-3, abs=1e-6), key
    compared = [key for key in IO if key.startswith(f"{name}.expected.grad.")]
    assert compared
    for key in compared:
        expected = IO[key]
        found = grads[key.removeprefix(f"{name}.expected.grad.")][: len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()) + 1e-9, rtol=0)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Under the official names, fused as the official tensors are."""
    table = official_table(decoder_heads(read_folder(base()).config))
    return official_grads(model, [link for disk in Shards(base()).infos if (link := table.link(disk))])


@EACH
def test_activation_checkpointing_changes_nothing(name: str, model: Any) -> None:
    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = compute(model, given(name)).loss
        loss.backward()
        return float(loss.detach()), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain, grads = step()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, found = step()
    assert again == plain and found.keys() == grads.keys()
    assert all(torch.equal(found[key], grads[key]) for key in grads)


@EACH
@torch.no_grad()
def test_a_pack_is_its_samples(name: str, model: Any) -> None:
    """The batch's samples laid end to end in one row, as training packs them."""
    assert model.config.text_config._attn_implementation == PACKED
    inputs = given(name)
    seen = inputs["attention_mask"].bool()
    lengths = seen.sum(1).tolist()
    packed = {
        "input_ids": inputs["input_ids"][seen][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pack_lengths": tuple(lengths),
        "pixel_values": inputs["pixel_values"],
        "use_cache": False,
        ROWS: inputs[ROWS],
        MASK: inputs[MASK][seen][None],
    }
    found = compute(model, packed).logits[0]
    torch.testing.assert_close(found, IO[f"{name}.expected.logits"][seen], atol=LOGITS, rtol=0)


@torch.no_grad()
@EACH
def test_the_rows_of_one_batch_are_gone_in_the_next(name: str, model: Any) -> None:
    """The same ids without rows are the words that stand there."""
    inputs = given(name)
    plain = {key: value for key, value in inputs.items() if key not in (ROWS, MASK)}
    before = compute(model, plain).logits
    with_rows = compute(model, inputs).logits
    assert not torch.equal(before, with_rows)
    assert torch.equal(compute(model, plain).logits, before)


@pytest.mark.parametrize("style", ["official", "xtuner"])
@pytest.mark.parametrize("around", [("请读 ", " 这些字。"), ("Read ", "and tell"), ("", "  two"), ("x\n", "\n\ny")])
def test_ids_are_those_of_callireaders_text(style: str, around: tuple[str, str], tmp_path: Path) -> None:
    """With InternLM2's own tokenizer: its text with the reserved token repeated, read as text, gives the same ids."""
    folder = with_counts(opened("internlm2", "internlm2-chat", tmp_path / "folder", style=style), (3,))
    folder = replace(folder, config=LlamaConfig(hidden_size=64))
    picture = Image(write_picture(tmp_path, (40, 30)))
    file = PseudoText(write_embedding(tmp_path / "a.pt", 4, 64))

    def ids(*question: Part) -> Encoded:
        answer = Message("assistant", (Text("春"),))
        return encode(Sample(messages=(Message("user", question), answer), origin="o"), folder)

    before, after = around
    found = ids(picture, Text("\n" + before), file, Text(after))
    text = ids(picture, Text(f"\n{before}{RESERVED * 4}{after}"))
    assert found.input_ids.tolist() == text.input_ids.tolist()
    assert set(found.input_ids[found.at_pseudo_text]) == set(folder.tokenizer.encode(RESERVED)[-1:])


def test_something_ran() -> None:
    print(f"{len(CASES)} batches of e-IT")
    if not RECORD:
        golden.skip_if_partial()
    assert CASES
