"""The table of a layout, read in both directions."""

from __future__ import annotations

import copy
import pickle

from vlmtune.weights.layout import Link, Rule, WeightTable
from vlmtune.weights.ops import Chunk

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
