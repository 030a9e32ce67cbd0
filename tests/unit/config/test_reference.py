"""docs/configuration.md is what the schema says."""

from __future__ import annotations

import re
from pathlib import Path

from vlmtune.config.explain import leaves
from vlmtune.config.reference import render

REPOSITORY = Path(__file__).parents[3]


def test_the_committed_page_is_up_to_date() -> None:
    committed = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == render(), "run: make docs"


def test_every_option_has_a_row() -> None:
    shown = set(re.findall(r"^\| `(\w+)` \|", render(), flags=re.MULTILINE))
    sections = {"model", "tuning", "data", "train", "eval"}
    assert {path.rpartition(".")[2] for path in leaves()} - sections <= shown


def test_values_defaults_and_limits_are_told() -> None:
    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `")}
    assert rows["max_length"].startswith("| `max_length` | whole number ≥ 8 | `4096` | Longest row")
    assert "number ≥ 0, < 1" in rows["warmup"]
    assert "**required**" in rows["path"]
    assert "`sdpa`, `eager`" in rows["attention"]
    assert "| whole number ≥ 1, ≤ 1,000 | – |" in rows["max_tiles"]
