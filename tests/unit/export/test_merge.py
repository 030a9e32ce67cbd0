"""The merge, tensor by tensor, against PEFT's own merge of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import save_tiny

from vlmtune.export.merge import NotStreamable, plan_merge
from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.names import name_table, skeleton
from vlmtune.weights.shards import Shards

METHODS = ("lora", "dora", "rslora")


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(load_model(open_folder(base), dtype=torch.float32), adapter)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", ("internvl", "llava", "qwen2_5_vl", "smolvlm"))
@pytest.mark.parametrize("method", METHODS)
def test_each_tensor_is_what_peft_makes_of_it(
    kind: str, method: str, tiny_folder: Callable[[str], Path], adapter_folder: Callable[[str, str], Path]
) -> None:
    opened, shards = open_folder(tiny_folder(kind)), Shards(tiny_folder(kind))
    merge = plan_merge(opened, adapter_folder(kind, method), shards)
    table = name_table(skeleton(opened), shards.infos)
    expected = merged_by_peft(tiny_folder(kind), adapter_folder(kind, method))
    assert merge.merged and merge.replaced
    for disk in shards.infos:
        (name,) = table.links[disk].parameters
        before, after = shards.read(disk), expected[name]
        if name in merge:
            assert torch.equal(merge.apply(name, before), after), disk
            assert not torch.equal(before, after), disk
        else:
            assert torch.equal(before, after), disk


def test_the_order_of_the_tensors_does_not_matter(
    tiny_folder: Callable[[str], Path], adapter_folder: Callable[[str, str], Path]
) -> None:
    shards = Shards(tiny_folder("llava"))
    opened = open_folder(tiny_folder("llava"))
    merge = plan_merge(opened, adapter_folder("llava", "dora"), shards)
    disk_of = {name: link.disk for name, link in name_table(skeleton(opened), shards.infos).link_of.items()}
    once = {name: merge.apply(name, shards.read(disk_of[name])) for name in merge.merged}
    again = {name: merge.apply(name, shards.read(disk_of[name])) for name in reversed(list(merge.merged))}
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("method", METHODS)
def test_no_base_weight_is_held(
    method: str, tiny_folder: Callable[[str], Path], adapter_folder: Callable[[str, str], Path]
) -> None:
    """A stand-in is one number in memory, before a tensor's merge and after it."""
    shards = Shards(tiny_folder("internvl"))
    merge = plan_merge(open_folder(tiny_folder("internvl")), adapter_folder("internvl", method), shards)
    table = name_table(skeleton(open_folder(tiny_folder("internvl"))), shards.infos)
    for name, layer in merge.merged.items():
        merge.apply(name, shards.read(table.link_of[name].disk))
        assert layer.get_base_layer().weight.untyped_storage().nbytes() == 4, name


def test_a_16_bit_base_is_merged_in_float32(
    tmp_path: Path, tiny_folder: Callable[[str], Path], adapter_folder: Callable[[str, str], Path]
) -> None:
    base = save_tiny("llava", tmp_path / "half", dtype=torch.bfloat16)
    shards = Shards(base)
    merge = plan_merge(open_folder(base), adapter_folder("llava", "lora"), shards)
    table = name_table(skeleton(open_folder(base)), shards.infos)
    expected = merged_by_peft(base, adapter_folder("llava", "lora"))
    for name in merge.merged:
        found = merge.apply(name, shards.read(table.link_of[name].disk))
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[name])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bias": "lora_only"}, "biases"),
        ({"init_lora_weights": "pissa"}, "initialisation"),
        ({"trainable_token_indices": [1, 2]}, "more than whole layers"),
    ],
)
def test_what_cannot_be_streamed_is_said(
    changed: dict[str, Any],
    reason: str,
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    adapter_folder: Callable[[str, str], Path],
) -> None:
    adapter = shutil.copytree(adapter_folder("llava", "lora"), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(NotStreamable, match=reason):
        plan_merge(open_folder(tiny_folder("llava")), adapter, Shards(tiny_folder("llava")))
