"""The plan of a training run: which rows each optimizer step takes, and how they lie in its micro batches.

Two layers. *Step -> rows* depends on the rows, the mixture, the seed and the global batch (and, where that is counted
in tokens, on the size of a pack), and on nothing else: not on the number of processes or the size of a micro batch.
*Step -> micro batches* gives every step the same number N of micro batches; micro batch j of a step belongs to rank
j mod world. Those that stand side by side on the ranks have like work.

Nothing is stored per step: an epoch's order is drawn again from the seed when one of its micro batches is asked for.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import numpy as np

from vlmtune.data.plan.bins import by_work, count_first_fit, deal, fill, place_rows
from vlmtune.data.plan.mixture import Mixture

_EPOCHS_KEPT = 2  # an epoch's end and the next one's beginning are in work at the same time
_SAMPLING = 2  # the way rows are drawn; a run that began with another one cannot go on


@dataclass(eq=False, kw_only=True)
class TrainPlan(ABC):
    """What is common to plans in rows and in tokens; an epoch is made of units, rows or packs."""

    mixture: Mixture
    num_tokens: np.ndarray
    """int32 (n,), by row number."""
    num_visual: np.ndarray
    """int32 (n,), those of them that pictures take."""
    room: np.ndarray
    """int32 (n,): what a row takes up in a pack; see `sharing.room_taken`. `num_tokens` itself for most models."""
    num_steps: int
    world: int
    micro_batches_per_step: int
    _dealt: tuple[int, list[tuple[int, ...]]] = field(init=False, repr=False, default=(-1, []))
    """The last step that was asked for, and its micro batches."""
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, default_factory=dict)
    """Epochs in use: their rows in order, and where each unit begins in them (or nothing, where a row is one)."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}, "_dealt": (-1, [])}

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch, run to its end; others may differ by one where packs are counted."""

    @property
    @abstractmethod
    def global_batch(self) -> dict[str, int]:
        """The size of a step, by the name of its option."""

    @property
    @abstractmethod
    def capacity(self) -> int | None:
        """Tokens of a pack; None pads instead."""

    @abstractmethod
    def _place(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, first unit, end, units of the epoch) of a step."""

    @abstractmethod
    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """See `_epochs`."""

    @abstractmethod
    def _deal(self, step: int) -> list[np.ndarray]:
        """The micro batches of a step that are not empty."""

    @abstractmethod
    def step_rows(self, step: int) -> np.ndarray:
        """int64: the rows of one optimizer step, the same for any number of processes."""

    def rows(self, i: int) -> tuple[int, ...]:
        """Row numbers of micro batch `i` (of step ``i // micro_batches_per_step``)."""
        step, place = divmod(i, self.micro_batches_per_step)
        if self._dealt[0] != step:
            dealt = [tuple(rows.tolist()) for rows in self._deal(step)]
            self._dealt = (step, dealt + [()] * (self.micro_batches_per_step - len(dealt)))
        return self._dealt[1][place]

    def step_epoch(self, step: int) -> float:
        """Epochs that are done after `step`."""
        epoch, _, end, whole = self._place(step)
        return epoch + end / whole

    def is_epoch_end(self, step: int) -> bool:
        """Whether `step` takes the last rows of a whole epoch."""
        _, _, end, whole = self._place(step)
        return end == whole

    @property
    def digest(self) -> str:
        """A hash of step -> rows. More epochs do not change it, so that a run can be prolonged."""
        whole = hashlib.blake2b(digest_size=16)
        whole.update(repr((_SAMPLING, self.global_batch, self.mixture.seed, self.mixture.counts)).encode())
        whole.update(np.ascontiguousarray(self.num_tokens, np.int32).tobytes())
        if self.capacity is not None and not np.array_equal(self.room, self.num_tokens):
            whole.update(np.ascontiguousarray(self.room, np.int32).tobytes())
        for rows in (*self.mixture.rows, self._epoch(0)[0]):
            whole.update(np.ascontiguousarray(rows, np.int64).tobytes())
        return whole.hexdigest()

    def arithmetic(self) -> dict[str, int | float]:
        """The numbers of the batch arithmetic, for printing."""
        first = self._epoch(0)[0]
        per_epoch = int(self.num_tokens[first].sum(dtype=np.int64))
        numbers: dict[str, int | float] = {
            "rows_per_epoch": len(first),
            "tokens_per_epoch": per_epoch,
            **self.global_batch,
            "devices": self.world,
            "micro_batches_per_step": self.micro_batches_per_step,
            "accumulation": self.micro_batches_per_step // self.world,
            "steps_per_epoch": self.steps_per_epoch,
            "num_steps": self.num_steps,
            "epochs": self.step_epoch(self.num_steps - 1),
        }
        if self.capacity is not None:
            numbers["max_length"] = self.capacity
            numbers["packs_per_epoch"] = self.packs_per_epoch
            numbers["fill"] = per_epoch / (self.packs_per_epoch * self.capacity)
        return numbers

    @property
    def packs_per_epoch(self) -> int:
        """Packs of the first epoch."""
        return self.steps_per_epoch * self.micro_batches_per_step

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._epochs.get(epoch)
        if found is None:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            found = self._epochs[epoch] = self._make_epoch(epoch)
        return found

    def _check(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")


@dataclass(eq=False, kw_only=True)
class RowsPlan(TrainPlan):
    """A step takes `global_batch_size` rows, whatever their lengths; its packs share them."""

    global_batch_size: int
    whole_epochs: int
    """Epochs that are run to their end."""
    last_rows: int
    """Rows that are taken from the epoch after those."""
    max_length: int | None
    micro_batch_size: int
    by_length: bool = False
    """Each step takes rows of like length; see `mixture.order_by_length`."""

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.mixture.epoch_size / self.global_batch_size)

    @property
    def global_batch(self) -> dict[str, int]:
        return {"global_batch_size": self.global_batch_size}

    @property
    def capacity(self) -> int | None:
        return self.max_length

    def arithmetic(self) -> dict[str, int | float]:
        more = {"micro_batch_size": self.micro_batch_size} if self.capacity is None else {}
        return super().arithmetic() | more

    def step_rows(self, step: int) -> np.ndarray:
        self._check(step)
        epoch, start, end, _ = self._place(step)
        return self._epoch(epoch)[0][start:end]

    def _place(self, step: int) -> tuple[int, int, int, int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.mixture.epoch_size
        start = place * self.global_batch_size
        limit = size if epoch < self.whole_epochs else self.last_rows
        return epoch, start, min(start + self.global_batch_size, limit), size

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.mixture.epoch(epoch)
        if self.by_length:
            places = self.mixture.order_by_length(epoch, self.num_tokens[rows], self.global_batch_size)
            rows = rows[places]
        return rows, np.zeros(0, np.int64)

    def _deal(self, step: int) -> list[np.ndarray]:
        rows = self.step_rows(step)
        if self.capacity is not None:
            groups = deal(self.room[rows], self.num_visual[rows], self.micro_batches_per_step, self.capacity)
            return [rows[group] for group in groups]
        lengths = self.num_tokens[rows]
        # Rows of like length share a micro batch, so that little is padded; the longest are computed side by side.
        return np.array_split(rows[np.argsort(-lengths, kind="stable")], self.micro_batches_per_step)

    def most_packs(self) -> int:
        """The most packs that first-fit-decreasing needs for a step, over all steps of the run."""
        assert self.capacity is not None
        most = 0
        steps_per_epoch = self.steps_per_epoch
        for epoch in range(ceil(self.num_steps / steps_per_epoch)):
            steps = min(steps_per_epoch, self.num_steps - epoch * steps_per_epoch)
            _, _, end, _ = self._place(epoch * steps_per_epoch + steps - 1)
            lengths = np.zeros(steps * self.global_batch_size, np.int32)
            lengths[:end] = self.room[self._epoch(epoch)[0][:end]]
            counts = count_first_fit(lengths.reshape(steps, self.global_batch_size), self.capacity)
            most = max(most, int(counts.max()))
        return most


@dataclass(eq=False, kw_only=True)
class TokensPlan(TrainPlan):
    """A step takes `global_batch_tokens` ÷ `max_length` packs, which are filled from the whole epoch.

    The last step of an epoch may hold fewer packs; empty micro batches level the ranks there.
    """

    max_length: int
    epoch_packs: np.ndarray
    """int64 (epochs,): packs of each epoch that is begun."""
    taken_packs: np.ndarray
    """int64 (epochs,): how many of them are trained; fewer in the last one, if it is run in part."""
    _filled: tuple[np.ndarray, np.ndarray] | None = None
    """The lengths of all epochs, packed, where all have the same rows; see `bins.fill`."""

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.packs_per_epoch / self.micro_batches_per_step)

    @property
    def packs_per_epoch(self) -> int:
        return int(self.epoch_packs[0])

    @property
    def global_batch(self) -> dict[str, int]:
        return {"global_batch_tokens": self.micro_batches_per_step * self.max_length}

    @property
    def capacity(self) -> int | None:
        return self.max_length

    def step_rows(self, step: int) -> np.ndarray:
        self._check(step)
        return np.concatenate(self._deal(step))

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64 (epochs,): the step after the last one of each epoch."""
        return np.cumsum(-(-self.taken_packs // self.micro_batches_per_step))

    def _place(self, step: int) -> tuple[int, int, int, int]:
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        place = step - (int(self._ends[epoch - 1]) if epoch else 0)
        start = place * self.micro_batches_per_step
        end = min(start + self.micro_batches_per_step, int(self.taken_packs[epoch]))
        return epoch, start, end, int(self.epoch_packs[epoch])

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The packs in training order. Which of the rows of one length stand in a pack changes from epoch to epoch."""
        rows = self.mixture.epoch(epoch)
        lengths = self.room[rows]
        filled, starts = self._filled or fill(lengths, self.max_length, self.mixture.seed)
        rows = rows[place_rows(lengths, filled)]
        order = self.mixture.order_of_packs(epoch, len(starts) - 1)
        sizes = np.diff(starts)[order]
        begins = np.concatenate([[0], np.cumsum(sizes)])
        return rows[np.repeat(starts[order] - begins[:-1], sizes) + np.arange(len(rows))], begins

    def _deal(self, step: int) -> list[np.ndarray]:
        self._check(step)
        epoch, start, end, _ = self._place(step)
        rows, begins = self._epoch(epoch)
        packs = [rows[begins[pack] : begins[pack + 1]] for pack in range(start, end)]
        lengths = np.array([self.num_tokens[pack].sum(dtype=np.int64) for pack in packs])
        visual = np.array([self.num_visual[pack].sum(dtype=np.int64) for pack in packs])
        return [packs[i] for i in by_work(lengths, visual).tolist()]
