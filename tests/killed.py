"""Training in a process of its own that may end itself in the middle of a step: `start(run.yaml, step, signal)`.

The processes come from one fork server that has imported everything, since importing takes ten times as long as a run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vlmtune.train.run"])


@dataclass(frozen=True)
class Ended:
    """Exit code (negative: the signal), everything that was printed, and the micro batches that were read."""

    returncode: int
    stdout: str
    stderr: str
    read: list[int]


def start(yaml: Path, step: int = 0, number: int = 0) -> Ended:
    """Trains; before the optimizer step of `step` the process sends itself the signal `number`."""
    files = [yaml.with_suffix(suffix) for suffix in (".out", ".err", ".read")]
    for file in files:
        file.write_text("")
    process = _context.Process(target=_train, args=(yaml, step, number, files))
    process.start()
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{yaml} did not end")
    out, err, read = (file.read_text() for file in files)
    return Ended(process.exitcode, out, err, [int(word) for word in read.split()])


def _train(yaml: Path, step: int, number: int, files: list[Path]) -> None:
    import torch
    from transformers import TrainerCallback

    from vlmtune.config.load import load_config
    from vlmtune.data.loader import MicroBatches
    from vlmtune.errors import VlmtuneError
    from vlmtune.train import run
    from vlmtune.train.trainer import VlmTrainer

    for stream, file in zip((1, 2), files, strict=False):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)

    class EndAt(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                os.kill(os.getpid(), number)

    class Trainer(VlmTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(EndAt())

    class CountingBatches(MicroBatches):
        def __getitem__(self, i: int) -> Any:
            with open(files[2], "a") as file:
                file.write(f"{i} ")
            return super().__getitem__(i)

    run.VlmTrainer = Trainer  # type: ignore[misc]
    run.MicroBatches = CountingBatches  # type: ignore[misc]
    try:
        run.train(load_config(yaml), say=lambda line: print(line, flush=True))
    except VlmtuneError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
