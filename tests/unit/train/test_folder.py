from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.schema import DataConfig, LoraTuning, ModelConfig, RunConfig, SourceConfig, TrainConfig
from vlmtune.errors import RunFolderError
from vlmtune.train import checkpoint, folder


def _config(*, rank: int = 16, workers: int = 2, **train: Any) -> RunConfig:
    data = DataConfig(sources=(SourceConfig(path="/rows.jsonl"),), workers=workers)
    return RunConfig(
        model=ModelConfig(path="/model"), data=data, tuning=LoraTuning(rank=rank), train=TrainConfig(**train)
    )


def _claimed(run_dir: Path, digests: dict[str, str]) -> None:
    """A run that has written its first checkpoint."""
    folder.claim(run_dir, _config(), digests)
    saved = checkpoint.folder_of(run_dir, 1)
    saved.mkdir()
    checkpoint.seal(saved, strategy="single", world=1)


def test_same_run_is_recognised_and_free_keys_may_change(tmp_path: Path) -> None:
    digests = {"rows": "a", "plan": "b"}
    _claimed(tmp_path, digests)
    folder.claim(tmp_path, _config())
    free = _config(
        workers=7, output_dir="/x", log_every=3, save_every=5, keep_checkpoints=9, strategy="ddp", micro_batch_size=2
    )
    folder.claim(tmp_path, free, digests)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 8}, "tuning.rank (there 16, here 8)"),
        ({"seed": 1}, "train.seed (there 0, here 1)"),
        ({"epochs": 2}, "train.epochs (there 1.0, here 2.0)"),
        ({"extra": {"adam_epsilon": 1e-6}}, "train.extra.adam_epsilon (there nothing, here 1e-06)"),
    ],
)
def test_another_run_is_refused_with_its_keys(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    _claimed(tmp_path, {"rows": "a"})
    with pytest.raises(RunFolderError) as caught:
        folder.claim(tmp_path, _config(**change))
    assert words in str(caught.value)


def test_changed_data_is_refused(tmp_path: Path) -> None:
    _claimed(tmp_path, {"rows": "a", "plan": "b"})
    with pytest.raises(RunFolderError, match=r"plan \(changed\)"):
        folder.claim(tmp_path, _config(), {"rows": "a", "plan": "c"})


def test_a_run_that_saved_nothing_may_be_corrected(tmp_path: Path) -> None:
    folder.claim(tmp_path, _config(), {"rows": "a"})
    checkpoint.folder_of(tmp_path, 1).mkdir()  # half written
    folder.claim(tmp_path, _config(rank=8))
    folder.claim(tmp_path, _config(rank=8), {"rows": "b"})
    assert json.loads((tmp_path / "identity.json").read_text())["data"] == {"rows": "b"}


def test_nothing_is_written_before_the_data_is_known(tmp_path: Path) -> None:
    folder.claim(tmp_path, _config())
    assert not list(tmp_path.iterdir())


def test_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    _claimed(tmp_path, {})
    file = tmp_path / "identity.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(RunFolderError, match="has format 99"):
        folder.claim(tmp_path, _config())


def test_lock_is_free_again_afterwards(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vlmtune.train import folder\n"
        "with folder.locked(Path(sys.argv[1])): pass"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True).stderr

    with folder.locked(tmp_path):
        assert f"is in use by process {os.getpid()} on " in other()
    assert other() == ""


def test_lock_goes_with_a_killed_process_though_its_workers_live(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; from vlmtune.train import folder\n"
        "with folder.locked(Path(sys.argv[1])):\n"
        "    if (worker := os.fork()) == 0: time.sleep(60); os._exit(0)\n"
        "    print(worker, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.wait()
        try:
            with folder.locked(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
