"""Opening and loading folders: strictness, refusals, no remote code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from llava_models import xtuner_folder
from rows import conversation, write_picture
from safetensors.torch import load_file, save_file

from vlmtune import compat
from vlmtune.config.schema import ImageOptions, MediaOptions
from vlmtune.data.encode import encode
from vlmtune.errors import ConfigError, DataError, WeightsError
from vlmtune.models.auto import pictures
from vlmtune.models.load import load_model, open_folder


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("internvl"), tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_key_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"1 missing.*layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(open_folder(folder))
    assert caught.value.exit_code == 4


def test_an_unexpected_key_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"language_model.model.layers.7.extra": torch.zeros(2)}))
    with pytest.raises(WeightsError, match=r"1 in the files but not in the model.*layers\.7\.extra"):
        load_model(open_folder(folder))


def test_a_shape_that_differs_is_named(folder: Path) -> None:
    key = "language_model.model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(7)}))
    with pytest.raises(WeightsError, match=r"another shape.*norm\.weight \(7,\) in the file, \(48,\) in the model"):
        load_model(open_folder(folder))


def test_models_of_two_layouts_load_one_by_one(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    native, official = open_folder(tiny_folder("internvl")), open_folder(tiny_folder("official-qwen2"))
    load_model(native)  # what is imported once takes longer than a load
    found: list[object] = []
    other = Thread(target=lambda: found.append(load_model(native)))
    rules = compat.conversion_rules

    @contextmanager
    def watched(*args: Any) -> Iterator[None]:
        with rules(*args):
            other.start()
            other.join(1.0)
            assert other.is_alive(), "a native model was read while the official rules held"
            yield

    monkeypatch.setattr(compat, "conversion_rules", watched)
    load_model(official)
    other.join(60)
    assert len(found) == 1


def test_a_truncated_file_is_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(open_folder(folder))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights in safetensors files"):
        load_model(open_folder(folder))


def _with_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'), "'qwen2'.*not known"),
        (lambda folder: _with_config(folder, text_config="x"), "StrictDataclass.*'text_config'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer or the image processor"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    ],
    ids=["no config", "broken config", "text model", "wrong type", "no tokenizer", "no template"],
)
def test_broken_folders(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(WeightsError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("name", ["nobody/nothing-of-that-name", "/nowhere/at/all", "./here", "one"])
def test_a_name_that_is_no_folder_says_so(name: str) -> None:
    with pytest.raises(WeightsError, match=f"model.path: {name}: there is no such folder") as caught:
        open_folder(name)
    hub = "as a hub id it cannot be fetched (the network is switched off"
    assert (hub in str(caught.value)) == name.startswith("nobody")


def test_no_remote_code_is_run(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    trap = f"open({str(witness)!r}, 'w').write('yes')\n"
    for name in ("modeling_trap.py", "configuration_trap.py", "processing_trap.py", "tokenization_trap.py"):
        (folder / name).write_text(trap)
    for file, entries in (
        ("config.json", {"AutoConfig": "configuration_trap.C", "AutoModelForImageTextToText": "modeling_trap.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_trap.T", None]}),
        ("preprocessor_config.json", {"AutoImageProcessor": "processing_trap.P"}),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "auto_map": entries}))
    load_model(open_folder(folder))
    assert not witness.exists()


def test_image_options_reach_the_plan(folder: Path) -> None:
    wide = (640, 160)
    default = open_folder(folder)
    fewer = open_folder(folder, MediaOptions(image=ImageOptions(max_tiles=1)))
    assert default.family.plan([wide], default.spec)[0].num_tiles == 5
    assert fewer.family.plan([wide], fewer.spec)[0].num_tiles == 1


def test_pixel_options_reach_the_plan(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("qwen2_5_vl"), MediaOptions(image=ImageOptions(max_pixels=56 * 56)))
    assert opened.family.plan([(640, 640)], opened.spec)[0].num_tokens == 4


def test_an_option_without_effect_is_refused(folder: Path, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.image: max_pixels has no effect"):
        open_folder(folder, MediaOptions(image=ImageOptions(max_pixels=1000)))
    with pytest.raises(ConfigError, match="max_tiles has no effect"):
        open_folder(tiny_folder("llava"), MediaOptions(image=ImageOptions(max_tiles=3)))


def test_a_row_names_its_origin_when_the_model_refuses_a_picture(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = open_folder(tiny_folder("qwen2_5_vl"))
    ref = write_picture(tmp_path, (500, 2))
    row = conversation(("user", [ref, "What?"]), ("assistant", ["A line."]), origin="rows.jsonl:7")
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the picture is 500×2"):
        encode(row, opened)


def test_an_unknown_image_processor_is_asked_with_a_blank_picture(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_folder(tiny_folder("llava"))
    sizes = [(100, 40), (33, 640), (32, 32)]
    known = opened.family.plan(sizes, opened.spec)
    monkeypatch.setattr(pictures, "KINDS", ())
    opened.spec.known_ids.clear()
    asked = opened.family.plan(sizes, opened.spec)
    assert [plan.num_tokens for plan in asked] == [plan.num_tokens for plan in known]
    assert [plan.num_tiles for plan in asked] == [plan.num_tiles for plan in known]
    picture = PIL.Image.fromarray(np.zeros((40, 100, 3), dtype=np.uint8))
    assert opened.family.pixels(picture, asked[0], opened.spec)["pixel_values"].shape[0] == asked[0].num_tiles


def test_boxes_are_written_in_the_unit_that_is_asked_for(tiny_folder: Callable[[str], Path]) -> None:
    own = open_folder(tiny_folder("internvl")).boxes
    assert (own.unit, own.template) == ("thousand", "<box>[[{x1}, {y1}, {x2}, {y2}]]</box>")
    asked = open_folder(tiny_folder("internvl"), MediaOptions(boxes="pixels")).boxes
    assert asked.unit == "pixels" and asked.template.startswith("<box>")
    with pytest.raises(ConfigError, match=r"^model\.boxes: is pixels, but this model sees only a part"):
        open_folder(tiny_folder("llava"), MediaOptions(boxes="pixels"))


@pytest.mark.parametrize("kind", ["internvl", "llava", "qwen2_5_vl"])
def test_pickled_weights_are_read_where_there_are_no_others(
    kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = load_model(open_folder(tiny_folder(kind))).state_dict()
    folder = Path(shutil.copytree(tiny_folder(kind), tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_model(open_folder(folder)).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


class Hub:
    """Stands for the hub: copies what the patterns ask for, and keeps what was asked."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[str] = []

    def __call__(self, name: str, **patterns: list[str]) -> str:
        assert name == "owner/name"
        files = [file.relative_to(self.repository).as_posix() for file in self.repository.rglob("*") if file.is_file()]
        for file in filter_repo_objects(sorted(files), **patterns):
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.cache / file)
            self.fetched.append(file)
        return str(self.cache)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hub_id_brings_pickled_weights_only_where_there_are_no_others(
    form: Literal["safetensors", "bin"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = xtuner_folder(tmp_path / "hub", form=form)
    for other in ("pytorch_model.bin", "visual_encoder/pytorch_model-00001-of-00001.bin", "optimizer.bin", "a.pth"):
        if form == "safetensors" or "pytorch" not in other:
            (repository / other).write_bytes(b"no weights")
    hub = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert len(load_model(open_folder("owner/name")).state_dict()) > 50
    pickled = [f"{place}pytorch_model.bin" for place in ("", "projector/", "visual_encoder/")]
    assert sorted(file for file in hub.fetched if file.endswith((".bin", ".pth"))) == (
        sorted(pickled) if form == "bin" else []
    )
