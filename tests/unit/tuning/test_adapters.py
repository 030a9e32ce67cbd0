"""LoRA's targets: components, the head, suffixes; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from torch import nn

from vlmtune.config.schema import FullTuning, LoraTuning
from vlmtune.data.collate import smallest_picture
from vlmtune.errors import ConfigError
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning.adapters import prepare, target_modules, target_regex


@pytest.mark.parametrize("kind", ["internvl", "llava", "llava-merged", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_component_means_every_linear_of_its_blocks(tiny_folder: Callable[[str], Path], kind: str) -> None:
    opened = open_folder(tiny_folder(kind))
    model = load_model(opened)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    language = set(target_modules(model, opened, ["language"]))
    assert language == {name for name in linear if re.search(r"(language_model|text_model)\.layers\.\d", name)}
    vision = set(target_modules(model, opened, ["vision"]))
    assert vision and not vision & language
    both = target_modules(model, opened, ["language", "vision", "q_proj"])
    assert len(both) == len(set(both)) and set(both) == language | vision


def test_head_and_suffix(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("llava"))
    model = load_model(opened)
    assert target_modules(model, opened, ["head"]) == ["lm_head"]
    assert all(name.endswith("mlp.up_proj") for name in target_modules(model, opened, ["mlp.up_proj"]))
    # A suffix is made of whole words: `proj` is not `q_proj`.
    with pytest.raises(ConfigError):
        target_modules(model, opened, ["proj"])


def test_no_hit_names_candidates(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("internvl"))
    with pytest.raises(ConfigError) as caught:
        prepare(load_model(opened), opened, LoraTuning(targets=("q_porj",)))
    text = str(caught.value)
    assert "'q_porj' hits no Linear layer" in text and "gate_proj" in text and "Did you mean q_proj?" in text


@pytest.mark.parametrize(
    "names",
    [
        ["lm_head"],
        [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkv"],
        ["model.layers.3.mlp.up", "model.layers.11.mlp.up", "model.layers.1.mlp.up"],
        [f"m.{i}.experts.{j}.w" for i in range(2) for j in range(3)],
        ["m.0.experts.1.w", "m.1.experts.0.w"],  # no full grid: 0.0 and 1.1 must not match
    ],
)
def test_regex_matches_the_names_and_no_other(names: list[str]) -> None:
    pattern = re.compile(target_regex(names))
    near = {re.sub(r"\d+", str(number), name) for name in names for number in range(13)} | {
        name + "x" for name in names
    }
    near |= {f"m.{i}.experts.{j}.w" for i in range(3) for j in range(4)} | {"x" + name for name in names}
    for name in near | set(names):
        assert bool(pattern.fullmatch(name)) == (name in names), name


def test_dropout_rank_and_scale_arrive(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("internvl"))
    config = prepare(load_model(opened), opened, LoraTuning(rank=3, dropout=0.25, method="rslora")).peft_config[
        "default"
    ]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora) == (
        3,
        6,
        0.25,
        True,
        False,
    )


def test_adapter_is_float32_on_a_bfloat16_base(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("internvl"))
    tuning = LoraTuning(rank=2, method="dora", train=("projector",))
    model = prepare(load_model(opened, dtype=torch.bfloat16), opened, tuning)
    dtypes = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_adapters_of_dead_layers_are_left_out(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("llava"))
    names = target_modules(load_model(opened), opened, ["vision"])
    assert names and not [name for name in names if "layers.2." in name]


def _figures(model: nn.Module) -> dict[str, set[tuple[int, float]]]:
    """(rank, scale) of every adapter, by component."""
    found: dict[str, set[tuple[int, float]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            component = "vision" if "vision_tower" in name else "head" if "lm_head" in name else "language"
            found.setdefault(component, set()).add((module.r["default"], module.scaling["default"]))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ranks": {"vision": 2}}, {"vision": (2, 2.0), "language": (8, 2.0)}),
        ({"ranks": {"vision": 2, "language": 4}, "alpha": 4}, {"vision": (2, 2.0), "language": (4, 1.0)}),
        # XTuner's configs of InternVL: rank 128 and alpha 256, and beside them rank 64 and alpha 16.
        ({"ranks": {"vision": 64}, "alphas": {"vision": 16}}, {"vision": (64, 0.25), "language": (8, 2.0)}),
        ({"alphas": {"language": 8}, "targets": ("q_proj", "vision")}, {"vision": (8, 2.0), "language": (8, 1.0)}),
    ],
)
def test_components_have_ranks_of_their_own(
    tiny_folder: Callable[[str], Path], options: dict[str, Any], expected: dict[str, tuple[int, float]]
) -> None:
    opened = open_folder(tiny_folder("internvl"))
    tuning = LoraTuning.model_validate({"rank": 8, "targets": ("language", "vision"), **options})
    model = prepare(load_model(opened), opened, tuning)
    assert _figures(model) == {component: {figures} for component, figures in expected.items()}


def test_head_has_the_rank_of_the_language_component(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("llava"))
    tuning = LoraTuning(targets=("head", "vision"), ranks={"language": 3})
    assert _figures(prepare(load_model(opened), opened, tuning)) == {"head": {(3, 2.0)}, "vision": {(16, 2.0)}}


def test_rank_of_a_component_without_adapter_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValidationError, match="ranks names vision, which carries no adapter"):
        LoraTuning(ranks={"vision": 4})
    opened = open_folder(tiny_folder("internvl"))
    with pytest.raises(ConfigError, match=r"tuning\.alphas: names projector, where no adapter goes"):
        prepare(load_model(opened), opened, LoraTuning(targets=("q_proj",), alphas={"projector": 4}))


def test_drop_path_is_refused_where_pictures_lie_end_to_end(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("llava-merged"))
    with pytest.raises(ConfigError, match=r"tuning\.drop_path: does not go with merged tokens"):
        prepare(load_model(opened), opened, FullTuning(drop_path=0.1))
    plain = open_folder(tiny_folder("llava"))
    prepare(load_model(plain), plain, FullTuning(drop_path=0.1))


@pytest.mark.parametrize("kind", ["xcomposer2", "llava"])
def test_a_tower_beside_an_adapter_is_float32_throughout(tiny_folder: Callable[[str], Path], kind: str) -> None:
    """Its frozen layers behind the feature layer run all the same, on the float32 of those before them."""
    opened = open_folder(tiny_folder(kind))
    tuning = LoraTuning(targets=("language",), train=("vision",))
    model = prepare(load_model(opened, dtype=torch.bfloat16), opened, tuning)
    copy = {name: one for name, one in model.named_parameters() if ".modules_to_save." in name}
    assert any(not one.requires_grad for one in copy.values())
    assert {one.dtype for one in copy.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model.get_base_model().get_image_features(**smallest_picture(opened))
