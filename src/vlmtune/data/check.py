"""`vlmtune check`: everything that can be known about a run's data before it starts.

All bad rows with their reasons, what an epoch holds, how long the rows are, what looks odd, and the batch arithmetic.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from vlmtune.config.schema import AnySource, RunConfig
from vlmtune.data.measure import SMALL_SIDE, BadRow, Measured, too_long
from vlmtune.data.mixture import exact_count
from vlmtune.data.packing import TrainPlan, plan_rows, refuse_repeat
from vlmtune.data.prepare import Look, prepare, prepared_folder
from vlmtune.data.sharing import resolve_packing
from vlmtune.data.sources import Corpus, open_corpus
from vlmtune.models.family import OpenedFolder

__all__ = ["Measured", "Part", "Report", "check", "kinds"]

COMMON_ANSWER = 0.2  # an answer that this share of the rows gives is suspicious
FEW_ROWS = 20  # … unless there are fewer rows than this


@dataclass(slots=True, kw_only=True)
class SourceCounts:
    """What one file holds. rows: all; bad, dropped: of those; the rest counts usable rows once, whatever `repeat`."""

    name: str
    repeat: float
    rows: int
    bad: int
    dropped: int
    images: int
    tokens: int
    trained_tokens: int
    epoch_rows: int
    """Rows that an epoch takes, `repeat` applied."""


@dataclass(slots=True, kw_only=True)
class Part:
    """The training sources or the eval sources."""

    corpus: Corpus
    measured: Measured
    usable: np.ndarray
    """Boolean (n,): neither bad nor too long."""
    bad: list[BadRow]
    """Rows that make a run refuse to start, in order; over-long ones only where the config refuses them."""
    sources: list[SourceCounts]

    @property
    def lengths(self) -> np.ndarray:
        """int32 (usable rows,), in tokens."""
        return self.measured.num_tokens[self.usable]

    def total(self, name: str) -> int:
        """A column of `sources`, summed."""
        return sum(source[name] for source in self.as_rows())

    def as_rows(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(source) for source in self.sources]


@dataclass(slots=True, kw_only=True)
class Report:
    """What `check` found."""

    train: Part
    eval: Part | None
    plan: TrainPlan | None
    """The run over the usable rows, as if the bad ones were not there; None when no row is usable."""
    packed: bool
    decoded: bool
    """Whether pixels were looked at, not only headers."""
    why_not_packed: str | None
    max_length: int
    warnings: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[str, BadRow]]:
        """(data.sources | data.eval, row) for every bad row."""
        found = [("data.sources", row) for row in self.train.bad]
        return found + [("data.eval", row) for row in (self.eval.bad if self.eval else [])]

    @property
    def refuses(self) -> bool:
        """Whether a run would refuse to start."""
        return bool(self.bad) or self.plan is None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        arithmetic = self.plan.arithmetic() if self.plan else {}
        return {
            "version": 1,
            "ok": not self.refuses,
            "rows": self.train.total("rows"),
            "bad": [
                {"origin": row.origin, "reason": row.reason, "kind": row.kind, "in": part} for part, row in self.bad
            ],
            "dropped": self.train.total("dropped"),
            "images": self.train.total("images"),
            "tokens": self.train.total("tokens"),
            "trained_tokens": self.train.total("trained_tokens"),
            "epoch": {
                "rows": arithmetic.get("rows_per_epoch", 0),
                "tokens": arithmetic.get("tokens_per_epoch", 0),
                "sources": [{"name": source.name, "rows": source.epoch_rows} for source in self.train.sources],
            },
            "steps": arithmetic.get("num_steps", 0),
            "steps_per_epoch": arithmetic.get("steps_per_epoch", 0),
            "micro_batches": arithmetic.get("micro_batches_per_step", 0),
            "packs": self.num_packs,
            "batch": arithmetic,
            "sources": self.train.as_rows(),
            "eval": self._eval(),
            "longest": longest(self.train),
            "lengths": [{"up_to": limit, "rows": rows} for limit, rows in histogram(self.train.lengths)],
            "unknown_keys": dict(self.train.measured.unknown_keys.most_common()),
            "warnings": self.warnings,
        }

    @property
    def num_packs(self) -> int | None:
        """Packs of an epoch; None without packing."""
        if not self.packed:
            return None
        return self.plan.steps_per_epoch * self.plan.micro_batches_per_step if self.plan else 0

    def _eval(self) -> dict[str, Any] | None:
        if self.eval is None:
            return None
        names = ("rows", "dropped", "images", "tokens", "trained_tokens")
        return {**{name: self.eval.total(name) for name in names}, "sources": self.eval.as_rows()}


def check(config: RunConfig, opened: OpenedFolder, *, world: int = 1, decode: bool = False) -> Report:
    """Read every row of the training and eval sources.

    Raises:
        DataError: a source that cannot be opened. ConfigError: batch sizes that do not divide. Bad rows do not raise.
    """
    packed, why_not_packed = resolve_packing(config, opened)
    train = _part(config.data.sources, config, opened, decode)
    evaluated = None
    if config.data.eval:
        evaluated = _part(config.data.eval, config, opened, decode)
        refuse_repeat(evaluated.corpus)
    plan = None
    if train.usable.any():
        plan = plan_rows(train.usable, train.measured, train.corpus, config, world=world, packed=packed)
    report = Report(
        train=train,
        eval=evaluated,
        plan=plan,
        packed=packed,
        decoded=decode,
        why_not_packed=why_not_packed,
        max_length=config.data.max_length,
    )
    report.warnings = _warnings(report)
    return report


def _part(sources: tuple[AnySource, ...], config: RunConfig, opened: OpenedFolder, decode: bool) -> Part:
    data = config.data
    into = prepared_folder(config)
    corpus = open_corpus(sources, allow=data.allow, memory=into)
    look: Look = "pixels" if decode else "headers"
    prepared = prepare(corpus, opened, into=into, workers=data.workers, look=look)
    measured = prepared.measured
    long = measured.num_tokens > data.max_length
    usable = (measured.num_tokens > 0) & ~long
    usable[[row.index for row in prepared.undecodable]] = False
    bad = sorted([*measured.bad, *prepared.undecodable], key=lambda row: row.index)
    if data.too_long == "refuse":
        bad = sorted([*bad, *too_long(measured, corpus, data)], key=lambda row: row.index)
    borders = np.concatenate([[0], np.cumsum(corpus.source_sizes)])
    counts = []
    for number, source in enumerate(corpus.sources):
        own = slice(int(borders[number]), int(borders[number + 1]))
        kept = usable[own]
        num_dropped = int(long[own].sum()) if data.too_long == "drop" else 0
        counts.append(
            SourceCounts(
                name=source.name,
                repeat=source.options.repeat or 1.0,
                rows=len(kept),
                bad=len(kept) - int(kept.sum()) - num_dropped,
                dropped=num_dropped,
                images=int(measured.num_images[own][kept].sum()),
                tokens=int(measured.num_tokens[own][kept].sum(dtype=np.int64)),
                trained_tokens=int(measured.num_trained[own][kept].sum(dtype=np.int64)),
                epoch_rows=exact_count(source.options.repeat or 1.0, int(kept.sum())),
            )
        )
    return Part(corpus=corpus, measured=measured, usable=usable, bad=bad, sources=counts)


_VARIABLE = (
    (re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`"), "…"),
    (re.compile(r"\S*/\S*|\S+\.\w{2,5}\b"), "…"),
    (re.compile(r"\d[\d,.×]*"), "N"),
    (re.compile(r"(?<!<)\b(mark|image|token)s?\b"), r"\1s"),
)


def kinds(bad: list[tuple[str, BadRow]]) -> list[tuple[str, list[BadRow]]]:
    """Bad rows by what is wrong with them, the most frequent first: (a title without names and numbers, rows)."""
    groups: dict[str, list[BadRow]] = {}
    for _, row in bad:
        title = re.split(r" \(|[:;]\s|\. ", row.reason, maxsplit=1)[0]
        for pattern, instead in _VARIABLE:
            title = pattern.sub(instead, title)
        groups.setdefault(title.rstrip("."), []).append(row)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(upper limit, rows) for limits that double, from the shortest row to the longest."""
    if not len(lengths):
        return []
    limits = [1 << max(0, int(lengths.min() - 1).bit_length())]
    while limits[-1] < lengths.max():
        limits.append(2 * limits[-1])
    counts, _ = np.histogram(lengths, bins=[0, *(limit + 1 for limit in limits)])
    return [(limit, int(count)) for limit, count in zip(limits, counts, strict=True)]


def longest(part: Part) -> dict[str, Any] | None:
    """Origin and tokens of the longest readable row, over-long ones included."""
    row = int(part.measured.num_tokens.argmax())
    tokens = int(part.measured.num_tokens[row])
    return {"origin": part.corpus.origin(row), "tokens": tokens} if tokens else None


def _warnings(report: Report) -> list[str]:
    warnings = [*_odd_rows(report.train), *(_odd_rows(report.eval) if report.eval else [])]
    warnings += _common_answer(report.train)
    if report.eval:
        trained = {source.rows.digest: source.name for source in report.train.corpus.sources}
        for source in report.eval.corpus.sources:
            if source.rows.digest in trained:
                warnings.append(
                    f"{source.name} under data.eval is the same file as {trained[source.rows.digest]} under "
                    "data.sources: the eval loss will say nothing about new rows."
                )
    return warnings


def _odd_rows(part: Part) -> list[str]:
    measured, corpus = part.measured, part.corpus
    found = []

    def note(mask: np.ndarray, one: str, many: str) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            text = f"1 row {one}" if len(rows) == 1 else f"{len(rows):,} rows {many}"
            found.append(f"{text} (first: {corpus.origin(int(rows[0]))}).")

    note(_repeated_ids(part), "", "share their id with another row of their file")
    note(
        measured.marks_in_answers > 0,
        "has an <image> mark in an answer; it is trained as text",
        "have <image> marks in an answer; they are trained as text",
    )
    small = (measured.smallest_side > 0) & (measured.smallest_side < SMALL_SIDE)
    note(
        small,
        f"has a picture narrower or lower than {SMALL_SIDE} pixels",
        f"have pictures narrower or lower than {SMALL_SIDE} pixels",
    )
    return found


def _repeated_ids(part: Part) -> np.ndarray:
    """Boolean (n,): rows whose id occurs twice in their source; different files may count from 0 each."""
    repeated = np.zeros(len(part.corpus), bool)
    borders = np.concatenate([[0], np.cumsum(part.corpus.source_sizes)])
    for start, end in pairwise(borders):
        ids, inverse, counts = np.unique(part.measured.id_hash[start:end], return_inverse=True, return_counts=True)
        repeated[start:end] = (counts[inverse] > 1) & (ids[inverse] != 0)
    return repeated


def _common_answer(part: Part) -> list[str]:
    answers = part.measured.answer_hash[part.usable]
    if len(answers) < FEW_ROWS:
        return []
    value, count = Counter(answers.tolist()).most_common(1)[0]
    if count <= COMMON_ANSWER * len(answers):
        return []
    row = int(np.flatnonzero(part.usable & (part.measured.answer_hash == value))[0])
    answer = " … ".join(m.text for m in part.corpus.sample(row).messages if m.role == "assistant")
    shown = re.sub(r"\s+", " ", answer)
    shown = shown if len(shown) <= 40 else shown[:39] + "…"
    return [
        f"{count:,} of {len(answers):,} rows ({count / len(answers):.0%}) have the same answer, {shown!r} "
        f"(first: {part.corpus.origin(row)})."
    ]
