"""Killed at any step, started again: the same losses to the last bit, and no row read twice."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import start
from runs import eval_losses, losses, write_yaml
from safetensors.torch import load_file

from vlmtune.config.load import load_config
from vlmtune.errors import RunFolderError, WeightsError
from vlmtune.train import checkpoint, folder, run
from vlmtune.train.run import train

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4, "dropout": 0.2, "targets": ["language", "vision"], "train": ["projector"]},
}


def _weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / f"checkpoint-{step}").glob("*model.safetensors")
    return load_file(file)


def _yaml(at: Path, model: Path, rows: Path, eval_rows: Path, **sections: Mapping[str, Any]) -> Path:
    train = {"epochs": 3, "global_batch_size": 4, "save_every": 2, "eval_every": 2, **sections.pop("train", {})}
    return write_yaml(at, model, rows, {"data": {"eval": {"path": str(eval_rows)}}, "train": train, **sections})


@pytest.mark.parametrize("name", sorted(TUNINGS))
def test_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, model: Path, rows: Path, eval_rows: Path, name: str
) -> None:
    step = random.SystemRandom().randint(3, 9)
    whole = _yaml(tmp_path / "whole", model, rows, eval_rows, tuning=TUNINGS[name])
    broken = _yaml(tmp_path / "broken", model, rows, eval_rows, tuning=TUNINGS[name])
    first = start(whole)
    assert first.returncode == 0, first.stderr
    killed = start(broken, step, int(signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    again = start(broken)
    assert again.returncode == 0, again.stderr

    runs = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    assert losses(runs[0]) == losses(runs[1]), f"killed at step {step}"  # every bit, no step twice
    assert eval_losses(runs[0]) == eval_losses(runs[1])
    for tensor, value in _weights(runs[0], 9).items():
        assert torch.equal(value, _weights(runs[1], 9)[tensor]), f"killed at step {step}: {tensor}"
    assert (runs[0] / "best.json").read_text() == (runs[1] / "best.json").read_text()
    assert f"Going on from checkpoint-{(step - 1) // 2 * 2}." in again.stdout


def test_steps_counted_in_tokens_go_on_as_if_nothing_had_been(tmp_path: Path, model: Path, rows: Path) -> None:
    """Two packs a step, a repeat that takes other rows in every epoch, killed in the second one."""
    train_section = {"global_batch_size": None, "global_batch_tokens": 512, "epochs": 3, "save_every": 1}
    sections = {"train": train_section, "data": {"sources": {"path": str(rows), "repeat": 1.5}}}
    whole, broken = (write_yaml(tmp_path / name, model, rows, sections) for name in ("whole", "broken"))
    first = start(whole)
    assert first.returncode == 0, first.stderr
    assert "global batch tokens              512" in first.stdout
    steps = len(losses(tmp_path / "whole" / "run"))
    assert steps >= 6
    assert start(broken, steps // 2 + 1, int(signal.SIGKILL)).returncode == -signal.SIGKILL
    again = start(broken)
    assert again.returncode == 0, again.stderr
    assert f"Going on from checkpoint-{steps // 2}." in again.stdout
    assert losses(tmp_path / "whole" / "run") == losses(tmp_path / "broken" / "run")
    assert again.read == list(range(steps // 2 * 2, steps * 2))


def test_resume_reads_only_what_is_left(tmp_path: Path, model: Path, rows: Path) -> None:
    yaml = write_yaml(tmp_path, model, rows, {"train": {"epochs": 3, "save_every": 5}, "data": {"packing": False}})
    assert start(yaml, 7, int(signal.SIGKILL)).returncode == -signal.SIGKILL
    again = start(yaml)
    assert again.read == list(range(5 * 4, 9 * 4))  # 4 micro batches a step, 9 steps, from step 5 on


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_leaves(tmp_path: Path, model: Path, rows: Path, number: int, code: int) -> None:
    yaml = write_yaml(tmp_path, model, rows, {"train": {"epochs": 3}})
    stopped = start(yaml, 4, int(number))
    assert stopped.returncode == code, stopped.stderr
    assert "stopped at step 4 of 9" in stopped.stderr and "Traceback" not in stopped.stderr
    assert [path.name for path in checkpoint.whole(tmp_path / "run")][-1] == "checkpoint-4"
    assert not (tmp_path / "run" / "finished.json").exists()
    again = start(yaml)
    assert again.returncode == 0, again.stderr
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 10))


def test_signal_before_the_first_step_ends_at_once(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large corpus takes long, and nothing is there to be saved."""
    monkeypatch.setattr(run, "prepare", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(load_config(write_yaml(tmp_path, model, rows)))
    finally:
        signal.signal(signal.SIGINT, before)


def test_half_written_checkpoints_are_named_and_removed(tmp_path: Path, model: Path, rows: Path) -> None:
    yaml = write_yaml(tmp_path, model, rows, {"train": {"epochs": 3, "save_every": 2}})
    assert start(yaml, 6, int(signal.SIGKILL)).returncode < 0
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")  # does not fit its manifest any more
    (run_dir / "checkpoint-5").mkdir()
    said: list[str] = []
    train(load_config(yaml), say=said.append)
    assert "Removed checkpoint-4, which was only half written." in said
    assert "Removed checkpoint-5, which was only half written." in said
    assert "Going on from checkpoint-2." in said
    assert [step for step, _ in losses(run_dir)] == list(range(1, 10))


def test_disk_full_is_an_error_that_leaves_the_earlier_checkpoint(tmp_path: Path, model: Path, rows: Path) -> None:
    yaml = write_yaml(tmp_path, model, rows, {"train": {"epochs": 3, "save_every": 2}})
    assert start(yaml, 3, int(signal.SIGKILL)).returncode < 0
    run_dir = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (run_dir / "checkpoint-2" / "optimizer.pt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"could not be written.*whole checkpoints: checkpoint-2"):
            train(load_config(yaml))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in sorted(run_dir.glob("checkpoint-*"))] == ["checkpoint-2"]
    assert checkpoint.is_whole(run_dir / "checkpoint-2")
    train(load_config(yaml))  # and it goes on once there is room
    assert [step for step, _ in losses(run_dir)] == list(range(1, 10))


def test_second_process_is_refused(tmp_path: Path, model: Path, rows: Path) -> None:
    yaml = write_yaml(tmp_path, model, rows)
    with folder.locked(tmp_path / "run"):
        second = start(yaml)
    assert second.returncode == 2
    assert "is in use by process" in second.stderr and not (tmp_path / "run" / "run.yaml").exists()


def test_rotation_keeps_the_latest_and_the_best(tmp_path: Path, model: Path, rows: Path, eval_rows: Path) -> None:
    # A huge rate after a good beginning: the best checkpoint is an early one.
    train_section = {"epochs": 4, "save_every": 1, "keep_checkpoints": 2, "learning_rate": 0.3, "schedule": "linear"}
    yaml = write_yaml(
        tmp_path, model, rows, {"data": {"eval": {"path": str(eval_rows)}}, "train": {**train_section, "eval_every": 1}}
    )
    result = train(load_config(yaml))
    best = min(eval_losses(result.run_dir), key=lambda pair: pair[1])
    assert result.best.name == f"checkpoint-{best[0]}"
    kept = [checkpoint.step_of(path) for path in checkpoint.whole(result.run_dir)]
    assert kept == sorted({best[0], 11, 12})


def test_early_stopping_survives_a_resume(tmp_path: Path, model: Path, rows: Path, eval_rows: Path) -> None:
    section = {"epochs": 9, "eval_every": 1, "learning_rate": 0.3, "early_stopping": {"patience": 3}}
    sections = {"data": {"eval": {"path": str(eval_rows)}}, "train": section}
    whole = train(load_config(write_yaml(tmp_path / "whole", model, rows, sections)))
    assert whole.stopped_early and whole.steps < 27
    assert (
        start(write_yaml(tmp_path / "broken", model, rows, sections), whole.steps - 1, int(signal.SIGKILL)).returncode
        < 0
    )
    broken = train(load_config(tmp_path / "broken" / "run.yaml"))
    assert broken.stopped_early and broken.steps == whole.steps
    assert eval_losses(broken.run_dir) == eval_losses(whole.run_dir)


def test_checkpoint_of_another_strategy_is_refused(tmp_path: Path, model: Path, rows: Path) -> None:
    result = train(load_config(write_yaml(tmp_path, model, rows)))
    with pytest.raises(RunFolderError, match="written by strategy single on 1 processes; zero2 on 2"):
        checkpoint.check_resumable(result.best, strategy="zero2", world=2)
    checkpoint.check_resumable(result.best, strategy="ddp", world=2)
