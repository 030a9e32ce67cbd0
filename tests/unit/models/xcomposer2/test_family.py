"""Official folders by their tensors: sizes that config.json does not say, other picture sizes, what is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xcomposer2_models import furnish

from vlmtune.config.schema import ImageOptions, MediaOptions
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.export.write import export
from vlmtune.models.load import load_model, open_folder
from vlmtune.models.xcomposer2.weights import resize_positions

RECORDS = Path(__file__).parents[3] / "golden" / "xcomposer2"


def sized(folder: Path, size: int | None) -> Any:
    return open_folder(folder, MediaOptions(image=ImageOptions(size=size)))


def table(opened: Any) -> torch.Tensor:
    model: Any = load_model(opened)
    return model.vit.embeddings.position_embedding.weight.detach()


def rewritten(folder: Path, change: Any) -> Path:
    """The folder with its weights as `change` leaves them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_an_official_folder_is_read_at_another_picture_size(tmp_path: Path) -> None:
    folder = furnish(RECORDS / "vl", tmp_path / "vl")
    assert torch.equal(table(sized(folder, 96)), resize_positions(table(sized(folder, None)), 96 // 8))


def test_a_native_folder_keeps_its_picture_size(tmp_path: Path) -> None:
    export(furnish(RECORDS / "vl", tmp_path / "vl"), tmp_path / "native", layout="native")
    assert sized(tmp_path / "native", 72).spec == sized(tmp_path / "native", None).spec
    with pytest.raises(ConfigError, match="one for 72 pixels"):
        sized(tmp_path / "native", 96)


def test_a_tower_without_the_unused_norm_opens(tmp_path: Path) -> None:
    """The publisher's training leaves it out where it trained the tower; nothing reads it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("weight", "bias"):
            del tensors[f"vit.vision_tower.vision_model.post_layernorm.{part}"]

    whole = table(sized(furnish(RECORDS / "vl", tmp_path / "whole"), None))
    less = rewritten(furnish(RECORDS / "vl", tmp_path / "less"), change)
    assert torch.equal(table(sized(less, None)), whole)
    for mode in ("full", "layers"):
        found = export(less, tmp_path / mode, layout="native", verify=mode, device="cpu")
        assert [one.difference for one in found.comparisons] == [0.0, 0.0]


@pytest.mark.parametrize("lost", ["model.layers.0.attention.wqkv.Plora_A.weight", "vision_proj.2.bias", "plora_sub_GN"])
def test_an_absent_tensor_is_named(lost: str, tmp_path: Path) -> None:
    folder = rewritten(furnish(RECORDS / "hd4k", tmp_path / "hd4k"), lambda tensors: tensors.pop(lost))
    ours = "vision_proj.row_separator" if lost == "plora_sub_GN" else lost
    with pytest.raises(WeightsError, match=ours):
        load_model(open_folder(folder))


def test_a_tower_of_unknown_shape_is_said(tmp_path: Path) -> None:
    folder = furnish(RECORDS / "vl", tmp_path / "vl")
    (folder / "vision_tower_config.json").unlink()
    with pytest.raises(WeightsError, match=r"a width of 32 and patches of 8 pixels.*CLIP-L/14"):
        open_folder(folder)


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 0), ("hidden_size", "48"), ("vocab_size", None)])
def test_a_wrong_field_of_the_config_is_said(field: str, value: object, tmp_path: Path) -> None:
    folder = furnish(RECORDS / "vl", tmp_path / "vl")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(WeightsError, match=field):
        open_folder(folder)


def test_official_exports_say_how_many_tiles_the_model_was_trained_with(tmp_path: Path) -> None:
    """The publisher's scripts keep `hd_num` nowhere; 16, their page's, is written nowhere either."""
    folder = furnish(RECORDS / "hd4k", tmp_path / "hd4k")
    assert open_folder(folder).spec.max_tiles == 16
    export(folder, tmp_path / "plain", layout="official")
    assert json.loads((tmp_path / "plain" / "config.json").read_bytes()) == json.loads(
        (folder / "config.json").read_bytes()
    )
    said = {**json.loads((folder / "config.json").read_bytes()), "vlmtune": {"max_tiles": 4}}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    for layout in ("native", "official"):
        export(folder, tmp_path / layout, layout=layout)
        assert open_folder(tmp_path / layout).spec.max_tiles == 4


def test_the_length_of_training_rows_is_no_limit_of_answers(tmp_path: Path) -> None:
    folder = furnish(RECORDS / "vl", tmp_path / "vl")
    assert "max_length" in json.loads((folder / "config.json").read_bytes())
    model = load_model(open_folder(folder))
    assert model.generation_config is not None and model.generation_config.max_length is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.pop("text_config"), "config.json has no text_config"),
        (lambda config: config.update(vision_config="clip"), "config.json has no vision_config"),
        (lambda config: config["text_config"].pop("vocab_size"), "text_config has no 'vocab_size'"),
        (lambda config: config["text_config"].update(num_hidden_layers="2"), "num_hidden_layers is '2'"),
        (lambda config: config["vision_config"].update(hidden_size="x"), "config.json: .*hidden_size"),
        (lambda config: config.update(partial_rank="8"), "config.json: .*partial_rank is '8'"),
        (lambda config: config.update(max_tiles=0), "config.json: .*max_tiles is 0"),
        (lambda config: config.update(partial_scale="2"), "config.json: .*partial_scale is '2'"),
    ],
)
def test_a_broken_config_of_a_native_folder_is_said(change: Callable[[Any], object], said: str, tmp_path: Path) -> None:
    native = export(furnish(RECORDS / "vl", tmp_path / "vl"), tmp_path / "native", layout="native", verify="none").out
    config = json.loads((native / "config.json").read_text(encoding="utf-8"))
    change(config)
    (native / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightsError, match=said):
        open_folder(native)


@pytest.mark.parametrize("style", ["official", "newline"])
def test_exports_keep_the_form_of_conversations_that_was_trained(style: Any, tmp_path: Path) -> None:
    opened = open_folder(furnish(RECORDS / "vl", tmp_path / "vl"), MediaOptions(chat=style))
    for layout in ("native", "official"):
        (out := tmp_path / layout).mkdir()
        opened.family.write_files(opened, layout, out)
        for file in (tmp_path / "vl").glob("*.safetensors"):  # for the sizes of an official folder
            (out / file.name).symlink_to(file.resolve())
        assert open_folder(out).chat == opened.chat
    assert open_folder(tmp_path / "vl").chat != opened.chat


def test_an_unknown_form_of_conversations_is_said(tmp_path: Path) -> None:
    folder = furnish(RECORDS / "vl", tmp_path / "vl")
    said = {**json.loads((folder / "config.json").read_bytes()), "vlmtune": {"chat": "loud"}}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(WeightsError, match="chat is 'loud'; expected null or official"):
        open_folder(folder)
