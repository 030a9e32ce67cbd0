"""Curves as inline SVG: the right points at the right places, whatever the values."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vlmtune.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Curve, loss_chart


def drawn(chart: Chart) -> ET.Element:
    return ET.fromstring(str(chart.svg()))


def path_of(root: ET.Element, number: int) -> list[tuple[float, float]]:
    (path,) = (node for node in root.iter("path") if node.get("class") == f"curve c{number}")
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.get("d") or "")]


def texts(root: ET.Element, name: str) -> list[str]:
    return [node.text or "" for node in root.iter("text") if name in (node.get("class") or "").split()]


def test_points_lie_where_the_axes_say() -> None:
    root = drawn(Chart(title="loss", curves=[Curve(label="train", points=[(0, 2.0), (50, 1.0), (100, 0.5)])]))
    points = path_of(root, 0)
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    floor = HEIGHT - BOTTOM
    heights = [floor - y for _, y in points]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[0] == pytest.approx(4 * heights[2], abs=0.3)
    assert {"0", "20", "40", "60", "80", "100"} <= set(texts(root, "x"))


def test_a_wide_range_gets_a_logarithmic_axis() -> None:
    root = drawn(Chart(title="loss", curves=[Curve(label="train", points=[(1, 1.0), (2, 0.1), (3, 0.01)])]))
    (_, a), (_, b), (_, c) = path_of(root, 0)
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert any("logarithmic" in text for text in texts(root, "name"))


@pytest.mark.parametrize(
    "points",
    [[], [(7.0, 0.3)], [(1, 0.0), (2, 0.0)], [(1, -1.0), (2, 3.0)], [(5, 2.5), (6, 2.5)], [(1, 1e-9), (2, 1e6)]],
)
def test_odd_values_stay_inside_the_picture(points: list[tuple[float, float]]) -> None:
    root = drawn(Chart(title="odd", curves=[Curve(label="a", points=points, style="marks")], marked=(1, "best")))
    for node in root.iter("circle"):
        assert LEFT <= float(node.get("cx") or -1) <= WIDTH - RIGHT
        assert TOP <= float(node.get("cy") or -1) <= HEIGHT - BOTTOM
    assert len(list(root.iter("circle"))) == len(points)


def test_words_are_escaped_and_the_picture_has_a_text_of_its_own() -> None:
    chart = Chart(title='<b>"x"</b>', curves=[Curve(label="a<b", points=[(1, 2.0), (9, 1.0)])], marked=(9, "<i>"))
    root = drawn(chart)  # parsing fails where a mark slipped through
    assert root.get("aria-label") == '<b>"x"</b>: a<b 2 at step 1, 1 at step 9'


def test_the_chart_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0, "learning_rate": {"language": 0.1}},
        {"step": 2, "eval_loss": 2.0, "epoch": 1.0},
        {"step": 3, "loss": math.inf},
        {"step": 4, "loss": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    chart = loss_chart(tmp_path, "run")
    assert {curve.label: list(curve.points) for curve in chart.curves} == {
        "train": [(1, 3.0), (4, 1.0)],
        "eval": [(2, 2.0)],
    }
    assert chart.marked is None
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-2", "eval_loss": 2.0}))
    assert loss_chart(tmp_path, "run").marked == (2.0, "best")
    assert texts(drawn(loss_chart(tmp_path, "run")), "mark") == ["best"]
