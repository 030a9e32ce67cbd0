"""What a base is recognised by: its configuration and the names and shapes of its weights, of all its folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llava_models import xtuner_folder
from safetensors.torch import load_file, save_file

from vlmtune.weights.fingerprint import fingerprint


def test_other_numbers_are_the_same_base_and_other_shapes_are_not(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_folder("official-qwen2"), tmp_path / "base"))
    file, before = base / "model.safetensors", fingerprint(base)
    tensors = load_file(file)
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    assert fingerprint(base) == before
    save_file({**tensors, "mlp1.0.bias": torch.zeros(2)}, file, {"format": "pt"})
    assert fingerprint(base) != before


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("part", ["visual_encoder", "projector"])
def test_the_parts_of_a_model_in_three_folders_count(form: str, part: str, tmp_path: Path) -> None:
    base = xtuner_folder(tmp_path, form=form)  # type: ignore[arg-type]
    before = fingerprint(base)
    config = json.loads((base / part / "config.json").read_text())
    (base / part / "config.json").write_text(json.dumps({**config, "changed": True}))
    assert fingerprint(base) != before
