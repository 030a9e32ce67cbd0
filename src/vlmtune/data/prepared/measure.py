"""What is known about the rows of a corpus without their pixels: lengths for the plan, and all that is wrong or odd."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy as np

from vlmtune.data.rows.marks import MARK
from vlmtune.data.sample import Box, Laid, Planned, Sample, pictures_of, pseudo_texts_of
from vlmtune.errors import DataError

Kind = Literal["row", "length"]

MOST_TOKENS = 2**31 - 1  # of a row; lengths are counted in int32
SMALL_SIDE = 8  # pixels; a picture below this is suspicious


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained. `kind`: "row" for what it says, "length" for more tokens than `max_length`."""

    origin: str
    reason: str
    index: int
    kind: Kind = "row"


COLUMNS: dict[str, type[np.generic]] = {
    "num_tokens": np.int32,
    "num_trained": np.int32,
    "num_images": np.int32,
    "num_visual": np.int32,
    "id_hash": np.uint64,
    "answer_hash": np.uint64,
    "marks_in_answers": np.int32,
    "smallest_side": np.int32,
    "num_embedded": np.int32,
}
"""The arrays of `Measured`, in the order of `counts`."""


@dataclass(slots=True, kw_only=True)
class Measured:
    """What is known about the n rows of a corpus without their pixels; zeros for a bad row."""

    num_tokens: np.ndarray
    """int32 (n,)"""
    num_trained: np.ndarray
    """int32 (n,), positions that give a loss."""
    num_images: np.ndarray
    """int32 (n,), frames of videos included."""
    num_visual: np.ndarray
    """int32 (n,), those of the tokens that pictures take."""
    id_hash: np.ndarray
    """uint64 (n,), of the row's `id`; 0 without one."""
    answer_hash: np.ndarray
    """uint64 (n,), of all answers of the row together; 0 for a bad row."""
    marks_in_answers: np.ndarray
    """int32 (n,), `<image>` marks that stand in answers and count as text there."""
    smallest_side: np.ndarray
    """int32 (n,), in pixels, over the row's pictures; 0 without any."""
    num_embedded: np.ndarray
    """int32 (n,), those of the tokens that are rows of pseudo-text."""
    bad: list[BadRow] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    """Top-level keys of rows that nothing reads, and how many rows have them."""


def counts(sample: Sample, laid: Laid) -> tuple[int, ...]:
    """One row's entries in `COLUMNS`.

    Raises:
        DataError: nothing in the row would be trained, or it has more tokens than can be counted.
    """
    trained = laid.num_trained
    if not trained:
        raise DataError("the row has no trained token", where=sample.origin, expected="an answer with some text")
    if laid.num_tokens > MOST_TOKENS:
        raise DataError(
            f"the row has {laid.num_tokens:,} tokens",
            where=sample.origin,
            expected=f"at most {MOST_TOKENS:,}, which no computer has room for",
            remedy="Look at model.image and model.video, if the row itself is of a usual size.",
        )
    return (laid.num_tokens, trained, *seen(sample, laid.media))


def seen(sample: Sample, media: Planned) -> tuple[int, ...]:
    """The entries that need no tokens: all but the first two."""
    replies = [message for message in sample.messages if message.role == "assistant"]
    answers = [message.text for message in replies]
    boxes = [repr(part) for message in replies for part in message.parts if isinstance(part, Box)]
    pictures = pictures_of(media)
    return (
        len(pictures),
        sum(plan.num_tokens for _, plan in pictures),
        _hash(sample.id) if sample.id is not None else 0,
        _hash("\0".join(answers + boxes)),
        sum(len(MARK.findall(answer)) for answer in answers if "<" in answer),
        min((min(plan.size) for _, plan in pictures), default=0),
        sum(plan.num_tokens for _, plan in pseudo_texts_of(media)),
    )


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
