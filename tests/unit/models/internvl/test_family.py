"""The family object over its three kinds of folders: official, native, and a native checkpoint of an official base."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlmtune.errors import WeightsError
from vlmtune.export.write import export
from vlmtune.models.internvl.config import native_config, official_of
from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.shards import Shards

CONTEXT = {"context_id": 5, "tokens_per_tile": 4, "has_head": True, "where": "here"}


def test_a_checkpoint_of_an_official_base_prompts_and_cuts_as_its_base(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = open_folder(tiny_folder("official-internlm2"))
    load_model(base).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base.folder.path / name, tmp_path)
    for name, content in base.family.companions(base.folder).items():
        (tmp_path / name).write_bytes(content)
    again = open_folder(tmp_path)
    assert (again.layout, again.family.home_layout(again.folder)) == ("native", "official")
    assert (again.chat, again.spec, again.media.exif) == (base.chat, base.spec, "ignore")
    assert (tmp_path / "modeling_internvl_chat.py").is_file()
    first, second = load_model(base).state_dict(), load_model(again).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_photos_are_turned_where_transformers_turns_them(tiny_folder: Callable[[str], Path]) -> None:
    assert open_folder(tiny_folder("internvl")).media.exif == "apply"
    assert open_folder(tiny_folder("official-qwen2")).media.exif == "ignore"


def test_a_native_folder_that_was_never_official_can_become_it(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = export(tiny_folder("internvl"), tmp_path / "official", layout="official")
    assert all(one.difference == 0.0 for one in result.comparisons)
    assert any("no official Python files" in note for note in result.notes)
    names = set(Shards(tmp_path / "official").infos)
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in names and "mlp1.1.weight" in names
    assert open_folder(tmp_path / "official").layout == "official"


def test_layers_behind_the_feature_layer_are_lawful_zeros(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("official-qwen2"))
    assert opened.family.lawful_zeros(opened.config) is None
    opened.config.vision_feature_layer = -2
    pattern = opened.family.lawful_zeros(opened.config)
    assert pattern is not None
    silent = {name for name, _ in load_model(opened).named_parameters() if re.fullmatch(pattern, name)}
    assert silent and all(name.startswith("model.vision_tower.encoder.layer.1.") for name in silent)


def config_of(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("decoder", ["qwen2", "phi3", "llama"])
def test_an_official_config_survives_the_way_through_the_native_one(
    decoder: str, tiny_folder: Callable[[str], Path]
) -> None:
    """InternLM2 becomes Llama on the way: its official config.json travels beside instead."""
    official = config_of(tiny_folder(f"official-{decoder}"))
    back = official_of(native_config(official, **CONTEXT).to_dict())
    for part in ("vision_config", "llm_config"):
        shared = set(back[part]) & set(official[part]) - {"torch_dtype"}
        assert len(shared) > 8
        assert {key: back[part][key] for key in shared} == {key: official[part][key] for key in shared}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"architectures": ["CLIPVisionModel"]}, "the vision tower is 'CLIPVisionModel'"),
        ("llm_config", {"model_type": "rwkv99"}, "the decoder is of model_type 'rwkv99'"),
        ("vision_config", {"qk_normalization": True, "layer_norm_eps": 1e-5}, "qk_normalization with layer_norm_eps"),
    ],
)
def test_settings_that_transformers_has_no_class_for(
    part: str, change: dict[str, object], message: str, tiny_folder: Callable[[str], Path]
) -> None:
    config = config_of(tiny_folder("official-qwen2"))
    config[part].update(change)
    with pytest.raises(WeightsError, match=message):
        native_config(config, **CONTEXT)


def test_a_missing_field_is_named(tiny_folder: Callable[[str], Path]) -> None:
    config = config_of(tiny_folder("official-qwen2"))
    del config["vision_config"]["hidden_size"]
    with pytest.raises(WeightsError, match=r"config\.json has no 'hidden_size'"):
        native_config(config, **CONTEXT)
