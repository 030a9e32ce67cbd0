"""Official folders whose config.json, tower file or tensors are wrong: one paragraph, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xcomposer2_models import official_folder

from vlmtune.errors import WeightsError
from vlmtune.export.write import export
from vlmtune.infer.describe import describe
from vlmtune.infer.locate import locate
from vlmtune.models.load import open_folder
from vlmtune.models.xcomposer2.weights import PATCHES, POSITIONS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return official_folder("xcomposer2", tmp_path / "model")


def _changed(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _refused(folder: Path, expected: str) -> None:
    with pytest.raises(WeightsError) as caught:
        open_folder(folder)
    said = str(caught.value)
    assert str(folder) in said and expected in said and "\n" not in said, said


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_act": "nope"}, "hidden_act is 'nope'; expected the name of an activation"),
        ({"hidden_act": 5}, "hidden_act is 5"),
        ({"rope_scaling": {"type": "yarnish", "factor": 2.0}}, "rope_scaling is of the type 'yarnish'"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; expected a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; expected at most 1,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"architectures": 5}, "architectures 5 is not known"),
        ({"architectures": "InternLMXComposer2ForCausalLM"}, "'InternLMXComposer2ForCausalLM' is not known"),
    ],
)
def test_a_wrong_config(folder: Path, values: dict[str, Any], expected: str) -> None:
    _changed(folder, "config.json", values)
    _refused(folder, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "nope"}, "hidden_act is 'nope'"),
    ],
)
def test_a_wrong_file_of_the_tower(folder: Path, values: dict[str, Any], expected: str) -> None:
    _changed(folder, "vision_tower_config.json", values)
    _refused(folder, expected)
    with pytest.raises(WeightsError, match=r"vision_tower_config\.json: "):
        open_folder(folder)


def test_an_empty_file_of_the_tower(folder: Path) -> None:
    (folder / "vision_tower_config.json").write_text("{}")
    _refused(folder, "vision_tower_config.json: has no hidden_size and no patch_size")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (PATCHES, (32, 147), f"{PATCHES} has the shape (32, 147); expected 4 axes"),
        (POSITIONS, (0, 32), "has 0 rows; expected 1 + n² rows"),
        (POSITIONS, (1, 32), "has 1 rows; expected 1 + n² rows"),
        (POSITIONS, (16, 32), "has 16 rows; expected 1 + n² rows"),
        ("model.layers.0.attention.wo.Plora_A.weight", (64,), "has the shape (64,); expected 2 axes"),
    ],
)
def test_tensors_of_a_wrong_shape(folder: Path, name: str, shape: tuple[int, ...], expected: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.zeros(shape)}, folder / "model.safetensors", metadata={"format": "pt"})
    _refused(folder, expected)


def test_buffers_that_older_versions_wrote_pass_everywhere(folder: Path, tmp_path: Path) -> None:
    """Loading lets them pass, so that a run starts: its export and `info` must then take them as well."""
    before = load_file(folder / "model.safetensors")
    old = {
        "vit.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "model.layers.0.attention.rotary_emb.inv_freq": torch.ones(8),
    }
    lost = {name for name in before if "post_layernorm" in name}  # nor are these read by anything
    held = {name: tensor for name, tensor in before.items() if name not in lost}
    save_file({**held, **old}, folder / "model.safetensors", metadata={"format": "pt"})
    found = describe(locate(str(folder)))
    assert (found.unknown, found.missing) == (0, 0)
    native = export(folder, tmp_path / "native", layout="native", verify="layers", device="cpu").out
    back = export(native, tmp_path / "back", layout="official", verify="full", device="cpu").out
    after = load_file(back / "model.safetensors")
    assert after.keys() - lost == held.keys() and all(torch.equal(after[name], held[name]) for name in held)
    save_file({**held, "model.foo": torch.ones(8)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert describe(locate(str(folder))).unknown == 1
    with pytest.raises(WeightsError, match=r"model\.foo"):
        export(folder, tmp_path / "none", layout="native", device="cpu")
