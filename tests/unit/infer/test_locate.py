"""Which weights a path means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.config.schema import ImageOptions, MediaOptions, VideoOptions
from vlmtune.errors import UsageError, WeightsError
from vlmtune.infer.locate import checkpoints, locate
from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.weights.fingerprint import fingerprint


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for step in (5, 10, 100):
        checkpoint = model_folder(run / f"checkpoint-{step}")
        (checkpoint / "manifest.json").write_text("{}")
        (checkpoint / "run.yaml").write_text("")
    (run / "run.yaml").write_text("")
    model_folder(run / "checkpoint-110")  # the process died while it wrote this one
    return run


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    found = locate(folder)
    assert (found.path, found.base, found.model_folder) == (folder, None, folder)


def test_of_a_run_the_best_checkpoint(run_folder: Path) -> None:
    (run_folder / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-10", "eval_loss": 0.5}))
    assert locate(run_folder).path.name == "checkpoint-10"
    assert locate(run_folder, checkpoint="last").path.name == "checkpoint-100"
    assert locate(run_folder, checkpoint="5").path.name == "checkpoint-5"


def test_without_an_evaluation_the_last_whole_one(run_folder: Path) -> None:
    assert list(checkpoints(run_folder)) == [5, 10, 100]
    assert locate(run_folder).path.name == "checkpoint-100"


def test_a_checkpoint_that_is_not_there_lists_those_that_are(run_folder: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint 7; expected best, last, or one of the steps 5, 10, 100"):
        locate(run_folder, checkpoint="7")
    (run_folder / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-50"}))
    with pytest.raises(WeightsError, match="names checkpoint-50, which is not there"):
        locate(run_folder)


def test_a_checkpoint_folder_stands_for_itself(run_folder: Path) -> None:
    assert locate(run_folder / "checkpoint-5").path.name == "checkpoint-5"


def test_a_run_that_has_not_saved_yet(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UsageError, match="no finished checkpoint"):
        locate(tmp_path)


def test_an_adapter_finds_its_base(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    found = locate(adapter(tmp_path / "adapter", str(base)))
    assert (found.base, found.model_folder) == (base, base)


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", str(tmp_path / "gone"))
    with pytest.raises(WeightsError, match=r"the base model of this adapter is not at .*gone.*--base DIR") as caught:
        locate(folder)
    assert caught.value.exit_code == 4
    moved = model_folder(tmp_path / "moved")
    assert locate(folder, base=moved).base == moved
    with pytest.raises(UsageError, match="given with --base"):
        locate(folder, base=tmp_path / "also-gone")


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", str(base))
    (folder / "provenance.json").write_text(json.dumps({"base": str(base), "base_sha256": fingerprint(base)}))
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    assert locate(folder).base == base and locate(folder, base=copied).base == copied
    (copied / "config.json").write_text('{"model_type": "another"}')
    with pytest.raises(WeightsError, match=r"trained on another model than .*copied: .*--base DIR") as caught:
        locate(folder, base=copied)
    assert caught.value.exit_code == 4


def test_a_base_for_a_whole_model_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UsageError, match="not an adapter"):
        locate(folder, base=folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        locate(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"neither config\.json"):
        locate(tmp_path)


def test_pictures_are_cut_as_in_training(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    model = {"path": "x", "image": {"max_tiles": 3}, "video": {"fps": 2.0, "num_frames": None}, "boxes": "pixels"}
    config = {"model": model, "data": {"max_image_pixels": 1000, "exif": "ignore"}}
    (folder / "provenance.json").write_text(json.dumps({"config": config}))
    assert locate(folder).media == MediaOptions(
        image=ImageOptions(max_tiles=3),
        video=VideoOptions(fps=2.0),
        boxes="pixels",
        max_image_pixels=1000,
        exif="ignore",
    )


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "provenance.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(WeightsError, match="the checkpoint has format 2; expected format 1"):
        locate(folder)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", "x")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"adapter_config\.json: cannot be read"):
        locate(folder)


def bare_language_adapter(folder: Path, base: Path) -> Path:
    """An adapter whose names are those of a bare language model, as PEFT writes it."""
    folder = adapter(folder, str(base))
    save_file({"base_model.model.model.layers.0.w.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def test_the_base_tells_whose_names_an_adapter_has(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    folder = bare_language_adapter(tmp_path / "adapter", base)
    (base / "config.json").write_text(
        json.dumps({"model_type": "internvl_chat", "architectures": ["InternVLChatModel"]})
    )
    with pytest.raises(UsageError, match=r"official names of its layers.* --base DIR \(in Python: base=DIR\)"):
        locate(folder)
    with pytest.raises(UsageError, match="official names of its layers"):
        locate(folder, base=base)
    (base / "config.json").write_text(XComposer2Config(text_config={"num_hidden_layers": 1}).to_json_string())
    assert locate(folder).base == base
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"--base DIR \(in Python: base=DIR\)"):
        locate(folder)
    assert locate(folder, base=tmp_path / "moved").base == tmp_path / "moved"
    (folder / "provenance.json").write_text("{}")  # ours, whose names are always those of its own model
    with pytest.raises(WeightsError, match=r"the base model of this adapter is not at .*--base DIR"):
        locate(folder)


def test_an_adapter_on_a_native_base_prefers_the_folder_of_the_training(tmp_path: Path) -> None:
    """An export goes back to that folder's layout; the native base takes its place where it has gone or changed."""
    official, native = model_folder(tmp_path / "official"), model_folder(tmp_path / "native")
    (native / "config.json").write_text('{"native": true}')
    folder = adapter(tmp_path / "adapter", str(native))
    provenance = {
        "base": str(official),
        "base_sha256": fingerprint(official),
        "native_base": str(native),
        "native_base_sha256": fingerprint(native),
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert locate(folder).base == official
    (official / "config.json").write_text('{"another": true}')
    assert locate(folder).base == native
    with pytest.raises(WeightsError, match="trained on another model"):
        locate(folder, base=official)
    shutil.rmtree(official)
    assert locate(folder).base == native
    assert locate(folder, base=native).base == native


def test_a_foreign_checkpoint_asks_for_the_model_whosoever_it_is(tmp_path: Path) -> None:
    """InternVL's base is an official folder, LLaVA's one of XTuner; the name of a file tells neither."""
    (tmp_path / "iter_5.pth").write_bytes(b"")
    with pytest.raises(UsageError, match=r"Point to that model's folder, as it was before the training: --base DIR"):
        locate(tmp_path / "iter_5.pth", foreign=True)


@pytest.mark.parametrize("named", ["~no-such-user/model", "a" * 5000, "a/" * 3000, "a\0b", 5])
@pytest.mark.parametrize("layer", ["layers.0.attention.wqkv", "language_model.layers.0.self_attn.q_proj"])
def test_a_base_that_no_path_can_be_is_said(layer: str, named: object, tmp_path: Path) -> None:
    save_file(
        {f"base_model.model.model.{layer}.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises((UsageError, WeightsError), match="--base"):
        locate(tmp_path)
