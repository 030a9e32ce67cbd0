"""Which parameters train, by component, on the tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.config.schema import FullTuning, LoraTuning
from vlmtune.errors import WeightsError
from vlmtune.models.family import Components, OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning.adapters import prepare
from vlmtune.tuning.components import learning_rates, native_name, param_groups, report, table


@pytest.fixture
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(tiny_folder("internvl"))


@pytest.mark.parametrize(
    ("wrapped", "native"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_magnitude_vector.default.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.projector.modules_to_save.default.linear.bias", "model.projector.linear.bias"),
        ("base_model.model.model.projector.original_module.linear.bias", "model.projector.linear.bias"),
    ],
)
def test_native_name_sees_through_peft(wrapped: str, native: str) -> None:
    assert native_name(wrapped) == native


@pytest.mark.parametrize("trained", [("vision",), ("projector",), ("language",), ("vision", "language")])
def test_only_the_named_components_train(opened: OpenedFolder, trained: tuple[str, ...]) -> None:
    model = prepare(load_model(opened), opened, FullTuning(train=trained))  # type: ignore[arg-type]
    rows = {row.component: row for row in report(model, opened, learning_rates(1e-3, {}))}
    for name, row in rows.items():
        assert row.trained == (row.total if name in trained else 0)
        assert row.learning_rate == (1e-3 if name in trained else None)
    assert sum(row.total for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_layers_behind_the_feature_layer_stay_frozen(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("llava"))  # vision_feature_layer -2 of 3 layers
    model = prepare(load_model(opened), opened, FullTuning())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all("layers.2." in name or "post_layernorm" in name for name in frozen)


def test_parameter_without_a_component_is_an_error(opened: OpenedFolder) -> None:
    holed = dataclasses.replace(
        opened, components=Components(vision=("model.vision_tower",), projector=(), language=())
    )
    with pytest.raises(WeightsError, match="belongs to no component"):
        prepare(load_model(opened), holed, FullTuning())


def test_groups_have_rates_and_spare_vectors_from_decay(opened: OpenedFolder) -> None:
    model = prepare(load_model(opened), opened, FullTuning())
    rates = learning_rates(1e-3, {"vision": 1e-5})
    groups = param_groups(model, opened, rates, weight_decay=0.1)
    assert [(group["component"], group["lr"]) for group in groups[::2]] == [
        ("vision", 1e-5),
        ("projector", 1e-3),
        ("language", 1e-3),
    ]
    for group in groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.1) for parameter in group["params"])
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_table_counts_a_trained_copy_once(opened: OpenedFolder) -> None:
    plain = load_model(opened)
    total = sum(parameter.numel() for parameter in plain.parameters())
    model = prepare(plain, opened, LoraTuning(rank=2, train=("projector",)))
    rows = report(model, opened, learning_rates(1e-3, {}))
    adapter = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert sum(row.total for row in rows) == total + adapter
    assert "projector" in table(rows) and "frozen" in table(rows).splitlines()[1]
