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

from vlmtune.config.schema import RunConfig
from vlmtune.config.sources import AnySource
from vlmtune.data.checks.quick import look_over
from vlmtune.data.plan.bad_rows import Judged, bad_row_dict, judge
from vlmtune.data.plan.mixture import epoch_counts, mixing_text
from vlmtune.data.plan.packing import mixture_of, plan_rows, refuse_mixing, rows_to_evaluate
from vlmtune.data.plan.sharing import resolve_packing
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.data.prepared.job import Look
from vlmtune.data.prepared.measure import SMALL_SIDE, BadRow, Measured
from vlmtune.data.prepared.prepare import prepare, prepared_folder
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder

__all__ = ["Measured", "Part", "Report", "check", "kinds"]

COMMON_ANSWER = 0.2  # an answer that this share of the rows gives is suspicious
FEW_ROWS = 20  # … unless there are fewer rows than this


@dataclass(slots=True, kw_only=True)
class SourceCounts:
    """What one source holds. rows: all; bad, dropped: of those; the rest counts usable rows once, however mixed."""

    name: str
    mixing: str
    """`repeat 1.5`, `choose 500` or `weight 2`."""
    rows: int
    bad: int
    """Rows that cannot be trained; over-long ones too, where they are refused."""
    dropped: int
    """Over-long rows, where they are dropped."""
    images: int
    visual_tokens: int
    """Those of the tokens that pictures and frames take, as they are cut and merged."""
    embedded: int
    """Tokens that are rows of pseudo-text."""
    tokens: int | None
    trained_tokens: int | None
    """None where rows were not tokenised (``--quick``)."""
    epoch_rows: int
    """Rows that an epoch takes."""


@dataclass(slots=True, kw_only=True)
class Part:
    """The training sources or the eval sources."""

    corpus: Corpus
    measured: Measured
    judged: Judged
    sources: list[SourceCounts]

    @property
    def usable(self) -> np.ndarray:
        """Boolean (n,): neither bad nor too long."""
        return self.judged.usable

    @property
    def bad(self) -> list[BadRow]:
        return self.judged.bad

    @property
    def lengths(self) -> np.ndarray:
        """int32 (usable rows,), in tokens."""
        return self.measured.num_tokens[self.usable]

    def total(self, name: str) -> Any:
        """A column of numbers of `sources`, summed; None where it is not known."""
        values = [source[name] for source in self.as_rows()]
        return None if None in values else sum(values)

    def as_rows(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(source) for source in self.sources]


@dataclass(slots=True, kw_only=True)
class Report:
    """What `check` found."""

    train: Part
    eval: Part | None
    plan: TrainPlan | None
    """The run over the usable rows, as if the bad ones were not there; None when that cannot be, or is not known."""
    no_plan: DataError | None
    """Why a run could not be planned: a source without a usable row, or nothing to evaluate on."""
    packed: bool
    quick: bool
    """Whether rows were not tokenised, so that nothing is known about lengths."""
    decoded: bool
    """Whether pixels were looked at, not only headers."""
    why_not_packed: str | None
    max_length: int
    max_bad_share: float
    about_pictures: str | None
    """How the run's pictures are seen, and what merging leaves of their tokens; see `Family.about_pictures`."""
    warnings: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[str, BadRow]]:
        """(data.sources | data.eval, row) for every bad row."""
        found = [("data.sources", row) for row in self.train.bad]
        return found + [("data.eval", row) for row in (self.eval.bad if self.eval else [])]

    @property
    def refusal(self) -> DataError | None:
        """Why a run would not start; the first reason."""
        parts = [self.train] + ([self.eval] if self.eval else [])
        return next((part.judged.refusal for part in parts if part.judged.refusal), None) or self.no_plan

    @property
    def refuses(self) -> bool:
        """Whether a run would refuse to start."""
        return self.refusal is not None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; null where something is not known."""
        arithmetic = self.plan.arithmetic() if self.plan else {}
        epoch: Counter[str] = Counter()
        for source in self.train.sources:
            epoch[source.name] += source.epoch_rows
        missing = None if self.quick else 0
        return {
            "version": 1,
            "ok": not self.refuses,
            "quick": self.quick,
            "rows": self.train.total("rows"),
            "bad": [bad_row_dict(part, row) for part, row in self.bad],
            "dropped": self.train.total("dropped"),
            "images": self.train.total("images"),
            "visual_tokens": self.train.total("visual_tokens"),
            "about_pictures": self.about_pictures,
            "embedded": self.train.total("embedded"),
            "tokens": self.train.total("tokens"),
            "trained_tokens": self.train.total("trained_tokens"),
            "epoch": dict(epoch),
            "steps": arithmetic.get("num_steps", missing),
            "steps_per_epoch": arithmetic.get("steps_per_epoch", missing),
            "micro_batches": arithmetic.get("micro_batches_per_step", missing),
            "packs": self.num_packs,
            "batch": arithmetic,
            "sources": self.train.as_rows(),
            "eval": self._eval(),
            "longest": longest(self.train),
            "lengths": [] if self.quick else histogram_dicts(self.train.lengths),
            "unknown_keys": dict(self.train.measured.unknown_keys.most_common()),
            "warnings": self.warnings,
        }

    @property
    def num_packs(self) -> int | None:
        """Packs of an epoch; None without packing, or when nothing is known about lengths."""
        if not self.packed or self.quick:
            return None
        return self.plan.packs_per_epoch if self.plan else 0

    def _eval(self) -> dict[str, Any] | None:
        if self.eval is None:
            return None
        names = ("rows", "dropped", "images", "visual_tokens", "embedded", "tokens", "trained_tokens")
        return {**{name: self.eval.total(name) for name in names}, "sources": self.eval.as_rows()}


def check(
    config: RunConfig, opened: OpenedFolder, *, world: int = 1, decode: bool = False, quick: bool = False
) -> Report:
    """Read every row of the training and eval sources.

    Args:
        world: devices to plan for.
        decode: look at every pixel.
        quick: look at rows, marks and headers alone; nothing is tokenised, prepared or planned.

    Raises:
        DataError: a source that cannot be opened. ConfigError: batch sizes that do not divide. Bad rows do not raise.
    """
    packed, why_not_packed = resolve_packing(config, opened)
    train = _part(config.data.sources, config, opened, decode=decode, quick=quick)
    evaluated = None
    if config.data.eval:
        evaluated = _part(config.data.eval, config, opened, decode=decode, quick=quick)
        refuse_mixing(evaluated.corpus)
    plan, no_plan = None, None
    try:
        if quick:
            mixture_of(train.usable, train.corpus, config)
        else:
            plan = plan_rows(
                train.usable,
                train.measured,
                train.corpus,
                config,
                world=world,
                packed=packed,
                shared_length=opened.shared_length,
            )
        if evaluated is not None:
            rows_to_evaluate(evaluated.usable)
    except DataError as error:
        no_plan = error
    report = Report(
        train=train,
        eval=evaluated,
        plan=plan,
        no_plan=no_plan,
        packed=packed,
        quick=quick,
        decoded=decode,
        why_not_packed=why_not_packed,
        max_length=config.data.max_length,
        max_bad_share=config.data.max_bad_share,
        about_pictures=opened.family.about_pictures(opened.spec),
    )
    report.warnings = _warnings(report)
    return report


def _part(
    sources: tuple[AnySource, ...], config: RunConfig, opened: OpenedFolder, *, decode: bool, quick: bool
) -> Part:
    data = config.data
    into = prepared_folder(config)
    corpus = open_corpus(sources, allow=data.allow, memory=into)
    if quick:
        measured = look_over(corpus, opened, workers=data.workers, decode=decode)
    else:
        look: Look = "pixels" if decode else "headers"
        measured = prepare(corpus, opened, into=into, workers=data.workers, look=look).measured
    judged = judge(measured, corpus, data)
    counts = _counts(corpus, measured, judged, quick=quick)
    return Part(corpus=corpus, measured=measured, judged=judged, sources=counts)


def _counts(corpus: Corpus, measured: Measured, judged: Judged, *, quick: bool) -> list[SourceCounts]:
    borders = corpus.borders
    num_bad = np.histogram([row.index for row in judged.bad], bins=borders)[0] if judged.bad else 0 * borders[1:]
    kept = [judged.usable[start:end] for start, end in pairwise(borders)]
    mixed = epoch_counts([int(own.sum()) for own in kept], [source.options for source in corpus.sources])
    counts = []
    for number, source in enumerate(corpus.sources):
        own = slice(int(borders[number]), int(borders[number + 1]))

        def usable_sum(column: np.ndarray, own: slice = own) -> int:
            return int(column[own][judged.usable[own]].sum(dtype=np.int64))

        counts.append(
            SourceCounts(
                name=source.name,
                mixing=mixing_text(source.options),
                rows=len(source),
                bad=int(num_bad[number]),
                dropped=len(source) - int(kept[number].sum()) - int(num_bad[number]),
                images=usable_sum(measured.num_images),
                visual_tokens=usable_sum(measured.num_visual),
                embedded=usable_sum(measured.num_embedded),
                tokens=None if quick else usable_sum(measured.num_tokens),
                trained_tokens=None if quick else usable_sum(measured.num_trained),
                epoch_rows=mixed[number],
            )
        )
    return counts


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


def histogram_dicts(lengths: np.ndarray) -> list[dict[str, int]]:
    return [{"up_to": limit, "rows": rows} for limit, rows in histogram(lengths)]


def longest(part: Part) -> dict[str, Any] | None:
    """Origin and tokens of the longest readable row, over-long ones included."""
    row = int(part.measured.num_tokens.argmax())
    tokens = int(part.measured.num_tokens[row])
    return {"origin": part.corpus.origin(row), "tokens": tokens} if tokens else None


def _warnings(report: Report) -> list[str]:
    warnings = [*_odd_rows(report.train), *(_odd_rows(report.eval) if report.eval else [])]
    warnings += _common_answer(report.train)
    warnings += _listed_twice(report.train.corpus)
    if report.eval:
        trained = {source.rows.digest: source.name for source in report.train.corpus.sources}
        for source in report.eval.corpus.sources:
            if source.rows.digest in trained:
                warnings.append(
                    f"{source.name} under data.eval is the same file as {trained[source.rows.digest]} under "
                    "data.sources: the eval loss will say nothing about new rows."
                )
    return warnings


def _listed_twice(corpus: Corpus) -> list[str]:
    """Sources that say the same under two entries: an epoch takes their rows from each."""
    first: dict[tuple[str, int], str] = {}
    found = []
    for source in corpus.sources:
        key = (source.rows.digest, len(source))
        if key in first:
            other = f"the same rows as {first[key]}" if first[key] != source.name else "listed twice"
            found.append(f"{source.name} under data.sources is {other}: an epoch takes its rows from each entry.")
        first.setdefault(key, source.name)
    return found


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
    for start, end in pairwise(part.corpus.borders):
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
