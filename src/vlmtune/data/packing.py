"""The plan of a run: which rows each optimizer step takes, and how they fill its micro batches.

Two layers. *Step -> rows* depends on the rows, the repeats, the seed and `global_batch_size`, and on nothing else: not
on the number of processes, the size of a micro batch, or packing. *Step -> micro batches* fills the step's rows into
the same number N of micro batches in every step; micro batch j of a step belongs to rank j mod world.

Nothing is stored per step: an epoch's order is drawn again from the seed when one of its micro batches is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from decimal import Decimal
from math import ceil
from typing import Protocol

import numpy as np

from vlmtune.config.schema import RunConfig, TrainConfig
from vlmtune.data.bins import best_fit, count_first_fit, deal
from vlmtune.data.measure import Measured, usable_rows
from vlmtune.data.mixture import Mixture, exact_count, make_mixture
from vlmtune.data.sources import Corpus
from vlmtune.errors import ConfigError, DataError

_EPOCHS_KEPT = 2  # an epoch's end and the next one's beginning are in work at the same time


class Plan(Protocol):
    """The micro batches of a run or an evaluation, numbered from 0, step by step."""

    @property
    def num_steps(self) -> int: ...

    @property
    def micro_batches_per_step(self) -> int:
        """N, a multiple of the number of processes."""
        ...

    @property
    def num_tokens(self) -> np.ndarray:
        """int32 (n,): the length of every row of the corpus as it was planned."""
        ...

    def rows(self, i: int) -> tuple[int, ...]:
        """Row numbers of micro batch `i`; () for one that only levels the ranks."""
        ...

    @property
    def digest(self) -> str: ...


@dataclass(eq=False, kw_only=True)
class TrainPlan:
    """The plan of a training run; see the module."""

    mixture: Mixture
    num_tokens: np.ndarray
    """int32 (n,), by row number."""
    global_batch_size: int
    num_steps: int
    epoch_rows: int
    """Rows that an epoch takes."""
    whole_epochs: int
    """Epochs that are run to their end."""
    last_rows: int
    """Rows that are taken from the epoch after those."""
    world: int
    capacity: int | None
    """Tokens of a pack; None pads instead."""
    micro_batch_size: int
    micro_batches_per_step: int = 0
    _orders: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)
    _dealt: tuple[int, list[tuple[int, ...]]] = field(init=False, repr=False, default=(-1, []))
    """The last step that was asked for, and its micro batches."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}, "_dealt": (-1, [])}

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.epoch_rows / self.global_batch_size)

    def step_rows(self, step: int) -> np.ndarray:
        """int64 (≤ global_batch_size,): the rows of one optimizer step, the same for any number of processes."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        epoch, place = divmod(step, self.steps_per_epoch)
        start, end = self._borders(epoch, place)
        return self._order(epoch)[start:end]

    def rows(self, i: int) -> tuple[int, ...]:
        """Row numbers of micro batch `i` (of step ``i // micro_batches_per_step``), in the order of the step."""
        step, place = divmod(i, self.micro_batches_per_step)
        if self._dealt[0] != step:
            self._dealt = (step, self._deal(self.step_rows(step)))
        return self._dealt[1][place]

    def _deal(self, rows: np.ndarray) -> list[tuple[int, ...]]:
        """A step's rows as its micro batches, the longest first, so that ranks working side by side have like work."""
        lengths = self.num_tokens[rows].tolist()
        if self.capacity is not None:
            groups = deal(lengths, self.micro_batches_per_step, self.capacity)
        else:
            falling = sorted(range(len(rows)), key=lambda k: (-lengths[k], k))
            parts = np.array_split(np.array(falling, np.int64), self.micro_batches_per_step)
            groups = [part.tolist() for part in parts]
        return [tuple(rows[group].tolist()) for group in groups]

    def step_epoch(self, step: int) -> float:
        """Epochs that are done after `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch + self._borders(epoch, place)[1] / self.epoch_rows

    def is_epoch_end(self, step: int) -> bool:
        """Whether `step` takes the last rows of a whole epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._borders(epoch, place)[1] == self.epoch_rows

    @property
    def digest(self) -> str:
        """A hash of step -> rows. More epochs do not change it, so that a run can be prolonged."""
        whole = hashlib.blake2b(digest_size=16)
        whole.update(repr((self.global_batch_size, self.mixture.seed, self.mixture.counts)).encode())
        whole.update(np.ascontiguousarray(self.num_tokens, np.int32).tobytes())
        whole.update(self._order(0).tobytes())
        return whole.hexdigest()

    def arithmetic(self) -> dict[str, int | float]:
        """The numbers of the batch arithmetic, for printing."""
        per_epoch = int(self.num_tokens[self._order(0)].sum(dtype=np.int64))
        numbers: dict[str, int | float] = {
            "rows_per_epoch": self.epoch_rows,
            "tokens_per_epoch": per_epoch,
            "global_batch_size": self.global_batch_size,
            "devices": self.world,
            "micro_batches_per_step": self.micro_batches_per_step,
            "accumulation": self.micro_batches_per_step // self.world,
            "steps_per_epoch": self.steps_per_epoch,
            "num_steps": self.num_steps,
            "epochs": self.step_epoch(self.num_steps - 1),
        }
        if self.capacity is None:
            numbers["micro_batch_size"] = self.micro_batch_size
        else:
            slots = self.steps_per_epoch * self.micro_batches_per_step * self.capacity
            numbers["max_length"] = self.capacity
            numbers["fill"] = per_epoch / slots
        return numbers

    def _borders(self, epoch: int, place: int) -> tuple[int, int]:
        """First row and end of a step within its epoch's order."""
        limit = self.epoch_rows if epoch < self.whole_epochs else self.last_rows
        start = place * self.global_batch_size
        return start, min(start + self.global_batch_size, limit)

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[min(self._orders)]
            order = self._orders[epoch] = self.mixture.epoch(epoch)
        return order

    def most_packs(self) -> int:
        """The most packs that first-fit-decreasing needs for a step, over all steps of the run."""
        assert self.capacity is not None
        most = 0
        steps_per_epoch = self.steps_per_epoch
        for epoch in range(ceil(self.num_steps / steps_per_epoch)):
            steps = min(steps_per_epoch, self.num_steps - epoch * steps_per_epoch)
            end = self._borders(epoch, steps - 1)[1]
            lengths = np.zeros(steps * self.global_batch_size, np.int32)
            lengths[:end] = self.num_tokens[self._order(epoch)[:end]]
            counts = count_first_fit(lengths.reshape(steps, self.global_batch_size), self.capacity)
            most = max(most, int(counts.max()))
        return most


def make_plan(measured: Measured, corpus: Corpus, config: RunConfig, *, world: int, packed: bool) -> TrainPlan:
    """Lay down a training run.

    Raises:
        DataError: bad rows, or none left. ConfigError: batch sizes that do not divide.
    """
    return plan_rows(usable_rows(measured, corpus, config.data), measured, corpus, config, world=world, packed=packed)


def plan_rows(
    usable: np.ndarray, measured: Measured, corpus: Corpus, config: RunConfig, *, world: int, packed: bool
) -> TrainPlan:
    """`make_plan` for the rows where `usable` is true, whatever the others are like."""
    train = config.train
    mixture = make_mixture(usable, corpus.source_sizes, _repeats(corpus), corpus.names, train.seed)
    size = mixture.epoch_size
    num_steps, whole_epochs, last_rows = _extent(train, size)
    plan = TrainPlan(
        mixture=mixture,
        num_tokens=measured.num_tokens,
        global_batch_size=train.global_batch_size,
        num_steps=num_steps,
        epoch_rows=size,
        whole_epochs=whole_epochs,
        last_rows=last_rows,
        world=world,
        capacity=config.data.max_length if packed else None,
        micro_batch_size=train.micro_batch_size,
    )
    if packed:
        plan.micro_batches_per_step = ceil(plan.most_packs() / world) * world
    else:
        plan.micro_batches_per_step = _num_padded(train, world)
    return plan


def _extent(train: TrainConfig, epoch_rows: int) -> tuple[int, int, int]:
    """Number of steps, of whole epochs, and of rows taken from the epoch after them."""
    steps_per_epoch = ceil(epoch_rows / train.global_batch_size)
    if train.max_steps is not None:
        return train.max_steps, train.max_steps // steps_per_epoch, epoch_rows
    whole = int(train.epochs)
    part = float(Decimal(str(train.epochs)) - whole)
    rows = exact_count(part, epoch_rows)
    if not whole:
        rows = max(rows, 1)
    return whole * steps_per_epoch + ceil(rows / train.global_batch_size), whole, rows


def _num_padded(train: TrainConfig, world: int) -> int:
    """Micro batches per step without packing."""
    unit = train.micro_batch_size * world
    if train.global_batch_size % unit:
        below = train.global_batch_size // unit * unit
        nearest = [str(number) for number in (below, below + unit) if number]
        devices = f"{world} device{'' if world == 1 else 's'}"
        raise ConfigError(
            f"{train.global_batch_size} rows per step cannot be dealt to {devices} in micro batches of "
            f"{train.micro_batch_size}",
            where="train.global_batch_size",
            expected=f"a multiple of {unit}",
            remedy=f"The nearest {'is' if len(nearest) == 1 else 'are'} {' and '.join(nearest)}.",
        )
    return train.global_batch_size // train.micro_batch_size


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalPlan:
    """Each row once, the longest first, so that a lack of memory shows at once. A step is one turn of all ranks."""

    batches: list[tuple[int, ...]]
    num_tokens: np.ndarray
    world: int
    digest: str

    @property
    def num_steps(self) -> int:
        return len(self.batches) // self.world

    @property
    def micro_batches_per_step(self) -> int:
        return self.world

    def rows(self, i: int) -> tuple[int, ...]:
        return self.batches[i]


def refuse_repeat(corpus: Corpus) -> None:
    """Raises ConfigError for an eval source with a `repeat`: its rows are counted once."""
    for repeat, name in zip(_repeats(corpus), corpus.names, strict=True):
        if repeat != 1:
            raise ConfigError(
                f"the eval source {name} has repeat {repeat:g}",
                where="data.eval",
                expected="no `repeat`: an evaluation takes every row once",
            )


def make_eval_plan(measured: Measured, corpus: Corpus, config: RunConfig, *, world: int, packed: bool) -> EvalPlan:
    """Lay down an evaluation.

    Raises:
        DataError: bad rows, or none left. ConfigError: an eval source with a `repeat`.
    """
    refuse_repeat(corpus)
    rows = np.flatnonzero(usable_rows(measured, corpus, config.data))
    if not len(rows):
        raise DataError("no row is left to evaluate on", where="data.eval")
    lengths = measured.num_tokens[rows].tolist()
    if packed:
        groups = best_fit(lengths, config.data.max_length)
    else:
        falling = sorted(range(len(rows)), key=lambda k: (-lengths[k], k))
        micro = config.train.micro_batch_size
        groups = [falling[start : start + micro] for start in range(0, len(falling), micro)]
    batches = [tuple(rows[group].tolist()) for group in groups]
    batches += [()] * (-len(batches) % world)
    digest = hashlib.blake2b(rows.tobytes() + measured.num_tokens.tobytes(), digest_size=16).hexdigest()
    return EvalPlan(batches=batches, num_tokens=measured.num_tokens, world=world, digest=digest)


def _repeats(corpus: Corpus) -> list[float]:
    return [source.options.repeat or 1.0 for source in corpus.sources]
