"""LoRA's targets: components, the head, suffixes; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmtune.config.schema import LoraTuning
from vlmtune.errors import ConfigError
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning.adapters import prepare, target_modules, target_regex


@pytest.mark.parametrize("kind", ["internvl", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
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
