"""What the first-step proof demands of tensors that only pictures reach, or only some rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmtune.errors import ProofError
from vlmtune.models.family import Components
from vlmtune.train.proof import FirstStepProof

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("vit", "proj", "text", "text_partial", "text_last"):
            self.register_parameter(name, nn.Parameter(torch.ones(2)))


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def proof(model: Model) -> FirstStepProof:
    opened: Any = SimpleNamespace(
        components=Components(
            vision=("vit",),
            projector=("proj",),
            language=("text", "text_partial", "text_last"),
            pictures_only="text_partial",
            undemanded="text_last",
        )
    )
    return FirstStepProof(model, opened)


def step(proof: FirstStepProof, model: Model, reached: tuple[str, ...], *, pictures: bool) -> None:
    proof.begin_step(pictures=pictures, adapters_moved=False)
    parts = [parameter.sum() * (name in reached) for name, parameter in model.named_parameters()]
    torch.stack(parts).sum().backward()
    proof.end_step(CPU, lambda figures: figures)


def test_text_first_demands_only_what_text_reaches(proof: FirstStepProof, model: Model) -> None:
    step(proof, model, ("text",), pictures=False)
    assert proof.pending == {"vit", "proj", "text_partial"}
    (language,) = [one for one in proof.open_questions() if "language" in one]
    assert language == "1 tensor of language could not be proven: it needs a row with a picture, and none came."
    step(proof, model, ("text", "text_partial", "vit", "proj"), pictures=True)
    assert not proof.pending and not proof.open_questions()


def test_a_picture_demands_what_only_pictures_reach(proof: FirstStepProof, model: Model) -> None:
    with pytest.raises(ProofError, match="a gradient of zero in 1 tensor that should train: text_partial;"):
        step(proof, model, ("text", "vit", "proj"), pictures=True)


def test_what_only_some_rows_reach_is_never_demanded(proof: FirstStepProof, model: Model) -> None:
    step(proof, model, ("text", "text_partial", "vit", "proj"), pictures=True)
    assert not proof.pending
