"""Which rows of a corpus a run uses, what it does about the others, and the list of them beside the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from vlmtune.config.schema import DataConfig
from vlmtune.data.prepared.measure import BadRow, Measured
from vlmtune.data.rows.corpus import Corpus
from vlmtune.errors import DataError
from vlmtune.files import write_atomic

BAD_ROWS_FILE = "bad_rows.jsonl"

_SHORTER = "Raise it, set data.too_long: drop, or shorten the row."
_SHORTER_WITH_PICTURES = "Raise it, set data.too_long: drop, or allow smaller pictures under model.image."


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What becomes of the n rows of a corpus. `check` and `train` both ask `judge`, so they cannot disagree.

    usable: boolean (n,), the rows that are trained (or would be, if nothing were refused).
    bad: the rows that cannot be trained, in order; over-long ones only where `data.too_long` refuses them.
    refusal: why a run over these rows does not start; None if it does.
    """

    usable: np.ndarray
    bad: list[BadRow]
    refusal: DataError | None


def judge(measured: Measured, corpus: Corpus, data: DataConfig) -> Judged:
    """Apply `data.bad_rows`, `data.max_bad_share` and `data.too_long`.

    `bad_rows` decides about rows that cannot be read as they stand, `too_long` alone about rows that are too long: a
    run that drops the former still refuses the latter, unless it drops both.
    """
    broken = measured.bad
    usable = measured.num_tokens <= data.max_length
    usable[[row.index for row in broken]] = False
    long = too_long(measured, corpus, data) if data.too_long == "refuse" else []
    refused = sorted([*(broken if data.bad_rows == "refuse" else []), *long], key=lambda row: row.index)
    refusal = None
    if refused:
        refusal = _first_of(refused)
    elif len(broken) > Fraction(str(data.max_bad_share)) * len(corpus):
        refusal = _over_the_cap(broken, corpus, data)
    return Judged(usable=usable, bad=sorted([*broken, *long], key=lambda row: row.index), refusal=refusal)


def usable_rows(measured: Measured, corpus: Corpus, data: DataConfig) -> np.ndarray:
    """Boolean (n,): the rows that a run trains on.

    Raises:
        DataError: the run is refused; names the first bad row.
    """
    judged = judge(measured, corpus, data)
    if judged.refusal is not None:
        raise judged.refusal
    return judged.usable


def too_long(measured: Measured, corpus: Corpus, data: DataConfig) -> list[BadRow]:
    """The rows with more than `max_length` tokens; the caller looks at `data.too_long`."""
    return [
        BadRow(
            corpus.origin(int(i)),
            f"the row has {int(measured.num_tokens[i]):,} tokens; expected at most {data.max_length:,} "
            f"(data.max_length). {_SHORTER_WITH_PICTURES if measured.num_images[i] else _SHORTER}",
            int(i),
            "length",
        )
        for i in np.flatnonzero(measured.num_tokens > data.max_length)
    ]


def write_bad_rows(folder: Path, bad: Sequence[tuple[str, BadRow]]) -> Path | None:
    """Write the list of all bad rows into `folder`, one JSON object a line; a list of former ones is removed.

    Args:
        bad: (data.sources | data.eval, row).

    Returns:
        The file, or None when there is no bad row.
    """
    file = folder / BAD_ROWS_FILE
    if not bad:
        file.unlink(missing_ok=True)
        return None
    lines = [json.dumps(bad_row_dict(part, row), ensure_ascii=False) for part, row in bad]
    write_atomic(file, "\n".join(lines) + "\n")
    return file


def bad_row_dict(part: str, row: BadRow) -> dict[str, str]:
    return {"origin": row.origin, "reason": row.reason, "kind": row.kind, "in": part}


def _first_of(bad: Sequence[BadRow]) -> DataError:
    first, others = bad[0], len(bad) - 1
    more = f"{others:,} more {'row is' if others == 1 else 'rows are'} bad; `vlmtune check` lists all of them."
    return DataError(first.reason, where=first.origin, remedy=more if others else "")


def _over_the_cap(bad: Sequence[BadRow], corpus: Corpus, data: DataConfig) -> DataError:
    first = min(bad, key=lambda row: row.index)
    share = len(bad) / len(corpus)
    return DataError(
        f"{len(bad):,} of {len(corpus):,} rows are bad, {share:.2%}; the first is {first.origin}",
        where="data.max_bad_share",
        expected=f"at most {data.max_bad_share:.2%}, as data.bad_rows says drop",
        remedy="See all of them with `vlmtune check`; correct the rows or their paths, or raise data.max_bad_share.",
    )
