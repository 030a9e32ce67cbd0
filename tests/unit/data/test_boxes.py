"""Boxes: every unit to every unit, there and back, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.config.schema import MediaOptions
from vlmtune.data.boxes import box_on, write_box
from vlmtune.data.sample import Box, BoxUnit, MediaPlan
from vlmtune.errors import DataError
from vlmtune.models.auto import conventions
from vlmtune.models.family import BoxFormat

UNITS: tuple[BoxUnit, ...] = ("pixels", "thousand", "unit")
PLAN = MediaPlan(size=(640, 480), num_tokens=4, num_tiles=1, layout=(), resized=(308, 252))

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
shares = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("qwen2_vl", "<|box_start|>(100,200),(500,1000)<|box_end|>"),
        ("qwen2_5_vl", "[31, 50, 154, 252]"),
        ("qwen3_vl", "[100, 200, 500, 1000]"),
        ("llava", "[0.10, 0.20, 0.50, 1.00]"),
        ("something_new", "[100, 200, 500, 1000]"),
    ],
)
@pytest.mark.parametrize(
    "box",
    [
        Box((64, 96, 320, 480)),
        Box((100, 200, 500, 1000), unit="thousand"),
        Box((0.1, 0.2, 0.5, 1.0), unit="unit"),
    ],
)
def test_each_model_writes_the_same_box_in_its_own_way(model_type: str, text: str, box: Box) -> None:
    assert write_box(box, [PLAN], conventions.boxes(model_type)) == text


@given(size=sizes, resized=sizes, corners=shares, said=st.sampled_from(UNITS), written=st.sampled_from(UNITS))
def test_there_and_back_within_half_a_unit(
    size: tuple[int, int],
    resized: tuple[int, int],
    corners: tuple[float, float, float, float],
    said: BoxUnit,
    written: BoxUnit,
) -> None:
    plan = MediaPlan(size=size, num_tokens=1, num_tiles=1, layout=(), resized=resized)
    whole = {"pixels": size, "thousand": (1000, 1000), "unit": (1, 1)}[said]
    box = Box(tuple(c * whole[i % 2] for i, c in enumerate(corners)), unit=said)
    style = BoxFormat(unit=written, decimals=3)
    read = [float(number) for number in re.findall(r"[\d.]+", write_box(box, [plan], style))]
    full = {"pixels": resized, "thousand": (1000, 1000), "unit": (1, 1)}[written]
    half = 0.0005 if written == "unit" else 0.5
    for i, (number, corner) in enumerate(zip(read, corners, strict=True)):
        assert 0 <= number <= full[i % 2]
        assert abs(number - corner * full[i % 2]) <= half * (1 + 1e-6)
    on_picture = box_on(plan, box)
    assert on_picture == pytest.approx([c * resized[i % 2] for i, c in enumerate(corners)], abs=1e-6)
    assert box_on(plan, box, (10, 20)) == pytest.approx([c * (10, 20)[i % 2] for i, c in enumerate(corners)], abs=1e-6)


def test_a_picture_without_a_resize_is_drawn_as_it_is() -> None:
    plan = MediaPlan(size=(640, 480), num_tokens=4, num_tiles=1, layout=())
    assert box_on(plan, Box((64, 96, 320, 480))) == pytest.approx((64, 96, 320, 480))


def refused(box: Box) -> str:
    with pytest.raises(DataError) as caught:
        write_box(box, [PLAN], BoxFormat())
    return caught.value.reason


def test_what_is_refused() -> None:
    assert "the box [320, 96, 64, 480] is reversed; expected [left, top, right, bottom]" in refused(
        Box((320, 96, 64, 480))
    )
    assert "lies outside of its picture; expected 0 … 640 across and 0 … 480 down, in pixels" in refused(
        Box((0, 0, 641, 480))
    )
    assert "lies outside" in refused(Box((-1, 0, 5, 5)))
    assert "0 … 1000 across and 0 … 1000 down, in thousandths" in refused(Box((0, 0, 1200, 5), unit="thousand"))
    assert "lies outside" in refused(Box((0, 0, 1.5, 1), unit="unit"))
    assert "no number" in refused(Box((0, 0, float("nan"), 5)))
    assert "no number" in refused(Box((0, 0, float("inf"), 5)))
    assert "a box lies on picture 2 of the row, which has 1 picture" in refused(Box((0, 0, 5, 5), picture=1))
    assert "picture 0 of the row" in refused(Box((0, 0, 5, 5), picture=-1))


def test_what_annotation_tools_round_is_not_refused() -> None:
    assert write_box(Box((-0.4, 0, 640.3, 480.5)), [PLAN], BoxFormat()) == "[0, 0, 1000, 1000]"
    assert write_box(Box((5, 5, 5, 5)), [PLAN], BoxFormat()) == "[8, 10, 8, 10]"


def test_halves_go_up() -> None:
    plan = MediaPlan(size=(1000, 1000), num_tokens=1, num_tiles=1, layout=())
    assert write_box(Box((0.5, 1.5, 2.5, 3.49)), [plan], BoxFormat()) == "[1, 2, 3, 3]"


def test_the_option_chooses_the_unit() -> None:
    assert MediaOptions(boxes="unit").boxes == "unit"
    assert write_box(Box((64, 96, 320, 480)), [PLAN], BoxFormat(template="{x1} {y2}", unit="pixels")) == "31 252"
