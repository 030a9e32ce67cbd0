"""The family object over its three kinds of folders: official, native, and a native checkpoint of an official base."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.config.schema import RunConfig
from vlmtune.errors import WeightsError
from vlmtune.export.write import export
from vlmtune.models.internvl.config import native_config, official_of
from vlmtune.models.load import load_model, open_folder
from vlmtune.train.checkpoint import add_companions
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
    # The head is the embedding here, and official code would begin with a random one if config.json did not say so.
    assert not any("lm_head" in name for name in names)
    assert config_of(tmp_path / "official")["llm_config"]["tie_word_embeddings"] is True


def test_a_native_decoder_without_an_official_name_has_the_native_layout_only(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("internvl"), tmp_path / "moe"))
    config = config_of(folder)
    config["text_config"] |= {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_folder(folder)
    assert (opened.layout, dict(opened.layouts)) == ("native", {})


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
    back = official_of(native_config(official, **CONTEXT).to_dict(), has_head=True)
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


@pytest.mark.parametrize(
    ("part", "name"),
    [("vision_config", "hidden_size"), ("llm_config", "vocab_size"), ("llm_config", "num_attention_heads")],
)
def test_a_missing_field_is_named(part: str, name: str, tiny_folder: Callable[[str], Path]) -> None:
    config = config_of(tiny_folder("official-internlm2"))
    del config[part][name]
    with pytest.raises(WeightsError, match=rf"config\.json has no '{name}'"):
        native_config(config, **CONTEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_key_value_heads": 3}, "4 heads share num_key_value_heads 3"),
        ({"rope_scaling": "dynamic"}, r"config\.json: .*Copy config\.json"),
    ],
)
def test_a_field_of_the_wrong_kind_is_one_paragraph(
    change: dict[str, object], message: str, tiny_folder: Callable[[str], Path]
) -> None:
    config = config_of(tiny_folder("official-internlm2"))
    config["llm_config"].update(change)
    with pytest.raises(WeightsError, match=message):
        native_config(config, **CONTEXT)


@pytest.mark.parametrize("keys", [("type",), ("rope_type",), ("type", "rope_type")])
def test_a_scaled_rope_may_be_named_in_either_way(keys: tuple[str, ...], tiny_folder: Callable[[str], Path]) -> None:
    config = config_of(tiny_folder("official-phi3"))
    scaling = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **dict.fromkeys(keys, "su")}
    config["llm_config"].update(rope_scaling=scaling, original_max_position_embeddings=64)
    rope = native_config(config, **CONTEXT).text_config.rope_parameters
    assert rope["rope_type"] == "longrope" and rope["long_factor"] == [2.0] * 8


def test_heads_that_do_not_fit_the_tensors_are_one_paragraph(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("official-internlm2"), tmp_path / "model"))
    config = config_of(folder)
    config["llm_config"]["num_key_value_heads"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_folder(folder)
    for act in (lambda: load_model(opened), lambda: export(folder, tmp_path / "out", verify="none")):
        with pytest.raises(WeightsError, match=r"wqkv\.weight has the shape \(128, 64\); expected 96 rows"):
            act()


def test_a_head_that_the_files_lack_is_tied_only_where_the_config_says_so(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("official-qwen2"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing from the files .*lm_head\.weight"):
        load_model(open_folder(folder))
    config = config_of(folder)
    config["llm_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tied = load_model(open_folder(folder))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_run_from_a_native_export_finds_the_official_layout_again(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_folder("official-internlm2")
    opened = open_folder(export(base, tmp_path / "native", layout="native", verify="none").out)
    checkpoint = tmp_path / "checkpoint-1"
    load_model(opened).save_pretrained(checkpoint)
    add_companions(checkpoint, opened, RunConfig.model_construct(), {})
    assert not (checkpoint / "export.json").exists()  # a checkpoint is no export, which --overwrite may replace
    result = export(checkpoint, tmp_path / "back", layout="official", verify="none")
    assert not result.notes and config_of(result.out) == config_of(base)
    assert (result.out / "modeling_internvl_chat.py").read_bytes() == (base / "modeling_internvl_chat.py").read_bytes()
    back, before = load_file(result.out / "model.safetensors"), load_file(base / "model.safetensors")
    assert back.keys() == before.keys() and all(torch.equal(back[name], before[name]) for name in before)
