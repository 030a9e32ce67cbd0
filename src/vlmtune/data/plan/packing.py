"""Lays down the plans of a run and of an evaluation: what the configuration says, in numbers that divide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from math import ceil
from typing import Protocol

import numpy as np

from vlmtune.config.schema import RunConfig, TrainConfig
from vlmtune.data.counts import exact_count
from vlmtune.data.plan.bad_rows import usable_rows
from vlmtune.data.plan.bins import fill, packs_of
from vlmtune.data.plan.mixture import Mixture, make_mixture, mixing_text
from vlmtune.data.plan.sharing import room_taken
from vlmtune.data.plan.train_plan import RowsPlan, TokensPlan, TrainPlan
from vlmtune.data.prepared.measure import Measured
from vlmtune.data.rows.corpus import Corpus
from vlmtune.errors import ConfigError, DataError
from vlmtune.progress import track


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


def make_plan(
    measured: Measured,
    corpus: Corpus,
    config: RunConfig,
    *,
    world: int,
    packed: bool,
    shared_length: int | None = None,
) -> TrainPlan:
    """Lay down a training run.

    Args:
        shared_length: of the model; a longer row has a pack to itself.

    Raises:
        DataError: bad rows, or none left. ConfigError: batch sizes that do not divide, tokens without packing.
    """
    usable = usable_rows(measured, corpus, config.data)
    return plan_rows(usable, measured, corpus, config, world=world, packed=packed, shared_length=shared_length)


def mixture_of(usable: np.ndarray, corpus: Corpus, config: RunConfig) -> Mixture:
    """The mixture that the run's plan is made of. Raises: see `make_mixture`."""
    options = [source.options for source in corpus.sources]
    return make_mixture(usable, corpus.source_sizes, options, corpus.names, config.train.seed)


def plan_rows(
    usable: np.ndarray,
    measured: Measured,
    corpus: Corpus,
    config: RunConfig,
    *,
    world: int,
    packed: bool,
    shared_length: int | None = None,
) -> TrainPlan:
    """`make_plan` for the rows where `usable` is true, whatever the others are like."""
    train = config.train
    mixture = mixture_of(usable, corpus, config)
    room = room_taken(measured.num_tokens, config.data.max_length, shared_length)
    if train.global_batch_tokens is not None:
        if not packed:
            raise ConfigError(
                "a step counted in tokens is made of packs, and this run does not pack",
                where="train.global_batch_tokens",
                remedy="Set train.global_batch_size instead, or data.packing: true with a model that can pack.",
            )
        num_packs = packs_per_step(train.global_batch_tokens, config.data.max_length, world)
        return _plan_tokens(mixture, measured, room, config, world=world, num_packs=num_packs)
    return _plan_samples(mixture, measured, room, config, world=world, packed=packed)


def _plan_samples(
    mixture: Mixture, measured: Measured, room: np.ndarray, config: RunConfig, *, world: int, packed: bool
) -> RowsPlan:
    train = config.train
    batch_size = train.global_batch_size
    assert batch_size is not None  # or the size is in tokens, see the schema
    num_steps, whole_epochs, last_rows = _extent(train, mixture.epoch_size, batch_size)
    plan = RowsPlan(
        mixture=mixture,
        num_tokens=measured.num_tokens,
        num_visual=measured.num_visual,
        room=room,
        global_batch_size=batch_size,
        num_steps=num_steps,
        whole_epochs=whole_epochs,
        last_rows=last_rows,
        world=world,
        max_length=config.data.max_length if packed else None,
        micro_batch_size=train.micro_batch_size,
        micro_batches_per_step=0,
        by_length=config.data.group_by_length,
    )
    if packed:
        plan.micro_batches_per_step = ceil(plan.most_packs() / world) * world
    else:
        plan.micro_batches_per_step = _num_padded(batch_size, train.micro_batch_size, world)
    return plan


def _extent(train: TrainConfig, epoch_rows: int, batch_size: int) -> tuple[int, int, int]:
    """Number of steps, of whole epochs, and of rows taken from the epoch after them."""
    steps_per_epoch = ceil(epoch_rows / batch_size)
    if train.max_steps is not None:
        return train.max_steps, train.max_steps // steps_per_epoch, epoch_rows
    whole, rows = _epochs_and_rest(train.epochs, epoch_rows)
    return whole * steps_per_epoch + ceil(rows / batch_size), whole, rows


def _epochs_and_rest(epochs: float, units: int) -> tuple[int, int]:
    """Whole epochs, and the units (rows or packs) that are taken from the next one; at least one unit in all."""
    whole = int(epochs)
    rest = exact_count(float(Decimal(str(epochs)) - whole), units)
    return whole, rest if whole else max(rest, 1)


def _num_padded(batch_size: int, micro_batch_size: int, world: int) -> int:
    """Micro batches per step without packing."""
    unit = micro_batch_size * world
    if batch_size % unit:
        raise ConfigError(
            f"{batch_size} rows per step cannot be dealt to {_devices(world)} in micro batches of {micro_batch_size}",
            where="train.global_batch_size",
            expected=f"a multiple of {unit}",
            remedy=_nearest(batch_size, unit),
        )
    return batch_size // micro_batch_size


def packs_per_step(batch_tokens: int, max_length: int, world: int) -> int:
    """Packs of a step whose size is given in tokens.

    Raises:
        ConfigError: no whole number of packs for each device.
    """
    unit = max_length * world
    if batch_tokens % unit:
        raise ConfigError(
            f"{batch_tokens:,} tokens per step cannot be dealt to {_devices(world)} in packs of {max_length:,} "
            "(data.max_length)",
            where="train.global_batch_tokens",
            expected=f"a multiple of {unit}",
            remedy=_nearest(batch_tokens, unit),
        )
    return batch_tokens // max_length


def _devices(world: int) -> str:
    return f"{world} device{'' if world == 1 else 's'}"


def _nearest(number: int, unit: int) -> str:
    below = number // unit * unit
    nearest = [str(multiple) for multiple in (below, below + unit) if multiple]
    return f"The nearest {'is' if len(nearest) == 1 else 'are'} {' and '.join(nearest)}."


def _plan_tokens(
    mixture: Mixture, measured: Measured, room: np.ndarray, config: RunConfig, *, world: int, num_packs: int
) -> TokensPlan:
    max_length = config.data.max_length
    sizes: list[int] = []
    filled = None
    if mixture.is_even:  # all epochs hold the same lengths and are packed alike
        filled = fill(room[mixture.taken(0)], max_length, mixture.seed)

    def packs(epoch: int) -> int:
        while len(sizes) <= epoch:
            lengths = room[mixture.taken(len(sizes))]
            _, starts = filled or fill(lengths, max_length, mixture.seed)
            sizes.append(len(starts) - 1)
        return sizes[epoch]

    taken = _packs_taken(config.train, packs, num_packs, takes_long=filled is None)
    return TokensPlan(
        mixture=mixture,
        num_tokens=measured.num_tokens,
        num_visual=measured.num_visual,
        room=room,
        num_steps=sum(ceil(count / num_packs) for count in taken),
        world=world,
        micro_batches_per_step=num_packs,
        max_length=max_length,
        epoch_packs=np.array([packs(epoch) for epoch in range(len(taken))], np.int64),
        taken_packs=np.array(taken, np.int64),
        _filled=filled,
    )


def _packs_taken(train: TrainConfig, packs: Callable[[int], int], per_step: int, *, takes_long: bool) -> list[int]:
    """Packs that are trained in each epoch; `packs` says how many one has."""
    taken: list[int] = []
    if train.max_steps is not None:
        left = train.max_steps
        while left:
            taken.append(min(packs(len(taken)), left * per_step))
            left -= ceil(taken[-1] / per_step)
        return taken
    whole = int(train.epochs)
    epochs = track(range(whole), total=whole, label="packing epochs") if takes_long else range(whole)
    taken = [packs(epoch) for epoch in epochs]
    if train.epochs > whole:
        _, rest = _epochs_and_rest(train.epochs, packs(whole))
        taken += [rest] if rest else []
    return taken


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


def refuse_mixing(corpus: Corpus) -> None:
    """Raises ConfigError for an eval source that is mixed: its rows are counted once."""
    for source in corpus.sources:
        way = mixing_text(source.options)
        if way != "repeat 1":
            raise ConfigError(
                f"the eval source {source.name} has {way}",
                where="data.eval",
                expected=f"no `{way.split()[0]}`: an evaluation takes every row once",
                remedy="If a list of files says it, take the numbers out of a copy of the list.",
            )


def rows_to_evaluate(usable: np.ndarray) -> np.ndarray:
    """Row numbers. Raises: DataError: none."""
    rows = np.flatnonzero(usable)
    if not len(rows):
        remedy = "Run `vlmtune check` to see why the rows were dropped."
        raise DataError("no row is left to evaluate on", where="data.eval", remedy=remedy)
    return rows


def make_eval_plan(
    measured: Measured,
    corpus: Corpus,
    config: RunConfig,
    *,
    world: int,
    packed: bool,
    shared_length: int | None = None,
) -> EvalPlan:
    """Lay down an evaluation; `shared_length` as for `make_plan`.

    Raises:
        DataError: bad rows, or none left. ConfigError: an eval source that is mixed.
    """
    refuse_mixing(corpus)
    rows = rows_to_evaluate(usable_rows(measured, corpus, config.data))
    lengths = measured.num_tokens[rows].tolist()
    if packed:
        room = room_taken(measured.num_tokens[rows], config.data.max_length, shared_length)
        groups = packs_of(room.tolist(), config.data.max_length)
    else:
        falling = sorted(range(len(rows)), key=lambda k: (-lengths[k], k))
        micro = config.train.micro_batch_size
        groups = [falling[start : start + micro] for start in range(0, len(falling), micro)]
    batches = [tuple(rows[group].tolist()) for group in groups]
    batches += [()] * (-len(batches) % world)
    digest = hashlib.blake2b(rows.tobytes() + measured.num_tokens.tobytes(), digest_size=16).hexdigest()
    return EvalPlan(batches=batches, num_tokens=measured.num_tokens, world=world, digest=digest)
