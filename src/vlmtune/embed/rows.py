"""Files of rows that are written beside embeddings, and what they may replace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.errors import UsageError
from vlmtune.files import write_atomic


def write_rows_file(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows: one a line into .jsonl, else a JSON list.

    Raises:
        VlmtuneError: the file cannot be written.
    """
    if file.suffix == ".jsonl":
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_atomic(file, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def refuse_other_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows that people have worked on are not replaced: only a file of which each row would be written again.

    Raises:
        UsageError: the file is there, and holds something else than some of `rows`.
    """
    if not file.exists():
        return
    try:
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]  # other line ends may stand inside of strings
        held = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError, RecursionError):
        held = None
    # As text: JSON reads 1, 1.0 and true as equal, a person does not.
    known = {json.dumps(row, sort_keys=True) for row in rows}
    if isinstance(held, list) and all(json.dumps(row, sort_keys=True) in known for row in held):
        return
    raise UsageError(
        "the file is there, and holds rows that would not be written again", where=str(file),
        remedy="Choose another name, move the file away, or replace it with --overwrite.",
    )  # fmt: skip
