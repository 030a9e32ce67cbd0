"""Evaluate a loaded model on rows: token-weighted loss, generated answers, metrics, and one line per row."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import Box, Encoded
from vlmtune.errors import DataError
from vlmtune.eval.metrics import Metrics, exact, score
from vlmtune.eval.tasks import Task, num_tasks, tasks
from vlmtune.files import write_atomic
from vlmtune.infer.session import Session, to_device
from vlmtune.nn.side_inputs import hand_over
from vlmtune.progress import track
from vlmtune.versions import versions

FORMAT_VERSION = 1
RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
_WINDOW = 32  # batches whose rows are sorted by length together


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """max_new_tokens, batch_size: of the generation. limit: rows from the front; None for all.

    max_length, too_long: as in training, so that the loss is over the same rows; None keeps rows of every length.
    """

    max_new_tokens: int = 64
    batch_size: int = 8
    limit: int | None = None
    max_length: int | None = None
    too_long: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row: the prompt as plain text, what should have been said, and what was said."""

    origin: str
    id: str | None
    prompt: str
    reference: str
    prediction: str
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """loss: cross-entropy in nats, the mean over `trained_tokens`. count: rows evaluated. dropped: rows too long."""

    count: int
    dropped: int
    loss: float
    trained_tokens: int
    metrics: Metrics
    predictions: tuple[Prediction, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "dropped": self.dropped,
            "loss": self.loss,
            "trained_tokens": self.trained_tokens,
            "metrics": self.metrics.as_dict(),
            "seconds": round(self.seconds, 2),
        }


def evaluate(session: Session, corpus: Corpus, settings: EvalSettings) -> EvalResult:
    """Loss and generated answers of the model on the rows.

    Raises:
        DataError: a bad row, a row longer than max_length when such rows are refused, or no row that is short enough.
    """
    began = time.perf_counter()
    summed, trained, dropped = 0.0, 0, 0
    found: dict[int, Prediction] = {}
    total = num_tasks(corpus, settings.limit)
    num_batches = -(-total // settings.batch_size)
    for part in track(_parts(session, corpus, settings), total=num_batches, label="evaluating"):
        dropped += part.dropped
        summed += part.loss
        trained += part.trained
        found.update(part.predictions)
    if not found:
        raise DataError(f"all {dropped} rows are longer than data.max_length", remedy="Raise data.max_length.")
    ordered = tuple(found[i] for i in sorted(found))
    metrics = score([one.prediction for one in ordered], [one.reference for one in ordered])
    return EvalResult(
        count=len(ordered),
        dropped=dropped,
        loss=summed / max(trained, 1),
        trained_tokens=trained,
        metrics=metrics,
        predictions=ordered,
        seconds=time.perf_counter() - began,
    )


@dataclass(slots=True)
class _Part:
    """What one batch adds to the result."""

    predictions: dict[int, Prediction]
    loss: float
    trained: int
    dropped: int


def _parts(session: Session, corpus: Corpus, settings: EvalSettings) -> Iterator[_Part]:
    """Batches of rows of like length, sorted inside a window, so that long files need not be held."""
    rows = enumerate(tasks(corpus, settings.limit))
    while window := list(islice(rows, _WINDOW * settings.batch_size)):
        encoded = [_encode(session, task, settings) for _, task in window]
        kept = [(i, task, row) for (i, task), row in zip(window, encoded, strict=True) if row is not None]
        kept.sort(key=lambda entry: entry[2].num_tokens)
        dropped = len(window) - len(kept)
        for start in range(0, len(kept), settings.batch_size):
            batch = kept[start : start + settings.batch_size]
            summed, trained = summed_loss(session, [row for _, _, row in batch], settings.max_length)
            yield _Part(_answer(session, batch, settings), summed, trained, dropped)
            dropped = 0
        if dropped:
            yield _Part({}, 0.0, 0, dropped)


def _encode(session: Session, task: Task, settings: EvalSettings) -> Encoded | None:
    row = encode(task.row, session.opened)
    if settings.max_length is None or row.num_tokens <= settings.max_length:
        return row
    if settings.too_long == "drop":
        return None
    raise DataError(
        f"the row has {row.num_tokens} tokens, and data.max_length is {settings.max_length}",
        where=row.origin,
        remedy="Raise data.max_length, or set data.too_long: drop.",
    )


def _answer(
    session: Session, batch: Sequence[tuple[int, Task, Encoded]], settings: EvalSettings
) -> dict[int, Prediction]:
    answers = session.generate(
        [task.prompt for _, task, _ in batch], settings.max_new_tokens, batch_size=settings.batch_size
    )
    found = {}
    for (i, task, row), answer in zip(batch, answers, strict=True):
        has_box = any(isinstance(part, Box) for part in task.row.messages[-1].parts)
        reference = session.last_answer(row) if has_box else task.reference
        found[i] = Prediction(
            origin=task.row.origin,
            id=task.row.id,
            prompt=task.question,
            reference=reference,
            prediction=answer,
            exact=exact(answer, reference),
        )
    return found


def summed_loss(session: Session, rows: Sequence[Encoded], max_length: int | None = None) -> tuple[float, int]:
    """Sum of the cross-entropy over the trained tokens of `rows`, and their number.

    Rows share a sequence where the model packs (up to `max_length` tokens, or one row if that is longer).
    """
    summed, trained = 0.0, 0
    opened = session.opened
    size = min(max_length or 4096, opened.shared_length or 2**31)
    for pack in _packs(rows, size, packs=opened.why_not_packed is None):
        batch = collate([pack], session.opened, stand_in=False)
        inputs = hand_over(session.model, to_device(batch.inputs, session.device, session.dtype))
        # One row: the mask becomes positions, which every transformers model takes.
        inputs["logits_to_keep"] = inputs["logits_to_keep"][0].nonzero().flatten()
        with torch.inference_mode():
            logits = session.model(**inputs).logits[0].float()
            targets = batch.targets.to(session.device)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        summed += float(loss)
        trained += len(targets)
    return summed, trained


def _packs(rows: Sequence[Encoded], size: int, *, packs: bool) -> Iterator[list[Encoded]]:
    pack: list[Encoded] = []
    for row in rows:
        if pack and (not packs or sum(one.num_tokens for one in pack) + row.num_tokens > size):
            yield pack
            pack = []
        pack.append(row)
    if pack:
        yield pack


def write_results(out: Path, result: EvalResult, session: Session, corpus: Corpus, settings: EvalSettings) -> Path:
    """`results.json` and `predictions.jsonl` in `out`, each replaced whole; returns the path of the former.

    Raises:
        VlmtuneError: a file cannot be written.
    """
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in result.predictions]
    write_atomic(out / PREDICTIONS_FILE, "".join(lines))
    located = session.located
    record = {
        "version": FORMAT_VERSION,
        "model": str(located.path),
        "base": str(located.base) if located.base else None,
        "data": [
            {"path": source.rows.files[0], "rows": len(source), "blake2b": source.rows.digest}
            for source in corpus.sources
        ],
        "settings": {
            **asdict(settings),
            "device": str(session.device),
            "dtype": str(session.dtype).removeprefix("torch."),
        },
        **result.as_dict(),
        "versions": versions(),
    }
    write_atomic(out / RESULTS_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return out / RESULTS_FILE
