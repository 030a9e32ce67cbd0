"""The table of a layout, read in both directions."""

from __future__ import annotations

import copy
import pickle

import pytest

from vlmtune.errors import WeightsError
from vlmtune.weights.layout import Link, Rule, WeightTable
from vlmtune.weights.ops import Chunk, Op, SplitGQA

TABLE = WeightTable(
    [
        Rule(
            "tower.layers.*.qkv", ("model.tower.layer.*.q", "model.tower.layer.*.k", "model.tower.layer.*.v"), Chunk(3)
        ),
        Rule("tower.layers.*.mlp.**", ("model.tower.layer.*.mlp.**",)),
        Rule("head.weight", ("lm_head.weight",)),
    ]
)


def test_a_tensor_on_disk_finds_its_parameters() -> None:
    names = ("model.tower.layer.12.q", "model.tower.layer.12.k", "model.tower.layer.12.v")
    assert TABLE.link("tower.layers.12.qkv") == Link("tower.layers.12.qkv", names, Chunk(3))
    assert TABLE.link("tower.layers.3.mlp.fc1.bias") == Link(
        "tower.layers.3.mlp.fc1.bias", ("model.tower.layer.3.mlp.fc1.bias",)
    )


def test_every_part_finds_its_tensor() -> None:
    link = TABLE.link("tower.layers.7.qkv")
    assert link is not None
    assert [TABLE.link_of(name) for name in link.parameters] == [link] * 3


def test_names_that_only_look_alike_are_not_covered() -> None:
    assert TABLE.link("tower.layers.x.qkv") is None
    assert TABLE.link("tower.layers.1.qkv.weight") is None
    assert TABLE.link("old.head.weight") is None
    assert TABLE.link_of("model.tower.layer.1.qq") is None


def test_a_table_travels_to_workers_and_is_never_copied() -> None:
    assert pickle.loads(pickle.dumps(TABLE)).link("head.weight") == TABLE.link("head.weight")
    assert copy.deepcopy(TABLE) is TABLE


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        (Chunk(3), (10, 4), "3 equal parts"),
        (Chunk(3), (), "3 equal parts"),
        (SplitGQA(groups=2, queries=2, head_dim=4), (24, 4), "32 rows: 2 groups of 2 + 2 heads of 4"),
    ],
)
def test_a_tensor_that_cannot_be_taken_apart_is_named(op: Op, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Link("qkv", ("q", "k", "v"), op).shapes(shape)
    assert str(caught.value).startswith(f"the tensor qkv has the shape {shape}; expected {expected}.")
