"""Fitting a region encoder: a resampler learns to give the normalised token embeddings of a region's label.

CalliReader publishes the resampler's class, its weights (3 queries, 4 layers, 8 heads of 64), the normalisation of the
embeddings, the padding of short labels with id 0 and, in the records, the loss: the mean squared difference. The
optimizer, the schedule, what is held out and how it is measured are choices of this module.

Tower, projector and embedding stay as they are. Everything is drawn from one seed; on a CPU the same call gives the
same weights.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from vlmtune.embed.codebook import Codebook
from vlmtune.embed.labels import HeldOutBy, Target
from vlmtune.embed.resampler import PerceiverResampler
from vlmtune.errors import TrainingError
from vlmtune.progress import track

Say = Callable[[str], None]
See = Callable[[Sequence[int]], torch.Tensor]
"""Numbers of regions -> their visual tokens, float32 (regions, n, d), as `seen.Seen` gives them."""

_LOOKS = 10  # how often the held-out regions are measured on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """
    held_out: share of the regions that are not learned from.
    held_out_by: whether whole pages are held out, or single regions.
    warmup: share of the steps in which the learning rate rises from 0; then it falls to 0 along a cosine.
    """

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    held_out: float = 0.1
    held_out_by: HeldOutBy = "page"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a resampler gives for one region: the nearest tokens without padding, and the least of their cosines."""

    target: Target
    ids: tuple[int, ...]
    cosine: float

    @property
    def is_right(self) -> bool:
        return self.ids == self.target.ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How well regions are read.

    loss: mean squared difference.
    tokens, tokens_right: of the labels, padding not counted; right is the nearest token of the query at its place.
    readings: one for each region; a label is right if its tokens and no other are left when padding is dropped.
    """

    loss: float
    tokens: int
    tokens_right: int
    readings: tuple[Reading, ...]

    @property
    def token_accuracy(self) -> float:
        return self.tokens_right / self.tokens

    @property
    def label_accuracy(self) -> float:
        return sum(reading.is_right for reading in self.readings) / len(self.readings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """
    history: for each epoch its number, steps, loss and learning rate; with a look at the held-out regions its result.
    learned, held_out: of all regions on each side; None without any there.
    """

    resampler: PerceiverResampler
    history: tuple[dict[str, Any], ...]
    learned: Measured
    held_out: Measured | None


def fit(
    resampler: PerceiverResampler,
    seen: See,
    codebook: Codebook,
    targets: Sequence[Target],
    held: Sequence[bool],
    settings: FitSettings,
    *,
    padding_id: int,
    dtype: torch.dtype = torch.float32,
    say: Say,
) -> Fitted:
    """Fits `resampler`, in float32, where it is.

    Args:
        seen: of `targets`.
        held: which targets are held out.
        dtype: in which the encoder will run, and is measured in the end.
        say: gets a line now and then.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    queries = resampler.shape.num_learns
    rows = [[*target.ids, *[padding_id] * (queries - len(target.ids))] for target in targets]
    goals = torch.tensor(rows, device=codebook.normed.device)
    measure = _Measure(seen, codebook, targets, goals, settings.batch_size, padding_id)
    learning = [number for number, out in enumerate(held) if not out]
    held_out = [number for number, out in enumerate(held) if out]
    history = []
    every = math.ceil(settings.epochs / _LOOKS)
    for line in _epochs(resampler, seen, codebook, goals, learning, settings):
        words = f"epoch {line['epoch']}/{settings.epochs}  loss {line['loss']:.4f}"
        if line["epoch"] % every == 0 or line["epoch"] == settings.epochs:
            if held_out:
                found = measure(resampler, held_out)
                line["held_out"] = {"loss": found.loss, **accuracies(found)}
                words += (
                    f"  held out: {found.token_accuracy:.1%} of the tokens, {found.label_accuracy:.1%} of the labels"
                )
            say(words)
        history.append(line)
    encoder = copy.deepcopy(resampler).to(dtype).eval()
    return Fitted(
        resampler=resampler.eval(),
        history=tuple(history),
        learned=measure(encoder, learning),
        held_out=measure(encoder, held_out) if held_out else None,
    )


def accuracies(found: Measured) -> dict[str, float | int]:
    """What is written about a measurement."""
    return {
        "regions": len(found.readings),
        "tokens": found.tokens,
        "token_accuracy": found.token_accuracy,
        "label_accuracy": found.label_accuracy,
    }


def chance(targets: Sequence[Target], held: Sequence[bool]) -> float:
    """The share of held-out labels that who always names the commonest label of the others gets right."""
    learned = Counter(target.ids for target, out in zip(targets, held, strict=True) if not out)
    commonest = max(learned, key=lambda ids: learned[ids])
    asked = [target.ids == commonest for target, out in zip(targets, held, strict=True) if out]
    return sum(asked) / len(asked)


def unseen(targets: Sequence[Target], held: Sequence[bool]) -> int:
    """How many held-out regions have a token in their label that no region has that is learned from."""
    known = {number for target, out in zip(targets, held, strict=True) if not out for number in target.ids}
    return sum(out and not known.issuperset(target.ids) for target, out in zip(targets, held, strict=True))


def _epochs(
    resampler: PerceiverResampler,
    seen: See,
    codebook: Codebook,
    goals: torch.Tensor,
    learning: Sequence[int],
    settings: FitSettings,
) -> Iterator[dict[str, Any]]:
    """Trains, and tells of each epoch when it is over."""
    steps = math.ceil(len(learning) / settings.batch_size)
    total = settings.epochs * steps
    optimizer = torch.optim.AdamW(_groups(resampler, settings.weight_decay), lr=settings.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(settings.warmup * total), total)
    draw = torch.Generator().manual_seed(settings.seed)
    bar = track(range(total), total=total, label="Fitting")
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(len(learning), generator=draw).tolist()
        sum_of_losses, rate = 0.0, 0.0
        for _ in itertools.islice(bar, steps):
            part, order = order[: settings.batch_size], order[settings.batch_size :]
            numbers = [learning[place] for place in part]
            loss = nn.functional.mse_loss(resampler(seen(numbers)), codebook.normed[goals[numbers]].float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(resampler.parameters(), settings.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            sum_of_losses += float(loss.detach()) * len(numbers)
        mean = sum_of_losses / len(learning)
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of epoch {epoch} is {mean}", where="vlmtune embed fit",
                remedy="Lower --learning-rate; with a model in half precision, look at the regions in --dtype float32.",
            )  # fmt: skip
        yield {"epoch": epoch, "step": epoch * steps, "loss": mean, "learning_rate": rate}
    next(bar, None)  # lets it end


def _groups(resampler: PerceiverResampler, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and the queries do not."""
    named = list(resampler.named_parameters())
    decaying = [parameter for name, parameter in named if parameter.ndim > 1 and name != "learns"]
    others = [parameter for name, parameter in named if parameter.ndim < 2 or name == "learns"]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True, slots=True)
class _Measure:
    seen: See
    codebook: Codebook
    targets: Sequence[Target]
    goals: torch.Tensor
    batch_size: int
    padding_id: int

    @torch.no_grad()
    def __call__(self, resampler: PerceiverResampler, numbers: Sequence[int]) -> Measured:
        readings, loss, tokens, right = [], 0.0, 0, 0
        dtype = resampler.learns.dtype
        for start in range(0, len(numbers), self.batch_size):
            part = list(numbers[start : start + self.batch_size])
            found = resampler(self.seen(part).to(dtype)).float()
            goals = self.goals[part]
            loss += float(nn.functional.mse_loss(found, self.codebook.normed[goals].float())) * len(part)
            nearest = self.codebook.nearest(found)
            real = goals != self.padding_id
            tokens += int(real.sum())
            right += int(((nearest.ids == goals) & real).sum())
            for number, ids, cosines in zip(part, nearest.ids.tolist(), nearest.cosines.tolist(), strict=True):
                kept = [(one, cosine) for one, cosine in zip(ids, cosines, strict=True) if one != self.padding_id]
                least = min((cosine for _, cosine in kept), default=0.0)
                readings.append(Reading(target=self.targets[number], ids=tuple(one for one, _ in kept), cosine=least))
        return Measured(loss=loss / len(numbers), tokens=tokens, tokens_right=right, readings=tuple(readings))
