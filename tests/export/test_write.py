"""The exported folder: what is in it, that it is the trained model, and that a failure leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import vlmtune
from vlmtune.errors import ExportError, UsageError, WeightsError
from vlmtune.export import merge, verify, write
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.models.load import open_folder
from vlmtune.weights.shards import Shards

KINDS = ("internvl", "llava", "qwen2_5_vl", "smolvlm", "xcomposer2", "xcomposer2-4khd-native")


@pytest.fixture
def exported(adapter_folder: Callable[[str, str], Path], tmp_path: Path) -> Path:
    return export(adapter_folder("internvl", "dora"), tmp_path / "out", device="cpu").out


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_has_the_logits_of_the_trained_model(
    kind: str, adapter_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """`verify` says so too; this asks other questions, through sessions of our own."""
    result = export(adapter_folder(kind, "lora"), tmp_path / "out", device="cpu")
    assert [one.prompt for one in result.comparisons] == ["text prompt", "picture prompt"]
    trained, plain = load(adapter_folder(kind, "lora"), device="cpu"), load(result.out, device="cpu")
    for before, after in zip(trained.logits(verify.fixed_prompts()), plain.logits(verify.fixed_prompts()), strict=True):
        torch.testing.assert_close(after, before, atol=2e-5, rtol=0)


def test_untouched_tensors_and_names_are_those_of_the_base(exported: Path, tiny_folder: Callable[[str], Path]) -> None:
    before, after = load_file(tiny_folder("internvl") / "model.safetensors"), load_file(exported / "model.safetensors")
    assert set(before) == set(after)  # the names on disk, legacy ones here
    record = json.loads((exported / "export.json").read_text())
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) == record["tensors"]["unchanged"] > 0
    assert len(before) - len(same) == record["tensors"]["merged"] + record["tensors"]["replaced"]
    assert not any("q_proj.weight" in name for name in same)  # language and vision blocks were adapted


def test_tied_heads_stay_tied(exported: Path) -> None:
    assert "language_model.lm_head.weight" not in Shards(exported).infos
    model = load(exported, device="cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_all_files_are_there(exported: Path, tiny_folder: Callable[[str], Path]) -> None:
    base = tiny_folder("internvl")
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (base / name).read_bytes()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == open_folder(base).chat.stop_ids[0]
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model: internvl" in card
    assert str(base.parent) not in card  # no paths of this machine
    record = json.loads((exported / "export.json").read_text())
    assert all(one["holds"] for one in record["compared"]) and record["versions"]["transformers"]
    assert not [path for path in exported.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_16_bits_are_compared_with_one_cast(
    dtype: str, adapter_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    result = export(adapter_folder("llava", "dora"), tmp_path / "out", dtype=dtype, device="cpu")  # type: ignore[arg-type]
    for one in result.comparisons:
        assert 0 < one.difference == pytest.approx(one.one_cast, rel=1e-3)  # cast once, and no more than once
        assert one.limit == max(verify.TOLERANCE, 2 * one.one_cast)
    assert {info.dtype for info in Shards(result.out).infos.values()} == {"BF16" if dtype == "bfloat16" else "F16"}
    assert json.loads((result.out / "config.json").read_text())["dtype"] == dtype
    assert load(result.out, device="cpu").dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def test_a_16_bit_base_stays_bit_identical_where_it_was_not_trained(
    adapter_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = save_tiny("llava", tmp_path / "half", dtype=torch.bfloat16)
    result = export(adapter_folder("llava", "lora"), tmp_path / "out", base=base, device="cpu")
    assert result.dtype == "bfloat16" and result.counts["cast"] == 0
    before, after = load_file(base / "model.safetensors"), load_file(result.out / "model.safetensors")
    assert sum(torch.equal(before[name], after[name]) for name in before) == result.counts["unchanged"]


def test_a_full_checkpoint_is_copied_and_cast(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    same = export(tiny_folder("qwen3_vl"), tmp_path / "same", device="cpu")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder("qwen3_vl"), same.out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [one.difference for one in same.comparisons] == [0, 0]
    cast = export(tiny_folder("qwen3_vl"), tmp_path / "cast", dtype="bfloat16", device="cpu")
    halved = load_file(cast.out / "model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), halved[name]) for name in before)


def test_an_unusual_adapter_is_merged_as_a_whole(
    adapter_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise merge.NotStreamable("of a test")

    streamed = export(adapter_folder("internvl", "rslora"), tmp_path / "streamed", device="cpu")
    monkeypatch.setattr(write, "plan_merge", refuse)
    whole = export(adapter_folder("internvl", "rslora"), tmp_path / "whole", device="cpu")
    assert whole.whole_model == "of a test"
    a, b = (load_file(folder / "model.safetensors") for folder in (streamed.out, whole.out))
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_difference_is_an_error_and_nothing_is_left(
    adapter_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge.Merge.apply

    def wrong(self: merge.Merge, name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = right(self, name, tensor)
        return tensor.float() if name.endswith("layers.1.mlp.down_proj.weight") else found

    monkeypatch.setattr(merge.Merge, "apply", wrong)
    with pytest.raises(ExportError, match="not the trained one") as caught:
        export(adapter_folder("llava", "lora"), tmp_path / "out", device="cpu")
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    adapter_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.shards, "write_shards", full)
    with pytest.raises(ExportError, match=r"No space left on device.*Nothing was left behind"):
        export(adapter_folder("llava", "lora"), tmp_path / "out", device="cpu")
    monkeypatch.setattr(write, "free_bytes", lambda _: 1000)
    with pytest.raises(ExportError, match="GB are free"):
        export(adapter_folder("llava", "lora"), tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_cannot_hold_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llava"), tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"norm\.weight has values that float16 cannot hold"):
        export(folder, tmp_path / "out", dtype="float16", device="cpu")
    assert not (tmp_path / "out").exists()


def test_output_folders_in_use_are_refused(exported: Path, adapter_folder: Callable[[str, str], Path]) -> None:
    adapter = adapter_folder("internvl", "lora")
    with pytest.raises(UsageError, match="not empty"):
        export(adapter, exported, device="cpu")
    with pytest.raises(UsageError, match="is in this folder"):
        export(adapter, adapter, device="cpu")
    (exported / "export.json").unlink()
    with pytest.raises(UsageError, match="replaces earlier exports only"):
        export(adapter, exported, overwrite=True, device="cpu")


def test_overwrite_replaces_an_earlier_export(exported: Path, adapter_folder: Callable[[str, str], Path]) -> None:
    (exported / "stale.txt").write_text("")
    before = (exported / "model.safetensors").read_bytes()
    export(adapter_folder("internvl", "lora"), exported, overwrite=True, device="cpu")
    assert not (exported / "stale.txt").exists()
    assert (exported / "model.safetensors").read_bytes() != before
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_an_unknown_layout_and_a_moved_base(adapter_folder: Callable[[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layout 'official'"):
        export(adapter_folder("llava", "lora"), tmp_path / "out", layout="official")
    adapter = shutil.copytree(adapter_folder("llava", "lora"), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    with pytest.raises(WeightsError, match="--base DIR"):
        export(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("internvl", {"max_tiles": 2}),
        ("qwen2_5_vl", {"max_pixels": 56 * 56 * 2}),
        ("qwen2_5_vl", {"min_pixels": 100 * 100}),
        ("xcomposer2", {"size": 42}),
        ("xcomposer2-4khd-native", {"max_tiles": 6}),
    ],
)
def test_pictures_are_cut_as_in_training(
    kind: str, image: dict[str, int], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The options of the run must hold for whoever loads the folder, without the run's YAML."""
    folder = shutil.copytree(tiny_folder(kind), tmp_path / "checkpoint")
    provenance = {"config": {"model": {"path": "x", "image": image}}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    sizes = [(40, 40), (300, 100), (100, 500), (640, 480)]
    trained = load(folder, device="cpu").opened
    plain = open_folder(export(folder, tmp_path / "out", device="cpu").out)
    before, after = (opened.family.plan(sizes, opened.spec) for opened in (trained, plain))
    assert before == after
    untouched = open_folder(tiny_folder(kind))
    assert before != untouched.family.plan(sizes, untouched.spec)


def test_the_package_itself_can_be_called(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    result = vlmtune.export(tiny_folder("llava"), tmp_path / "out", device="cpu")
    assert vlmtune.load(result.out, device="cpu").located.path == tmp_path / "out"


def test_importing_vlmtune_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vlmtune; print({'torch', 'transformers', 'pydantic'} & set(sys.modules), callable(vlmtune.train))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "True"]


@pytest.mark.parametrize(("asked", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_fully_tuned_checkpoint_leaves_in_the_dtype_of_its_base(
    asked: Any, expected: torch.dtype, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Full tuning keeps float32 master weights; a bfloat16 base should not come back twice as large."""
    folder = shutil.copytree(tiny_folder("internvl"), tmp_path / "checkpoint")
    provenance = {"config": {"model": {"path": "x"}}, "base_dtype": "bfloat16"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    result = export(folder, tmp_path / "out", dtype=asked, device="cpu")
    assert {tensor.dtype for tensor in load_file(result.out / "model.safetensors").values()} == {expected}
    assert json.loads((result.out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
