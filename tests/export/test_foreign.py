"""Checkpoints of other trainers through `vlmtune export`: what is written, what is refused, what is left behind.

Merged numbers, logits and gradients are compared with the official code's in
tests/families/test_golden_internvl_lora.py; DeepSpeed's own files in tests/distributed/test_zero_checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import official_folder
from safetensors.torch import load_file, save_file

from vlmtune.cli.main import main
from vlmtune.errors import ExportError, UsageError, WeightsError
from vlmtune.export import foreign
from vlmtune.export.write import ExportResult, export
from vlmtune.infer.locate import locate
from vlmtune.models.load import open_folder

Weights = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_folder("internlm2", tmp_path_factory.mktemp("base") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def before(base: Path) -> Weights:
    return load_file(base / "model.safetensors")


def trained(before: Weights, *starts: str) -> dict[str, torch.Tensor]:
    """Float32 weights near those of the base, for names that start so."""
    torch.manual_seed(1)
    return {n: v.float() + 0.01 * torch.randn(v.shape) for n, v in before.items() if n.startswith(starts)}


def lora(before: Weights, *ends: str, rank: int = 4) -> dict[str, torch.Tensor]:
    """Updates of the layers whose names end so, by the official names of their halves."""
    torch.manual_seed(2)
    found = {}
    for name, weight in before.items():
        if name.endswith(tuple(f"{end}.weight" for end in ends)):
            layer = name.removesuffix(".weight")
            for tower in ("language_model", "vision_model"):
                layer = layer.replace(f"{tower}.", f"{tower}.base_model.model.", 1)
            found[f"{layer}.lora_A.default.weight"] = 0.1 * torch.randn(rank, weight.shape[1])
            found[f"{layer}.lora_B.default.weight"] = 0.1 * torch.randn(weight.shape[0], rank)
    return found


def xtuner(tensors: Weights, file: Path, **meta: Any) -> Path:
    torch.save({"state_dict": {f"model.{name}": value for name, value in tensors.items()}, "meta": meta}, file)
    return file


def run(path: Path, out: Path, **more: Any) -> tuple[ExportResult, dict[str, torch.Tensor]]:
    """An export without the comparison of logits, and its weights; nothing but it may lie in its place afterwards."""
    result = export(path, out / "exported", **{"verify": "none", "layout": "official", **more})
    assert [child.name for child in out.iterdir()] == ["exported"]
    return result, load_file(out / "exported" / "model.safetensors")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_full_tuning_takes_the_place_of_the_base(
    base: Path, before: Weights, tmp_path: Path, out: Path, dtype: str | None
) -> None:
    own = trained(before, "language_model.", "mlp1.")
    result, after = run(xtuner(own, tmp_path / "iter_5.pth"), out, base=base, dtype=dtype)
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    for name, value in after.items():
        expected = own.get(name, before[name])
        assert torch.equal(value, expected if dtype else expected.bfloat16()), name
    rest = len(before) - len(own)
    assert result.counts == {
        "unchanged": 0 if dtype else rest, "merged": 0, "replaced": len(own), "cast": rest if dtype else 0,
    }  # fmt: skip
    record = json.loads((out / "exported" / "export.json").read_text())
    assert record["source"] == str(tmp_path / "iter_5.pth") and record["base"] == str(base)
    assert sorted(file.name for file in base.iterdir() if file.name != "README.md") == sorted(
        file.name for file in (out / "exported").iterdir() if file.name not in ("README.md", "export.json")
    )


def test_updates_beside_tensors_in_full(base: Path, before: Weights, tmp_path: Path, out: Path) -> None:
    """LoRA, and an embedding and a part of the projector that fit into no adapter."""
    own = trained(before, "language_model.model.tok_embeddings", "mlp1.1.")
    halves = lora(before, "attention.wqkv", "attn.qkv", rank=2)
    text = "model = dict(type='xtuner.X', llm_lora=dict(lora_alpha=6), visual_encoder_lora=dict(lora_alpha=3))"
    file = xtuner({**own, **halves}, tmp_path / "iter_5.pth", cfg=text)
    result, after = run(file, out, base=base, dtype="float32", verify="full", device="cpu")
    changed = dict(own)
    for name, a in halves.items():
        if ".lora_A." in name:
            layer = name.replace("base_model.model.", "").removesuffix(".lora_A.default.weight")
            scale = (6 if layer.startswith("language") else 3) / 2
            update = scale * halves[name.replace("lora_A", "lora_B")] @ a
            changed[f"{layer}.weight"] = before[f"{layer}.weight"].float() + update
    for name, value in after.items():
        torch.testing.assert_close(value, changed.get(name, before[name].float()), atol=1e-6, rtol=0)
    assert result.counts["merged"] == 4 and result.counts["replaced"] == len(own)
    assert len(result.comparisons) == 2 and all(one.holds for one in result.comparisons)
    assert any("XTuner trains with a prompt of its own" in note for note in result.notes)


def save_deepspeed(tensors: Weights, folder: Path, **more: Any) -> Path:
    """One rank of ZeRO-2 with everything trained."""
    folder.mkdir(parents=True)
    shapes = {name: value.shape for name, value in tensors.items()}
    state = {"module": {name: value.bfloat16() for name, value in tensors.items()}, "param_shapes": [shapes], **more}
    torch.save({"buffer_names": [], "shared_params": {}, **state}, folder / "mp_rank_00_model_states.pt")
    flat = torch.cat([value.flatten() for value in tensors.values()])
    held = {"zero_stage": 2, "partition_count": [1], "single_partition_of_fp32_groups": [flat]}
    torch.save({"optimizer_state_dict": held}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_a_folder_of_deepspeed_with_a_configuration_needs_no_base(
    base: Path, before: Weights, tmp_path: Path, out: Path
) -> None:
    """checkpoint-5 as the official trainer leaves it: the small files, `latest`, and global_step5."""
    own = trained(before, "")
    folder = tmp_path / "checkpoint-5"
    save_deepspeed(own, folder / "global_step5")
    (folder / "latest").write_text("global_step5")
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    for path in (folder, folder / "global_step5"):
        result, after = run(path, out)
        assert result.dtype == "bfloat16" and set(after) == set(before)
        assert all(torch.equal(value, own[name].bfloat16()) for name, value in after.items())
        shutil.rmtree(out / "exported")


def test_a_folder_of_deepspeed_as_mmengine_names_it(base: Path, before: Weights, tmp_path: Path, out: Path) -> None:
    """iter_5.pth is a directory here, and the updates' strength is in the configuration that it holds as text."""
    halves = {f"model.{name}": value for name, value in lora(before, "feed_forward.w1").items()}
    folder = save_deepspeed(halves, tmp_path / "iter_5.pth", meta={"cfg": "llm_lora = dict(lora_alpha=2, r=4)"})
    result, after = run(folder, out, base=base)
    assert result.counts["merged"] == 2 and set(after) == set(before)
    name = "language_model.model.layers.1.feed_forward.w1"
    at = "model.language_model.base_model.model.model.layers.1.feed_forward.w1"
    update = 0.5 * halves[f"{at}.lora_B.default.weight"] @ halves[f"{at}.lora_A.default.weight"]
    torch.testing.assert_close(after[f"{name}.weight"], (before[f"{name}.weight"].float() + update).bfloat16())
    with pytest.raises(UsageError, match=r"holds no config\.json and no tokenizer.*--base DIR"):
        export(folder, tmp_path / "x")


@pytest.fixture
def unmerged(base: Path, before: Weights, tmp_path: Path) -> Path:
    """A checkpoint of the official trainer with LoRA of rank 4 in both towers."""
    folder = tmp_path / "unmerged"
    shutil.copytree(base, folder)
    halves = lora(before, "attention.wo", "attn.qkv")
    layers = {name.removesuffix(".lora_A.default.weight") for name in halves if ".lora_A." in name}
    named = {}
    for name, value in before.items():
        for tower in ("language_model", "vision_model"):
            name = name.replace(f"{tower}.", f"{tower}.base_model.model.", 1)
        layer, _, kind = name.rpartition(".")
        named[f"{layer}.base_layer.{kind}" if layer in layers else name] = value
    save_file({**named, **halves}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_llm_lora": 4, "use_backbone_lora": 4}))
    return folder


def test_an_unmerged_folder_becomes_a_plain_one(unmerged: Path, before: Weights, out: Path) -> None:
    result, after = run(unmerged, out)
    assert set(after) == set(before)
    assert result.counts["merged"] == 4 and result.counts["unchanged"] == len(before) - 4 and result.base is None
    config = json.loads((out / "exported" / "config.json").read_text())
    assert (config["use_llm_lora"], config["use_backbone_lora"]) == (0, 0)
    assert json.loads((unmerged / "config.json").read_text())["use_llm_lora"] == 4
    inside = load_file(unmerged / "model.safetensors")
    at = "vision_model.base_model.model.encoder.layers.1.attn.qkv"
    update = 2 * inside[f"{at}.lora_B.default.weight"] @ inside[f"{at}.lora_A.default.weight"]
    name = "vision_model.encoder.layers.1.attn.qkv"
    torch.testing.assert_close(after[f"{name}.weight"], (before[f"{name}.weight"].float() + update).bfloat16())
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])


def test_only_export_reads_them(unmerged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "iter_5.pth").write_bytes(b"")
    for path, words in ((unmerged, "whose LoRA is not merged"), (tmp_path / "iter_5.pth", "a pickled checkpoint")):
        with pytest.raises(UsageError, match=rf"{words}; .*Make a model folder of it first: `vlmtune export"):
            locate(path)
        with pytest.raises(WeightsError, match=rf"model\.path: .*{words}\. Make a model folder of it first"):
            open_folder(path)
        assert main(["info", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_another_base_is_refused_and_nothing_written(base: Path, before: Weights, tmp_path: Path, out: Path) -> None:
    file = xtuner(lora(before, "attention.wqkv"), tmp_path / "iter_5.pth")
    qwen = official_folder("qwen2", tmp_path / "qwen2")
    with pytest.raises(WeightsError, match=r"does not fit the base .*qwen2: 2 have no place there: .*attention\.wqkv"):
        export(file, out / "x", base=qwen, lora_alpha=8)
    wide = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in lora(before, "w1").items()}
    with pytest.raises(WeightsError, match=r"2 are of another shape: .*w1 with lora_A \(4, 128\)"):
        export(xtuner(wide, file), out / "x", base=base, lora_alpha=8)
    native = export(base, tmp_path / "native", layout="native", verify="none").out
    with pytest.raises(UsageError, match="the base is of the layout native; expected an official folder"):
        export(file, out / "x", base=native, lora_alpha=8)
    assert not any(out.iterdir())


def test_options_without_a_use_are_refused(base: Path, unmerged: Path, tmp_path: Path, out: Path) -> None:
    pickled = tmp_path / "iter_5.pth"
    torch.save({"model.mlp1.0.bias": torch.ones(256)}, pickled)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (pickled, {}, r"does not hold the model that it was trained on\. Point to .*--base DIR"),
        (pickled, {"base": tmp_path}, "no config.json in the folder given with --base"),
        (pickled, {"base": base, "second_adapter": unmerged}, "--second-adapter: was given, but this is no adapter"),
        (unmerged, {"base": base}, "--base was given, but this checkpoint holds the whole model"),
        (unmerged, {"lora_alpha": 8}, r"--lora-alpha: was given, but config\.json says it"),
        (base, {"lora_alpha": 8}, "--lora-alpha: was given, but only checkpoints of other trainers need it"),
    ]
    for path, options, message in cases:
        with pytest.raises(UsageError, match=message):
            export(path, out / "x", **options)
    assert not any(out.iterdir())


def test_a_full_disk_is_said_before(
    base: Path, before: Weights, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = xtuner(trained(before, "language_model."), tmp_path / "iter_5.pth")
    monkeypatch.setattr(foreign, "free_bytes", lambda path: 1000)
    with pytest.raises(ExportError, match=r"takes 0\.0 GB for the time of the export, and 0\.0 GB are free"):
        export(file, out / "x", base=base)
    assert not any(out.iterdir())


def test_the_command(base: Path, before: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = xtuner(lora(before, "output"), tmp_path / "iter_5.pth")
    arguments = ["export", str(file), "-o", str(tmp_path / "out"), "--base", str(base), "--verify", "none"]
    assert main(arguments) == 2
    assert "--lora-alpha N" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*arguments, "--lora-alpha", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"{file} merged into {base}" in printed and "1 merged" in printed and "layout official" in printed
