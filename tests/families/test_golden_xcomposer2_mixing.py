"""How many rows XComposer's `data.txt` takes of each file, and in which order: the official records beside ours.

Verdicts, by what a record holds:

=========  ==============================================================  ===========================================
equal      the official count is the exact one                             that count; no row more often than another
mended     a count cut off, or none at all where the exact one is a row    the exact count, rounded half up
           or more: ratios that leave no row, lines without a number,
           blank lines, tabs, two spaces, a file on two lines
refused    the number is 0, or rounds to no row                            our error names the line, or the file in it
mended     the order: drawn with replacement, one picture row to two       every row as often as its line says, in an
           rows of text whatever the lines say                             order drawn from the run's seed
=========  ==============================================================  ===========================================
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import golden
import numpy as np
import pytest

from vlmtune.config.schema import SourceConfig
from vlmtune.data.plan.mixture import Mixture, make_mixture
from vlmtune.data.rows.lists import expand
from vlmtune.errors import VlmtuneError

pytestmark = pytest.mark.golden

_NO_ROW = r"data\.txt:1: the number is 0; |repeat \S+ of \d+ rows? of \w+\.json is less than half a row"
Verdict = Literal["equal", "mended", "refused"]

_SAMPLING = golden.root() / "xcomposer2" / "sampling.json"
_DRAWS = golden.root() / "xcomposer2" / "mix_dataset.json"


@cache
def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _exact(num_rows: int, number: str | None, *, given_num: bool) -> int:
    """The count as on paper, rounded half up: thousands of rows, or a ratio; without a number the file once."""
    wanted = Fraction(number or "1") * (1000 if given_num and number else num_rows)
    return math.floor(wanted + Fraction(1, 2))


def _mixed(lines: Sequence[str], sizes: Sequence[int], folder: Path, *, given_num: bool = True) -> Mixture:
    """What our program makes of the lines of a data.txt; sizes: rows of the file of each line that names one."""
    listed = folder / "data.txt"
    listed.write_text("\n".join(lines) + "\n")
    sources = [one.source for one in expand([SourceConfig(path=str(listed), given_num=given_num)])]
    names = [Path(source.path).name for source in sources]
    return make_mixture(np.ones(sum(sizes), bool), sizes, sources, names, seed=0)


def _table() -> list[dict[str, Any]]:
    return list(_read(_SAMPLING).get("table", ()))


def _verdict(row: dict[str, Any]) -> Verdict:
    exact = _exact(row["len"], row["number"], given_num=row["given_num"])
    return "refused" if exact < 1 else "equal" if row["count"] == exact else "mended"


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=golden.name(_SAMPLING, "table", str(number))) for number, row in enumerate(_table())]
)
def test_counts(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    line = "a.json" if row["number"] is None else f"a.json {row['number']}"
    if _verdict(row) == "refused":
        with pytest.raises(VlmtuneError, match=_NO_ROW) as refused:
            _mixed([line], [row["len"]], tmp_path, given_num=row["given_num"])
        assert "\n" not in str(refused.value)
        return
    mixture = _mixed([line], [row["len"]], tmp_path, given_num=row["given_num"])
    exact = _exact(row["len"], row["number"], given_num=row["given_num"])
    taken = Counter(mixture.taken(0).tolist())
    assert mixture.epoch_size == taken.total() == exact
    assert max(taken.values()) - min(taken.values()) <= 1 and len(taken) == min(row["len"], exact)
    if _verdict(row) == "equal":
        assert row["distinct"] in (None, len(taken)), "officially as many different rows"
    elif row["count"] is not None:
        assert row["count"] == exact - 1, "officially cut off below the exact count"


def _special() -> list[str]:
    return list(_read(_SAMPLING).get("special", ()))


@pytest.mark.parametrize("name", [pytest.param(name, id=golden.name(_SAMPLING, name)) for name in _special()])
def test_lines(name: str, tmp_path: Path) -> None:
    record = _read(_SAMPLING)["special"][name]
    given_num = name.rpartition("=")[2] == "True"
    lines = [line.split() for line in record["lines"] if line.strip()]
    sizes = []
    for path, _ in lines:
        (tmp_path / path).touch()
        sizes.append(int(Path(path).stem.split("_")[1]))
    exact = [_exact(size, number, given_num=given_num) for size, (_, number) in zip(sizes, lines, strict=True)]
    if not all(exact):
        with pytest.raises(VlmtuneError, match=_NO_ROW) as refused:
            _mixed(record["lines"], sizes, tmp_path, given_num=given_num)
        assert "\n" not in str(refused.value)
        return
    mixture = _mixed(record["lines"], sizes, tmp_path, given_num=given_num)
    assert list(mixture.counts) == exact
    plain = all(line == " ".join(line.split()) and line for line in record["lines"])
    if "counts" in record and plain and len({path for path, _ in lines}) == len(lines):
        assert record["counts"] == exact and record["epoch_len"] == mixture.epoch_size


def _draws() -> list[str]:
    return list(_read(_DRAWS).get("draws", ()))


@pytest.mark.parametrize("key", [pytest.param(key, id=golden.name(_DRAWS, key)) for key in _draws()])
def test_the_order_of_an_epoch(key: str, tmp_path: Path) -> None:
    record, lines = _read(_DRAWS)["draws"][key], key.partition(" | ")[0].split("; ")
    names = [Path(line.split()[0]) for line in lines]
    sizes = [int(name.stem.split("_")[1]) for name in names]
    for name in names:
        (tmp_path / name).touch()
    mixture = _mixed(lines, sizes, tmp_path)
    assert list(mixture.counts) == record["counts"]
    batch_size = int(key.rpartition(" ")[2])
    assert record["epoch_len"] == mixture.epoch_size // batch_size
    first, again, other = (mixture.epoch(epoch).tolist() for epoch in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other) == list(range(sum(sizes)))
    drawn = Counter(text for step in record["sequence"] for text in step[1])
    starts = dict(zip((name.stem.split("_")[0] for name in names), np.cumsum([0, *sizes]).tolist(), strict=False))
    rows = {starts[text.split()[0]] + int(text.split()[1]) for text in drawn}
    assert rows <= set(first), "the records draw the same rows, some more often than others"


def test_verdicts() -> None:
    if not _table():
        pytest.skip(f"no counts are recorded in {_SAMPLING.parent}")
    counts = Counter(map(_verdict, _table()))
    drawn = [[text for step in draw["sequence"] for text in step[1]] for draw in _read(_DRAWS)["draws"].values()]
    repeated = sum(len(set(texts)) < len(texts) for texts in drawn)
    print(dict(counts), f"orders mended: {len(_draws())}, of which a row is drawn twice in {repeated}")
    assert counts["equal"] > counts["mended"] > 0 and counts["refused"]
