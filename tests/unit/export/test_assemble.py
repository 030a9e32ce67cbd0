"""New models from parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import llava_models
import pytest
import torch
import yaml

from vlmtune.cli.main import main
from vlmtune.errors import UsageError, WeightsError
from vlmtune.export.assemble import assemble
from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.shards import Shards


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Vicuna's repository: pickled, with the frequencies of old files."""
    torch.manual_seed(0)
    folder = llava_models.write_language(tmp_path_factory.mktemp("llm"), form="bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenAI's repository: a whole CLIP."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    folder = llava_models.write_tower(tmp_path_factory.mktemp("tower"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "text_model.x": torch.ones(2), "logit_scale": torch.ones(1)}, folder / "model.safetensors")
    config = {"model_type": "clip", "vision_config": llava_models.TOWER, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_parts_stay_as_they_are(language: Path, tower: Path, tmp_path: Path) -> None:
    out = assemble(str(language), str(tower), tmp_path / "fresh", seed=3)
    shards, parts = Shards(out), (Shards(language), Shards(tower))
    for part in parts:
        for name in part.infos:
            kept = not name.endswith("inv_freq") and not name.startswith(("text_model", "logit_scale"))
            assert (name in shards) == kept
            assert not kept or torch.equal(shards.read(name), part.read(name))
    fresh = shards.read("model.2.weight")
    assert fresh.shape == (64, 64) and 0.9 / 8 < float(fresh.abs().max()) <= 1 / 8
    opened = open_folder(out)
    assert opened.layout == "xtuner" and opened.chat.opening.endswith("USER: ")
    model = load_model(opened)
    assert torch.equal(model.state_dict()["model.multi_modal_projector.linear_2.weight"], fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"]


def test_the_seed_decides_the_projector(language: Path, tower: Path, tmp_path: Path) -> None:
    found = [assemble(str(language), str(tower), tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    one, two, other = (Shards(folder).read("model.0.weight") for folder in found)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_the_verb_writes_a_native_folder(language: Path, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "native"
    assert main(["assemble", str(language), str(tower), "-o", str(out), "--layout", "native"]) == 0
    opened = open_folder(out)
    assert opened.layout == "native" and json.loads((out / "config.json").read_text())["model_type"] == "llava"


@pytest.mark.parametrize("layout", ["native", "llava"])
def test_card_and_record_name_the_parts(layout: str, language: Path, tower: Path, tmp_path: Path) -> None:
    licensed = shutil.copytree(language, tmp_path / "licensed")
    (licensed / "README.md").write_text("---\nlicense: llama2\n---\n")
    out = assemble(str(licensed), str(tower), tmp_path / "out", layout=layout, seed=5)
    record = json.loads((out / "export.json").read_text())
    assert record["source"] is record["base"] is None
    assert record["provenance"]["assembled"] == {
        "language": {"name": str(licensed), "licence": "llama2"},
        "tower": {"name": str(tower), "licence": None},
        "projector": "fresh: random numbers, untrained",
        "seed": 5,
    }
    text = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == ["licensed", tower.name] and "license" not in front
    assert "assembled with vlmtune" in text and "seed 5" in text and "fine-tuned" not in text
    assert "- Language model: `licensed`\n- Licence of the language model: llama2\n" in text
    assert f"- Vision tower: `{tower.name}`\n- Licence of the vision tower: not stated" in text
    assert "trained model" not in text
    assert not any(".parts" in file.read_text(encoding="utf-8") for file in (*out.glob("*.json"), out / "README.md"))
    assert not (out / "provenance.json").exists()


def test_an_unknown_layout_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layout 'odd'; expected xtuner or native or llava"):
        assemble(str(tmp_path / "nowhere"), str(tmp_path / "nowhere"), tmp_path / "out", layout="odd")


def test_what_does_not_make_a_model_is_refused(language: Path, tower: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the vision tower is 'llama'"):
        assemble(str(language), str(language), tmp_path / "out")
    bare = tmp_path / "bare"
    shutil.copytree(tower, bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="no preprocessor_config"):
        assemble(str(language), str(bare), tmp_path / "out")
    with pytest.raises(UsageError, match="in use"):
        assemble(str(language), str(tower), bare)
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
