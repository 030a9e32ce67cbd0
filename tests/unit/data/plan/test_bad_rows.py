"""Which rows are used, when a run is refused, and the list of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import config, measured, rows_of

from vlmtune.data.plan.bad_rows import BAD_ROWS_FILE, judge, usable_rows, write_bad_rows
from vlmtune.data.prepared.measure import BadRow
from vlmtune.errors import DataError

KIND = st.sampled_from(["good", "broken", "long"])


def bad_row(i: int) -> BadRow:
    return BadRow(f"a.jsonl:{i + 1}", "it is odd.", i)


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(KIND, min_size=1, max_size=12),
    bad_rows=st.sampled_from(["refuse", "drop"]),
    long_rows=st.sampled_from(["refuse", "drop"]),
    share=st.integers(1, 100),
)
def test_one_rule_for_check_and_train(kinds: list[str], bad_rows: str, long_rows: str, share: int) -> None:
    lengths = [0 if kind == "broken" else 101 if "long" in kind else 50 for kind in kinds]
    data = config(data={"bad_rows": bad_rows, "too_long": long_rows, "max_bad_share": share / 100}).data
    found = measured(lengths, [bad_row(i) for i, kind in enumerate(kinds) if kind == "broken"])
    judged = judge(found, rows_of((len(kinds), {})), data)

    assert judged.usable.tolist() == [kind == "good" for kind in kinds]
    broken = [i for i, kind in enumerate(kinds) if kind == "broken"]
    long = [i for i, kind in enumerate(kinds) if kind == "long"] if long_rows == "refuse" else []
    assert [row.index for row in judged.bad] == sorted(broken + long)
    assert {row.index for row in judged.bad if row.kind == "length"} == set(long)
    over = len(broken) * 100 > share * len(kinds)
    refused = bool(long) or (bool(broken) if bad_rows == "refuse" else over)
    assert (judged.refusal is not None) == refused


def test_the_refusal_names_the_first_row_or_the_share() -> None:
    rows: Any = rows_of((200, {}))
    found = measured(np.full(200, 10), [bad_row(7), bad_row(3)])
    with pytest.raises(DataError) as caught:
        usable_rows(found, rows, config().data)
    assert str(caught.value) == "a.jsonl:4: it is odd. 1 more row is bad; `vlmtune check` lists all of them."
    dropping = {"bad_rows": "drop", "max_bad_share": 0.01}
    assert usable_rows(found, rows, config(data=dropping).data).sum() == 198
    with pytest.raises(
        DataError, match=r"^data\.max_bad_share: 2 of 200 rows are bad, 1\.00%; the first is a\.jsonl:4"
    ):
        usable_rows(found, rows, config(data={**dropping, "max_bad_share": 0.005}).data)


def test_a_share_is_a_decimal() -> None:
    """29 of 100 rows are 0.29 of them; as binary numbers 0.29 · 100 is less than 29."""
    found = measured(np.full(100, 10), [bad_row(i) for i in range(29)])
    data = config(data={"bad_rows": "drop", "max_bad_share": 0.29}).data
    assert judge(found, rows_of((100, {})), data).refusal is None


def test_the_list_is_written_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    assert write_bad_rows(folder, []) is None and not folder.exists()
    rows = [("data.sources", bad_row(3)), ("data.eval", BadRow("e.jsonl:1", "Größe …", 0, "length"))]
    file = write_bad_rows(folder, rows)
    assert file == folder / BAD_ROWS_FILE
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"origin": "a.jsonl:4", "reason": "it is odd.", "kind": "row", "in": "data.sources"},
        {"origin": "e.jsonl:1", "reason": "Größe …", "kind": "length", "in": "data.eval"},
    ]
    assert write_bad_rows(folder, []) is None and not file.exists()
