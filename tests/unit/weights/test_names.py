"""The table of names against what transformers itself loads and saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.names import name_table, skeleton
from vlmtune.weights.shards import Shards

KINDS = ("internvl", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_on_disk_is_the_parameter_that_the_table_says(
    kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = tiny_folder(kind)
    opened = open_folder(folder)
    shards = Shards(folder)
    table = name_table(skeleton(opened), shards.infos)
    model = load_model(opened)
    loaded = model.state_dict()
    assert set(table.links) == set(shards.infos)
    assert not table.converted
    tied = set(model.all_tied_weights_keys)  # a tied head has no tensor of its own
    assert set(table.link_of) == set(loaded) - tied
    for parameter, link in table.link_of.items():
        assert torch.equal(shards.read(link.disk), loaded[parameter]), link


def test_internvl_lies_on_disk_under_other_names(tiny_folder: Callable[[str], Path]) -> None:
    model = skeleton(open_folder(tiny_folder("internvl")))
    table = name_table(model, ["language_model.lm_head.weight", "language_model.model.norm.weight"])
    assert table.links["language_model.lm_head.weight"].parameters == ("lm_head.weight",)
    assert table.links["language_model.model.norm.weight"].parameters == ("model.language_model.norm.weight",)


def test_a_folder_saved_under_parameter_names_is_understood(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_folder(tiny_folder("internvl"))
    model = load_model(opened)
    model.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    table = name_table(skeleton(opened), names)
    assert {disk: (disk,) for disk in names} == {disk: link.parameters for disk, link in table.links.items()}


def test_an_unknown_tensor_is_left_out(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"foreign.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    table = name_table(skeleton(open_folder(tiny_folder("llava"))), Shards(tmp_path).infos)
    assert not table.links


def test_the_skeleton_has_no_storage(tiny_folder: Callable[[str], Path]) -> None:
    model = skeleton(open_folder(tiny_folder("qwen3_vl")))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
