"""Two processes give the losses of one, whatever the strategy; one of them may have no picture at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import start
from official_models import official_folder
from ranks import on_two_ranks
from rows import write_embedding
from runs import eval_losses, losses, make_config, write_rows, write_yaml
from safetensors.torch import load_file
from wide import save_wide

from vlmtune.config.load import load_config
from vlmtune.train.run import train

ENTRY = Path(__file__).with_name("entry.py")
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4, "targets": ["language", "vision"], "train": ["projector"]},
}
WRAPPERS = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("internvl")


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More text than pictures: in every step some rank has micro batches without a picture."""
    return write_rows(tmp_path_factory.mktemp("rows"), num=12, text_only=8)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The same; a third of the rows, one with a picture among them, have pseudo-text."""
    file = write_rows(tmp_path_factory.mktemp("rows"), num=12, text_only=8)
    length = json.loads((model / "config.json").read_text())["text_config"]["hidden_size"]
    write_embedding(file.parent / "page.pt", 3, length)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for row in (found[1], found[5], found[6], found[11]):
        row["embedding"] = "page.pt"
        row["conversations"][0]["value"] += " <embedding>"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("eval_rows"), num=5, text_only=3, seed=1)


def _sections(eval_rows: Path, tuning: str, **train: Any) -> dict[str, Any]:
    # A large epsilon keeps AdamW from blowing rounding errors of tiny gradients up to whole steps.
    section = {"global_batch_size": 4, "epochs": 2, "extra": {"adam_epsilon": 1e-3}, **train}
    data = {"eval": {"path": str(eval_rows)}, "packing": False}
    return {"tuning": TUNINGS[tuning], "train": section, "data": data}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path, eval_rows: Path) -> dict[str, Path]:
    """The run folder of one process, by tuning."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: train(make_config(folder / name, model, rows, **_sections(eval_rows, name))).run_dir for name in TUNINGS
    }


def two_processes(cases: list[dict[str, Any]], folder: Path) -> str:
    return on_two_ranks(ENTRY, cases, folder)


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / "checkpoint-6").glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path, eval_rows: Path) -> Path:
    """All strategies and tunings, each stopped after step 3 by a signal to one rank and started again."""
    folder = tmp_path_factory.mktemp("together")
    # Apart, because DeepSpeed leaves traces in the environment of its process that FSDP trips over.
    for strategies in (["ddp", "zero2", "zero3"], ["fsdp2"]):
        cases = []
        for strategy in strategies:
            for tuning in TUNINGS:
                sections = _sections(eval_rows, tuning, strategy=strategy)
                yaml = write_yaml(folder / strategy / tuning, model, rows, sections)
                cases.append({"config": str(yaml), "wrapper": WRAPPERS[strategy], "stop_at": 3})
        output = two_processes(cases, folder)
        assert output.count("Going on from checkpoint-3.") == len(cases), output[-3000:]
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tuning", sorted(TUNINGS))
@pytest.mark.parametrize("strategy", sorted(WRAPPERS))
def test_two_processes_train_like_one(together: Path, alone: dict[str, Path], strategy: str, tuning: str) -> None:
    run_dir = together / strategy / tuning / "run"
    assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(losses(run_dir), losses(alone[tuning]), strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
    for mine, theirs in zip(eval_losses(run_dir), eval_losses(alone[tuning]), strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
    ours, reference = _weights(run_dir), _weights(alone[tuning])
    assert ours.keys() == reference.keys()  # plain names, whatever wrapped the model
    for name, tensor in reference.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.timeout(600)
def test_features_of_later_layers_and_several_position_axes(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, eval_rows: Path
) -> None:
    """Qwen3-VL feeds pictures into later layers as well, and its positions come from a model of its own."""
    model = tiny_folder("qwen3_vl")
    one = train(make_config(tmp_path / "one", model, rows, **_sections(eval_rows, "full"))).run_dir
    cases = []
    for strategy in ("zero2", "zero3"):
        yaml = write_yaml(tmp_path / strategy, model, rows, _sections(eval_rows, "full", strategy=strategy))
        cases.append({"config": str(yaml), "wrapper": WRAPPERS[strategy], "stop_at": 0})
    two_processes(cases, tmp_path)
    for strategy in ("zero2", "zero3"):
        for mine, theirs in zip(losses(tmp_path / strategy / "run"), losses(one), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


@pytest.mark.timeout(600)
def test_official_folders_train_like_one_process(tmp_path: Path, plain_rows: Path, eval_rows: Path) -> None:
    """ZeRO-1, as the scripts of InternVL and XTuner have it; ZeRO-3, where fused tensors are split and spread; and DDP
    with checkpointing, which waits for the tower where a micro batch has no picture."""
    model = official_folder("internlm2", tmp_path / "model")
    cases, runs = [], {}
    for strategy, tuning in (("ddp", "full"), ("zero1", "lora"), ("zero3", "full")):
        wrapper = WRAPPERS["ddp" if strategy == "ddp" else "zero2"]
        sections = _sections(eval_rows, tuning, activation_checkpointing=strategy == "ddp")
        sections["data"]["max_length"] = 1024
        one = train(make_config(tmp_path / "one" / strategy, model, plain_rows, **sections)).run_dir
        sections["train"]["strategy"] = strategy
        yaml = write_yaml(tmp_path / strategy, model, plain_rows, sections)
        cases.append({"config": str(yaml), "wrapper": wrapper, "stop_at": 3 if strategy == "zero3" else 0})
        runs[yaml.parent / "run"] = one
    two_processes(cases, tmp_path)
    for run, one in runs.items():
        for mine, theirs in zip(losses(run) + eval_losses(run), losses(one) + eval_losses(one), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
        for name, tensor in _weights(one).items():
            torch.testing.assert_close(_weights(run)[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{run} {name}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategies", [("ddp", "zero3"), ("fsdp2",)], ids="-".join)
def test_partial_lora_where_a_rank_has_text_alone(
    tmp_path: Path, tiny_folder: Callable[[str], Path], strategies: tuple[str, ...]
) -> None:
    """A layer for visual tokens runs on every rank, on nothing where there are none, and forwards and backwards equally
    often: with one picture among four rows some rank has none in every step."""
    model = tiny_folder("xcomposer2-4khd")
    rows = write_rows(tmp_path / "rows", num=12, text_only=9)
    data = {"packing": False, "max_length": 1024}
    train_section = {"global_batch_size": 4, "extra": {"adam_epsilon": 1e-3}}
    sections: dict[str, Any] = {"tuning": {"method": "full"}, "train": train_section, "data": data}
    one = train(make_config(tmp_path / "one", model, rows, **sections)).run_dir
    cases = []
    for strategy in strategies:
        sections["train"] = {**train_section, "strategy": strategy, "activation_checkpointing": True}
        yaml = write_yaml(tmp_path / strategy, model, rows, sections)
        cases.append({"config": str(yaml), "wrapper": WRAPPERS[strategy], "stop_at": 0})
    two_processes(cases, tmp_path)
    (file,) = (one / "checkpoint-3").glob("*model.safetensors")
    for strategy in strategies:
        run = tmp_path / strategy / "run"
        assert len(losses(run)) == 3
        for mine, theirs in zip(losses(run), losses(one), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5), strategy
        found = load_file(run / "checkpoint-3" / "model.safetensors")
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{strategy} {name}")


@pytest.mark.timeout(600)
def test_merged_pictures_of_unequal_shapes(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, eval_rows: Path
) -> None:
    """Each picture keeps its shape, so that ranks lay rows of unequal lengths end to end, and some lay none."""
    model = tiny_folder("llava-merged")
    sections = {**_sections(eval_rows, "full"), "model": {"image": {"fit": "keep_aspect"}}}
    one = train(load_config(write_yaml(tmp_path / "one", model, rows, sections))).run_dir
    cases = []
    for strategy in ("ddp", "zero3"):
        sections["train"] = {**sections["train"], "strategy": strategy}
        yaml = write_yaml(tmp_path / strategy, model, rows, sections)
        cases.append({"config": str(yaml), "wrapper": WRAPPERS[strategy], "stop_at": 0})
    two_processes(cases, tmp_path)
    for strategy in ("ddp", "zero3"):
        run_dir = tmp_path / strategy / "run"
        for mine, theirs in zip(losses(run_dir) + eval_losses(run_dir), losses(one) + eval_losses(one), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
        for name, tensor in _weights(one).items():
            torch.testing.assert_close(_weights(run_dir)[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{strategy} {name}")


def test_four_bits_with_ddp(tmp_path: Path, plain_rows: Path, eval_rows: Path) -> None:
    model = save_wide("internvl", tmp_path / "model")
    tuning = {"method": "qlora", "rank": 4, "targets": ["language", "vision"], "train": ["projector"]}
    sections = {**_sections(eval_rows, "lora"), "tuning": tuning}
    one = train(make_config(tmp_path / "one", model, plain_rows, **sections)).run_dir
    yaml = write_yaml(tmp_path / "two", model, plain_rows, sections)
    two_processes([{"config": str(yaml), "wrapper": WRAPPERS["ddp"], "stop_at": 3}], tmp_path)
    two = tmp_path / "two" / "run"
    for mine, theirs in zip(losses(two) + eval_losses(two), losses(one) + eval_losses(one), strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
    for name, tensor in _weights(one).items():
        torch.testing.assert_close(_weights(two)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_run_of_one_process_goes_on_with_two(
    tmp_path: Path, model: Path, rows: Path, eval_rows: Path, alone: dict[str, Path]
) -> None:
    """The order of samples does not depend on the number of processes."""
    yaml = write_yaml(tmp_path, model, rows, _sections(eval_rows, "full", save_every=2))
    assert start(yaml, 5, int(signal.SIGKILL)).returncode < 0
    output = two_processes([{"config": str(yaml), "wrapper": WRAPPERS["ddp"], "stop_at": 0}], tmp_path)
    assert "Going on from checkpoint-4." in output
    for mine, theirs in zip(losses(tmp_path / "run"), losses(alone["full"]), strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


def test_command_starts_its_processes_and_keeps_the_exit_code(tmp_path: Path, model: Path, rows: Path) -> None:
    """Two ranks by NPROC_PER_NODE; a mistake that only a rank finds is one paragraph and its own exit code."""
    yaml = write_yaml(tmp_path, model, rows, {"train": {"global_batch_size": 3}, "data": {"packing": False}})
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}
    command = [sys.executable, "-c", "from vlmtune.cli.main import entry; entry()", "train", str(yaml)]
    refused = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "train.global_batch_size" in refused.stderr and "Traceback" not in refused.stderr
    trained = subprocess.run(
        [*command, "train.global_batch_size=4"], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("step      3") == 1  # the first rank speaks, the other does not
    assert "devices" in trained.stdout and "Next: vlmtune" in trained.stdout
