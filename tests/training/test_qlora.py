"""QLoRA from the YAML to the export: 4-bit layers while it trains, the exact base everywhere else."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import start
from runs import eval_losses, losses, make_config, write_yaml
from safetensors.torch import load_file
from wide import save_wide

from vlmtune.cli.main import main
from vlmtune.config.load import load_config
from vlmtune.errors import ConfigError
from vlmtune.export import verify
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.train import run
from vlmtune.train.run import TrainResult, train
from vlmtune.train.trainer import VlmTrainer
from vlmtune.tuning import quantised

QLORA: dict[str, Any] = {"method": "qlora", "rank": 4, "train": ["projector"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide("internvl", tmp_path_factory.mktemp("wide") / "internvl")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that is trained, with a copy of its weights from before."""
    seen: list[Any] = []

    class Trainer(VlmTrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            seen.append((model, before))
            super().__init__(model, *args, **kwargs)

    monkeypatch.setattr(run, "VlmTrainer", Trainer)
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path, eval_rows: Path) -> TrainResult:
    torch.set_num_threads(1)
    train_section = {"epochs": 4, "learning_rate": 5e-3, "eval_every": 6}
    data = {"eval": {"path": str(eval_rows)}}
    folder = tmp_path_factory.mktemp("qlora")
    return train(make_config(folder, model, rows, tuning=QLORA, train=train_section, data=data))


def test_the_loss_falls(trained: TrainResult) -> None:
    found = [loss for _, loss in losses(trained.run_dir)]
    assert sum(found[-3:]) < sum(found[:3]) - 1.0
    assert [step for step, _ in eval_losses(trained.run_dir)] == [6, 12]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_adapters_and_named_components_change(
    tmp_path: Path, model: Path, rows: Path, models: list[Any], precision: str
) -> None:
    train(make_config(tmp_path, model, rows, tuning=QLORA, train={"precision": precision}))
    ((trained_model, before),) = models
    four_bit = quantised.four_bit_names(trained_model)
    assert len(four_bit) == 14 and all(".language_model.layers." in name for name in four_bit)
    changed = {name for name, value in trained_model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name or ".modules_to_save." in name}
    layer = trained_model.get_submodule(min(four_bit))
    assert layer.compute_dtype == {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def test_evaluations_do_not_touch_the_training(
    tmp_path: Path, model: Path, rows: Path, eval_rows: Path, trained: TrainResult
) -> None:
    sections = {"tuning": QLORA, "data": {"eval": {"path": str(eval_rows)}}}
    often = make_config(
        tmp_path, model, rows, **sections, train={"epochs": 4, "learning_rate": 5e-3, "eval_every": 1, "save_every": 6}
    )
    assert losses(train(often).run_dir) == losses(trained.run_dir)


def test_activation_checkpointing_gives_the_same_losses(tmp_path: Path, model: Path, rows: Path) -> None:
    found = []
    for on in (False, True):
        config = make_config(tmp_path / str(on), model, rows, tuning=QLORA, train={"activation_checkpointing": on})
        found.append([loss for _, loss in losses(train(config).run_dir)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_killed_run_goes_on_bit_by_bit(tmp_path: Path, model: Path, rows: Path, eval_rows: Path) -> None:
    sections = {
        "tuning": {**QLORA, "dropout": 0.1},
        "train": {"epochs": 3, "save_every": 2, "eval_every": 2},
        "data": {"eval": {"path": str(eval_rows)}},
    }
    whole, broken = (write_yaml(tmp_path / name, model, rows, sections) for name in ("whole", "broken"))
    assert start(whole).returncode == 0
    assert start(broken, 6, int(signal.SIGKILL)).returncode == -signal.SIGKILL
    again = start(broken)
    assert again.returncode == 0, again.stderr
    assert "Going on from checkpoint-4." in again.stdout
    runs = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    assert losses(runs[0]) == losses(runs[1]) and eval_losses(runs[0]) == eval_losses(runs[1])
    one, two = (load_file(folder / "checkpoint-9" / "adapter_model.safetensors") for folder in runs)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_is_a_plain_adapter_on_the_exact_base(trained: TrainResult, model: Path) -> None:
    config = json.loads((trained.best / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    kept = load_file(trained.best / "adapter_model.safetensors")
    assert all(".lora_" in name or "multi_modal_projector" in name for name in kept)
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    for file in trained.best.glob("*.json"):
        assert file.name == "provenance.json" or "4bit" not in file.read_text().lower()
    assert json.loads((trained.best / "provenance.json").read_text())["versions"]["bitsandbytes"]


def test_others_load_it_without_4_bits(trained: TrainResult, model: Path) -> None:
    """Plain PEFT and our session agree, and neither has a 4-bit layer."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    session = load(trained.run_dir, device="cpu")
    assert not quantised.four_bit_names(session.model)
    base = AutoModelForImageTextToText.from_pretrained(model)
    plain = PeftModel.from_pretrained(base, trained.best).eval()
    assert not quantised.four_bit_names(plain)
    for prompt, ours in zip(verify.fixed_prompts(), session.logits(verify.fixed_prompts()), strict=True):
        with torch.inference_mode():
            theirs = plain(**session.inputs([session.encode(prompt)]), use_cache=False).logits[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_export_is_the_exact_base_and_tells_the_gap(
    trained: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained.run_dir), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    gap = record["gap_to_the_4bit_model"]
    assert gap["skipped"] is None and set(gap["differences"]) == {"text prompt", "picture prompt"}
    assert f"{gap['differences']['text prompt']:.2g} on a text prompt" in out and "for information" in out
    assert all(one["difference"] <= 2e-4 and one["holds"] for one in record["compared"])
    assert "- Method: QLoRA, rank 4" in (tmp_path / "out" / "README.md").read_text()

    prompts = verify.fixed_prompts()
    exact, plain = load(trained.run_dir, device="cpu"), load(tmp_path / "out", device="cpu")
    for before, after in zip(exact.logits(prompts), plain.logits(prompts), strict=True):
        torch.testing.assert_close(after, before, atol=2e-4, rtol=0)
    assert min(gap["differences"].values()) > 100 * 2e-4  # so the 4-bit model cannot be what was exported


def test_the_gap_is_that_of_the_model_that_was_trained(
    trained: TrainResult, tmp_path: Path, model: Path, rows: Path, models: list[Any]
) -> None:
    """Against the logits of the trainer's own model after its last step."""
    result = train(make_config(tmp_path, model, rows, tuning=QLORA, train={"learning_rate": 5e-3}))
    exact = load(result.run_dir, device="cpu")
    told = export(result.run_dir, tmp_path / "out", device="cpu").gap
    assert told is not None
    ((trained_model, _),) = models
    for prompt, logits in zip(verify.fixed_prompts(), exact.logits(verify.fixed_prompts()), strict=True):
        inputs = exact.inputs([exact.encode(prompt)])
        with torch.no_grad():
            theirs = trained_model.eval()(**inputs, use_cache=False).logits[0]
        assert told.differences[prompt.origin] == pytest.approx(float((theirs - logits).abs().max()), rel=1e-3)


def test_export_without_bitsandbytes_says_why_there_is_no_gap(
    trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantised, "is_installed", lambda: False)
    assert main(["export", str(trained.run_dir), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "not measured (bitsandbytes is not installed)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["gap_to_the_4bit_model"] == {"differences": {}, "skipped": "bitsandbytes is not installed"}
    assert all(one["holds"] for one in record["compared"])
    unchecked = export(trained.run_dir, tmp_path / "unchecked", verify="none", device="cpu")
    assert unchecked.gap is not None and unchecked.gap.skipped == "--verify none"


def test_without_bitsandbytes_a_run_is_refused_before_it_reads_anything(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    with pytest.raises(
        ConfigError, match=r'tuning.method: qlora needs bitsandbytes. Run: pip install "vlmtune\[qlora\]"'
    ):
        train(make_config(tmp_path, model, rows, tuning=QLORA))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_sharding_is_refused(tmp_path: Path, model: Path, rows: Path, strategy: str) -> None:
    yaml = write_yaml(tmp_path, model, rows, {"tuning": QLORA, "train": {"strategy": strategy}})
    with pytest.raises(ConfigError, match=f"qlora does not go with train.strategy {strategy}") as caught:
        load_config(yaml)
    assert caught.value.exit_code == 2
