"""Curves of a run as inline SVG: no script, no external file, readable in print and by screen readers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 40
LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which the vertical axis is logarithmic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """points: (step, value), finite, in the order of the steps. style: `line`, or `marks` for few, important points."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One set of axes. marked: a step with a word for it, drawn as an upright line (the checkpoint that was kept)."""

    title: str
    curves: Sequence[Curve]
    x_label: str = "optimizer step"
    y_label: str = "loss"
    marked: tuple[float, str] | None = None

    def svg(self) -> Markup:
        """The picture, with its own text for those who cannot see it."""
        return _draw(self)


def loss_chart(run_dir: Path, title: str) -> Chart:
    """Training and eval loss of a run folder, from its metrics.jsonl, and the best checkpoint from its best.json."""
    train: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a process that was killed left its last line unfinished
        for key, points in (("loss", train), ("eval_loss", held_out)):
            if key in values and math.isfinite(values[key]):
                points.append((values["step"], values[key]))
    curves = [Curve(label="train", points=train)]
    if held_out:
        curves.append(Curve(label="eval", points=held_out, style="marks"))
    return Chart(title=title, curves=curves, marked=_best(run_dir))


def _best(run_dir: Path) -> tuple[float, str] | None:
    file = run_dir / "best.json"
    if not file.is_file():
        return None
    name = json.loads(file.read_text(encoding="utf-8")).get("checkpoint") or ""
    step = str(name).rpartition("-")[2]
    return (float(step), "best") if step.isdecimal() else None


@dataclass(frozen=True, slots=True)
class _Axis:
    """A range of values on a range of pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fractions = (1,) if len(decades) > 3 else (1, 2, 5)
            found = [factor * 10.0**decade for decade in decades for factor in fractions]
        else:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            found = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [tick for tick in found if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def _round_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _axes(chart: Chart) -> tuple[_Axis, _Axis]:
    steps = [step for curve in chart.curves for step, _ in curve.points] or [0.0]
    values = [value for curve in chart.curves for _, value in curve.points] or [0.0, 1.0]
    low, high = min(values), max(values)
    x = _Axis(min(0.0, *steps), max(1.0, *steps), LEFT, WIDTH - RIGHT)
    if low > 0 and high / low >= LOG_FROM:
        return x, _Axis(low / 1.15, high * 1.15, HEIGHT - BOTTOM, TOP, log=True)
    floor = min(0.0, low)
    return x, _Axis(floor, high + 0.05 * (high - floor) if high > floor else floor + 1, HEIGHT - BOTTOM, TOP)


def _draw(chart: Chart) -> Markup:
    x, y = _axes(chart)
    parts = [*_grid(chart, x, y)]
    if chart.marked is not None and x.low <= chart.marked[0] <= x.high:
        step, word = chart.marked
        place = x.at(step)
        parts.append(Markup('<path class="mark" d="M{0} {1}V{2}"/>').format(place, TOP, HEIGHT - BOTTOM))
        parts.append(Markup('<text class="mark" x="{}" y="{}">{}</text>').format(place - 5, TOP + 11, word))
    for number, curve in enumerate(chart.curves):
        parts.extend(_curve(curve, number, x, y))
    parts.extend(_legend(chart.curves))
    label = "; ".join(_in_words(curve) for curve in chart.curves if curve.points)
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}: {}">').format(
        WIDTH, HEIGHT, chart.title, label
    )
    return head + Markup("\n").join(parts) + Markup("</svg>")


def _in_words(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    return f"{curve.label} {start:.3g} at step {first:g}, {end:.3g} at step {last:g}"


def _grid(chart: Chart, x: _Axis, y: _Axis) -> list[Markup]:
    parts = []
    for tick in y.ticks():
        place = y.at(tick)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, place, WIDTH - RIGHT))
        parts.append(Markup('<text class="y" x="{}" y="{}">{}</text>').format(LEFT - 8, place + 4, f"{tick:g}"))
    for tick in x.ticks():
        parts.append(
            Markup('<text class="x" x="{}" y="{}">{}</text>').format(x.at(tick), HEIGHT - BOTTOM + 17, f"{tick:g}")
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
    parts.append(
        Markup('<text class="name x" x="{}" y="{}">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, chart.x_label
        )
    )
    y_name = chart.y_label + (" (logarithmic)" if y.log else "")
    parts.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(LEFT - 44, TOP - 16, y_name))
    return parts


def _curve(curve: Curve, number: int, x: _Axis, y: _Axis) -> list[Markup]:
    places = [(x.at(step), y.at(value)) for step, value in curve.points]
    if not places:
        return []
    path = "M" + "L".join(f"{across} {down}" for across, down in places)
    parts = [Markup('<path class="curve c{}" d="{}"/>').format(number, path)]
    if curve.style == "marks":
        for (across, down), (step, value) in zip(places, curve.points, strict=True):
            tip = f"step {step:g}: {curve.label} {value:.4g}"
            parts.append(
                Markup('<circle class="c{}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(
                    number, across, down, tip
                )
            )
    return parts


def _legend(curves: Sequence[Curve]) -> list[Markup]:
    parts = []
    across = WIDTH - RIGHT - sum(34 + 7 * len(curve.label) for curve in curves)
    for number, curve in enumerate(curves):
        parts.append(Markup('<path class="curve key c{}" d="M{} {}h20"/>').format(number, across, TOP - 20))
        parts.append(Markup('<text x="{}" y="{}">{}</text>').format(across + 25, TOP - 16, escape(curve.label)))
        across += 34 + 7 * len(curve.label)
    return parts
