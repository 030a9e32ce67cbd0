"""Partial LoRA inside whole models: under activation checkpointing, and in batches of pictures and text.

A mask that a layer looked up somewhere else than in its arguments would be another one by the time checkpointing runs
the layer again. The reference is its definition, written out over all positions of one row at a time, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import varied_samples
from torch.nn.functional import cross_entropy
from xcomposer2_models import KINDS

from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.sample import Batch, Encoded
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.partial_lora import PartialLoRA

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(tiny_folder(request.param))


@pytest.fixture(scope="module")
def model(opened: OpenedFolder) -> Any:
    found = load_model(opened, dtype=torch.float64).train()
    assert all(one.B.any() and one.A.any() for one in found.modules() if isinstance(one, PartialLoRA))
    return found


@pytest.fixture
def rows(opened: OpenedFolder, tmp_path: Path) -> list[Encoded]:
    """With one picture, with two, and without."""
    samples = varied_samples(tmp_path)
    return [encode(samples[i], opened) for i in (0, 2, 4)]


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    inputs = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in batch.inputs.items()}
    logits = model(**inputs).logits
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.targets, reduction="sum")


def gradients(model: Any, batches: list[list[list[Encoded]]], opened: OpenedFolder) -> tuple[float, Gradients]:
    """All batches go forward before the first goes backward."""
    model.zero_grad()
    torch.manual_seed(3)
    losses = [loss_of(model, collate(rows, opened, stand_in=False)) for rows in batches]
    torch.stack(losses).sum().backward()
    return sum(one.item() for one in losses), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(found: tuple[float, Gradients], wanted: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-7)
    for name, gradient in wanted[1].items():
        # transformers' norms compute in float32 whatever they are given
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    partial = [name for name in wanted[1] if "_partial." in name]
    assert partial and any(wanted[1][name].any() for name in partial)


def checkpointed(model: Any, *, reentrant: bool) -> Any:
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        again.enable_input_require_grads()
    return again


def written_out(module: PartialLoRA) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, y: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
        update = torch.einsum("or,ri,bli->blo", module.B, module.A, x)
        return y + module.scale * update * image_mask[..., None]

    return forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_of_the_definition(
    model: Any, opened: OpenedFolder, rows: list[Encoded], reentrant: bool
) -> None:
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, PartialLoRA):
            module.forward = written_out(module)  # type: ignore[method-assign]
    wanted = gradients(reference, [[[row]] for row in rows], opened)
    mixed = [[rows[2]], [rows[0]], [rows[1]]]  # the text row first, and padded
    assert_same(gradients(model, [mixed], opened), wanted)
    again = checkpointed(model, reentrant=reentrant)
    assert_same(gradients(again, [mixed], opened), wanted)
    assert_same(gradients(again, [[list(rows)]], opened), wanted)  # packed
    assert_same(gradients(again, [[[row]] for row in rows], opened), wanted)


def test_dropout_draws_the_same_again(model: Any, opened: OpenedFolder, rows: list[Encoded]) -> None:
    dropped = copy.deepcopy(model)
    for module in dropped.modules():
        if isinstance(module, PartialLoRA):
            module.dropout = 0.5
    batches = [[[rows[2]], [rows[0]]], [[rows[1]]]]
    wanted = gradients(dropped, batches, opened)
    assert_same(gradients(checkpointed(dropped, reentrant=False), batches, opened), wanted)
    assert wanted[0] != pytest.approx(gradients(model, batches, opened)[0], rel=1e-6)
    assert gradients(dropped.eval(), batches, opened)[0] == pytest.approx(
        gradients(model, batches, opened)[0], rel=1e-12
    )


def test_text_alone_gives_partial_lora_zeros(model: Any, opened: OpenedFolder, rows: list[Encoded]) -> None:
    """As the reference does: a gradient of zeros, and none that is missing on one process of several."""
    _, found = gradients(model, [[[rows[2]]]], opened)
    partial = [name for name, _ in model.named_parameters() if "_partial." in name]
    assert partial and all(name in found and not found[name].any() for name in partial)
