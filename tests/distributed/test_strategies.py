"""Two processes give the losses of one, whatever the strategy; one of them may have no picture at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import eval_losses, losses, make_config, write_rows, write_yaml
from safetensors.torch import load_file

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
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More text than pictures: in every step some rank has micro batches without a picture."""
    return write_rows(tmp_path_factory.mktemp("rows"), num=12, text_only=8)


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


def two_processes(cases: list[dict[str, str]], folder: Path, *, timeout: float = 240) -> str:
    """Runs the cases on two ranks; the output of both. Never hangs: all are killed after `timeout` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    code = "import sys; from vlmtune.cli import launch\nsys.exit(launch.start(2, [sys.argv[2]], entry=[sys.argv[1]]))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ENTRY), str(folder / "cases.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output[-3000:]}")
    assert process.returncode == 0, output[-5000:]
    return output


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / "checkpoint-6").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_train_like_one(
    tmp_path: Path, model: Path, rows: Path, eval_rows: Path, alone: dict[str, Path], strategy: str
) -> None:
    cases = []
    for tuning in TUNINGS:
        sections = _sections(eval_rows, tuning, strategy=strategy)
        yaml = write_yaml(tmp_path / tuning, model, rows, sections)
        cases.append({"config": str(yaml), "wrapper": WRAPPERS[strategy]})
    began = time.monotonic()
    two_processes(cases, tmp_path)
    print(f"{strategy}: {time.monotonic() - began:.0f} s")
    for tuning in TUNINGS:
        run_dir = tmp_path / tuning / "run"
        assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]
        for mine, theirs in zip(losses(run_dir), losses(alone[tuning]), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5), tuning
        for mine, theirs in zip(eval_losses(run_dir), eval_losses(alone[tuning]), strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5), tuning
        ours, reference = _weights(run_dir), _weights(alone[tuning])
        assert ours.keys() == reference.keys(), tuning  # plain names, whatever wrapped the model
        for name, tensor in reference.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{tuning} {name}")
