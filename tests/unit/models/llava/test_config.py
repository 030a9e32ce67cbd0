"""config.json of parts as folders on the hub have it: most sizes are left to the classes of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llava_models import LANGUAGE, PROJECTOR, xtuner_folder
from safetensors.torch import load_file, save_file

from vlmtune.errors import WeightsError
from vlmtune.export.write import export
from vlmtune.models.family import ModelFolder
from vlmtune.models.llava import config as configs
from vlmtune.models.llava import folders
from vlmtune.models.load import load_model, open_folder

HUB: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "float16", "vocab_size": 32064},
    "torch_dtype": "float16",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
"""What llava-hf's folders say, and no more; the base of the rotation is another here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return xtuner_folder(tmp_path_factory.mktemp("config") / "model")


def test_the_parts_of_a_hub_folder_are_whole(tmp_path: Path) -> None:
    parts = folders.parts(ModelFolder(tmp_path, HUB))
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32064}
    assert sizes.items() <= dict(parts.language).items()
    assert parts.language["rope_theta"] == 5e5 and parts.language["rope_scaling"] is None
    assert not {"id2label", "return_dict", "rope_parameters"} & set(parts.language)
    assert parts.vision["image_size"] == 224 and parts.vision["num_hidden_layers"] == 12
    assert (parts.projector["visual_hidden_size"], parts.projector["llm_hidden_size"]) == (1024, 4096)


def test_a_tower_of_its_class_alone() -> None:
    """As google/siglip-base-patch16-224 has it."""
    found = configs.tower_config({"model_type": "siglip", "vision_config": {}}, where="here")
    assert (found["image_size"], found["patch_size"], found["hidden_size"]) == (224, 16, 768)
    whole = configs.native_config(LANGUAGE, found, PROJECTOR, context_id=0, has_head=True, where="here")
    assert whole.image_seq_length == 196


@pytest.mark.parametrize("field", ["mm_use_im_start_end", "mm_patch_merge_type", "image_aspect_ratio"])
def test_traits_of_official_folders_that_are_not_followed(field: str) -> None:
    official = {"mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu"}
    assert configs.projector_of({**official, "image_aspect_ratio": "pad", "mm_use_im_start_end": False}, where="here")
    other: Any = {"mm_use_im_start_end": True, "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    with pytest.raises(WeightsError, match=f"{field} is {other[field]!r}, which changes what the model sees"):
        configs.projector_of({**official, field: other[field]}, where="here")


def with_config(folder: Path, into: Path, **more: Any) -> Path:
    shutil.copytree(folder, into)
    (into / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **more}))
    return into


def test_a_head_that_is_lost_is_not_tied(folder: Path, tmp_path: Path) -> None:
    lost, tied = with_config(folder, tmp_path / "a"), with_config(folder, tmp_path / "b", tie_word_embeddings=True)
    for place in (lost, tied):
        tensors = load_file(place / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"there is no lm_head\.weight, and config\.json does not tie"):
        open_folder(lost)
    model: Any = load_model(open_folder(tied))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("layout", ["xtuner", "llava"])
def test_a_head_of_its_own_is_said_to_be_one(layout: str, folder: Path, tmp_path: Path) -> None:
    """Else others would put the embedding in its place."""
    said = with_config(folder, tmp_path / "a", tie_word_embeddings=True)
    export(said, tmp_path / "out", layout=layout, verify="none")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("layout", ["native", "xtuner", "llava"])
def test_every_layout_of_a_model_reads_boxes_alike(layout: str, folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "out", layout=layout, verify="none")
    assert open_folder(tmp_path / "out").boxes == open_folder(folder).boxes
    assert open_folder(folder).boxes.unit == "unit"


@pytest.mark.parametrize(
    ("fit", "told"), [("keep_aspect", {"native", "xtuner", "llava"}), ("pad_square", {"native"}), (None, set())]
)
def test_others_are_said_not_to_know_how_pictures_were_fitted(
    fit: str | None, told: set[str], folder: Path, tmp_path: Path
) -> None:
    base = with_config(folder, tmp_path / "base", vlmtune={"fit": fit})
    for layout in ("native", "xtuner", "llava"):
        notes = export(base, tmp_path / layout, layout=layout, verify="none").notes
        assert any(f"trained with fit {fit}" in note for note in notes) == (layout in told), (layout, notes)
