"""When to log, evaluate and save; signals; the progress bar. Trainer asks here after every optimizer step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmtune.config.schema import TrainConfig
from vlmtune.progress import track

_SECONDS_OF_ONE_SIGNAL = 1.0


class Plan(Protocol):
    """What the training loop needs to know of `data.plan.packing.Plan`."""

    @property
    def num_steps(self) -> int: ...

    @property
    def micro_batches_per_step(self) -> int: ...

    def step_epoch(self, step: int) -> float:
        """Epochs that are done after step number `step`, counted from 0."""
        ...

    def is_epoch_end(self, step: int) -> bool:
        """Whether step number `step`, counted from 0, is the last of an epoch."""
        ...


class StopSignal:
    """The first Ctrl-C or SIGTERM asks the run to stop after this step; a second one ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._came = 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM inside the block (main thread only)."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        # A terminal sends Ctrl-C to every process of a group, and launchers pass it on: two at once are one.
        if self.number is not None and now - self._came > _SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.number is None:
            self.number, self._came = number, now


class Schedule(TrainerCallback):
    """Sets Trainer's flags after each step.

    Args:
        end_of_step: called first after every step; whether all ranks have agreed to stop here.
    """

    def __init__(self, plan: Plan, train: TrainConfig, *, has_eval: bool, end_of_step: Callable[[], bool]) -> None:
        self._plan = plan
        self._train = train
        self._has_eval = has_eval
        self._end_of_step = end_of_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        stop = self._end_of_step()
        step = state.global_step
        last = step >= self._plan.num_steps
        control.should_log = last or step == 1 or step % self._train.log_every == 0
        control.should_evaluate = self._has_eval and (last or self._due(step, self._train.eval_every))
        save_every = self._train.save_every or (self._train.eval_every if self._has_eval else None)
        control.should_save = last or self._due(step, save_every)
        if stop and not last:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def _due(self, step: int, every: int | None) -> bool:
        return step % every == 0 if every else self._plan.is_epoch_end(step - 1)


class ProgressBar(TrainerCallback):
    """Drives `progress.track` one step at a time."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._bar: Generator[int, None, None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        done = state.global_step
        label = f"train from step {done}" if done else "train"
        self._bar = track(range(self._num_steps - done), total=self._num_steps - done, label=label)
        next(self._bar, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            next(self._bar, None)

    def close(self) -> None:
        """Ends the bar, also when training stopped early or failed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
