"""Which layers become 4-bit, on every tiny model; and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import KINDS
from wide import save_wide

from vlmtune.config.schema import LoraTuning
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import Components, OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning import quantised
from vlmtune.tuning.adapters import prepare
from vlmtune.tuning.components import learning_rates, report

RATES = learning_rates(1e-3, {})


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_wide(kind, tmp_path_factory.mktemp("wide") / kind)
        return made[kind]

    return folder


@pytest.fixture
def opened(wide_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(wide_folder("internvl"))


def qlora(**options: Any) -> LoraTuning:
    return LoraTuning(method="qlora", rank=2, **options)


def load(opened: OpenedFolder, tuning: LoraTuning, dtype: torch.dtype = torch.float32) -> Any:
    return quantised.load_quantised(opened, tuning, dtype=dtype, device=torch.device("cpu"))


def linear_under(model: torch.nn.Module, *prefixes: str) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(tuple(f"{prefix}." for prefix in prefixes))
    }


# Written out from the architectures, not from their tables of components.
BLOCKS = {
    "internvl": ("model.language_model.layers", "model.vision_tower.encoder.layer"),
    "llava": ("model.language_model.layers", "model.vision_tower.encoder.layers"),
    "llava-merged": ("model.language_model.layers", "model.vision_tower.encoder.layers"),
    "qwen2_5_vl": ("model.language_model.layers", "model.visual.blocks"),
    "qwen3_vl": ("model.language_model.layers", "model.visual.blocks"),
    "smolvlm": ("model.text_model.layers", "model.vision_model.encoder.layers"),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_blocks_of_the_language_model_and_nothing_else(kind: str, wide_folder: Callable[[str], Path]) -> None:
    opened = open_folder(wide_folder(kind))
    model = load(opened, qlora(train=("projector",)))
    expected = linear_under(model, BLOCKS[kind][0])
    assert expected and quantised.four_bit_names(model) == expected
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_tower_when_it_is_targeted(kind: str, wide_folder: Callable[[str], Path]) -> None:
    opened = open_folder(wide_folder(kind))
    model = load(opened, qlora(targets=("language", "vision", "head")))
    assert quantised.four_bit_names(model) == linear_under(model, *BLOCKS[kind])


def test_a_suffix_means_the_components_that_it_hits_but_those_trained_in_full(opened: OpenedFolder) -> None:
    plain = load_model(opened)
    language, vision = BLOCKS["internvl"]
    both = quantised.wanted_names(plain, opened, qlora(targets=("q_proj",)))
    assert both == linear_under(plain, language, vision)
    one = quantised.wanted_names(plain, opened, qlora(targets=("q_proj",), train=("vision",)))
    assert one == linear_under(plain, language)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_twice_and_the_rest_in_the_precision_of_the_run(opened: OpenedFolder, dtype: torch.dtype) -> None:
    model = load(opened, qlora(), dtype)
    layer = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)
    kept = {parameter.dtype for name, parameter in model.named_parameters() if ".layers." not in name}
    assert kept == {dtype}


def test_weights_are_those_of_the_folder_rounded(opened: OpenedFolder) -> None:
    from bitsandbytes.functional import dequantize_4bit

    name = "model.language_model.layers.1.mlp.down_proj"
    exact = load_model(opened).get_submodule(name).weight
    packed = load(opened, qlora()).get_submodule(name).weight
    rounded = dequantize_4bit(packed.data, packed.quant_state)
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.2  # half the widest distance of two levels of NF4 is 0.15 of a block's largest number


def test_two_loads_are_equal_bit_by_bit(opened: OpenedFolder) -> None:
    one, two = load(opened, qlora()).state_dict(), load(opened, qlora()).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_report_counts_numbers_and_not_bytes(opened: OpenedFolder) -> None:
    tuning = qlora(train=("projector",))
    ours = report(prepare(load(opened, tuning), opened, tuning), opened, RATES)
    plain = report(prepare(load_model(opened), opened, tuning), opened, RATES)
    assert ours == plain


def test_a_layer_that_should_not_be_4bit_is_an_error(opened: OpenedFolder) -> None:
    model = load(opened, qlora())
    wanted = quantised.four_bit_names(model)
    missing = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(WeightsError, match=rf"1 layers were loaded in 4 bits that should not be: {missing}"):
        quantised.check(model, wanted - {missing}, where="here")
    with pytest.raises(WeightsError, match=f"no layer was loaded in 4 bits; expected {len(wanted)} of them"):
        quantised.check(load_model(opened), wanted, where="here")
    quantised.check(model, wanted | {"model.of_another_class"}, where="here")


def test_names_that_transformers_would_read_in_another_way_are_caught(
    opened: OpenedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module names without their beginning, as older versions took them, skip nothing but the head."""
    right = quantised.settings

    def old(model: Any, wanted: Any, dtype: torch.dtype) -> Any:
        settings = right(model, wanted, dtype)
        settings.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
        return settings

    monkeypatch.setattr(quantised, "settings", old)
    with pytest.raises(WeightsError, match=r"should not be: model\.multi_modal_projector"):
        load(opened, qlora())


def test_layers_that_blocks_do_not_fit_stay_as_they_are(
    opened: OpenedFolder, tiny_folder: Callable[[str], Path]
) -> None:
    narrow = open_folder(tiny_folder("internvl"))  # widths of 48 and 96, and 32 and 64 in the tower
    with pytest.raises(ConfigError, match="expected layers whose number of inputs is a multiple of 64"):
        load(narrow, qlora())
    model = load(narrow, qlora(targets=("vision",)))
    assert quantised.four_bit_names(model) == {f"model.vision_tower.encoder.layer.{i}.mlp.fc2" for i in (0, 1)}


def test_blocks_without_a_linear_layer_are_an_error(opened: OpenedFolder) -> None:
    blocks: Mapping[Any, tuple[str, ...]] = {"language": ("model.language_model.norm",)}
    components = dataclasses.replace(opened.components, blocks=blocks)
    assert isinstance(components, Components)
    with pytest.raises(ConfigError, match="hold no Linear layer"):
        load(dataclasses.replace(opened, components=components), qlora(targets=("q_proj",), train=("vision",)))


def test_without_bitsandbytes_the_message_says_what_to_install(
    opened: OpenedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        load(opened, qlora())
    assert str(caught.value) == 'tuning.method: qlora needs bitsandbytes. Run: pip install "vlmtune[qlora]".'
    assert caught.value.exit_code == 2
    quantised.require(LoraTuning())  # nobody else needs it


def test_a_bitsandbytes_that_transformers_refuses(opened: OpenedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("too old\nand more")

    monkeypatch.setattr(quantised, "load_model", refuse)
    with pytest.raises(ConfigError, match=r"cannot use bitsandbytes here \(too old\)"):
        load(opened, qlora())
