"""Items of the official data set, from a line of JSON to ids, labels and tiles, and the lengths they are grouped by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import golden
import official
import pytest
import torch
from safetensors.torch import load_file
from verdicts import Rule, decide, report

from vlmtune.config.schema import SourceConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.sample import IGNORED
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder

pytestmark = pytest.mark.golden

_ITEMS = golden.root() / "internvl" / "dataset" / "items.json"
_PICTURES = golden.root() / "internvl" / "tiling"
_MARK = "<image>"
_EXACT = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    item: dict[str, Any]
    options: dict[str, Any]
    record: dict[str, Any]

    @property
    def pictures(self) -> list[str]:
        given = self.item.get("image") or []
        return [given] if isinstance(given, str) else given

    @property
    def marks(self) -> int:
        return sum(turn["value"].count(_MARK) for turn in self.item["conversations"] if turn["from"] == "human")

    @property
    def is_lone(self) -> bool:
        return isinstance(self.item.get("image"), str)

    @property
    def first(self) -> dict[str, str]:
        return self.item["conversations"][0]


_RULES: Sequence[Rule[Case]] = (
    Rule(
        "marks ≠ pictures",
        "refused",
        "officially a mark stays as text, or pixels have no place and the loss is multiplied by 0",
        lambda case: case.marks not in (0, len(case.pictures)),
    ),
    Rule(
        "no marks, an answer first",
        "mended",
        "officially the picture goes into the answer that is left out; ours goes before the first question",
        lambda case: bool(case.pictures) and not case.marks and case.first["from"] != "human",
    ),
    Rule(
        "no marks, a list of pictures",
        "mended",
        "officially they get no place; ours go before the first question",
        lambda case: bool(case.pictures) and not case.marks and not case.is_lone,
    ),
    Rule(
        "a lone picture, marked in a later turn",
        "mended",
        "officially it gets a second place in the first turn; ours stands where it is marked",
        lambda case: case.is_lone and case.marks > 0 and _MARK not in case.first["value"],
    ),
    Rule(
        "padded",
        "mended",
        "officially items without group_by_length are padded to max_length; ours to the longest of their batch",
        lambda case: not case.options.get("group_by_length", True),
    ),
)


@cache
def _cases() -> tuple[Case, ...]:
    if not _ITEMS.exists():
        return ()
    found = json.loads(_ITEMS.read_text(encoding="utf-8"))
    return tuple(Case(name, record["item"], record["options"], record) for name, record in found.items())


@cache
def _place() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def _opened(options: str) -> OpenedFolder:
    """The folder of a model whose config.json says what the record's options say."""
    said = json.loads(options)
    path = Path(_place().name) / hashlib.sha256(options.encode()).hexdigest()[:8]
    folder = official.folder("internlm2", "internlm2-chat", path)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    image_size = said["image_size"]
    patch = image_size // (2 * isqrt(said["num_image_token"]))
    config = {
        **folder.config,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": image_size,
        "min_dynamic_patch": said["min_dynamic_patch"],
        "max_dynamic_patch": said["max_dynamic_patch"],
        "use_thumbnail": said["use_thumbnail"],
        "dynamic_image_size": said["dynamic_image_size"],
        "vision_config": {**small, "image_size": image_size, "patch_size": patch},
        "llm_config": {
            **small,
            **folder.config["llm_config"],
            "model_type": "internlm2",
            "num_key_value_heads": 2,
            "vocab_size": 92553,  # InternVL2-8B's
            "max_position_embeddings": 32768,
        },
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = open_folder(path)
    assert found.spec.tokens_per_tile == said["num_image_token"]
    return found


def _rows(items: Sequence[dict[str, Any]], folder: Path) -> Corpus:
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    source = SourceConfig(path=str(file), root=str(_PICTURES), unmarked_media="front", lone_turns="drop")
    return open_corpus([source])


@cache
def _tensors() -> dict[str, torch.Tensor]:
    file = _ITEMS.with_suffix(".safetensors")
    return load_file(file) if file.exists() else {}


def _compare_tiles(case: Case, found: torch.Tensor) -> None:
    record = case.record
    assert list(found.shape) == record["pixel_shape"] and record["image_flags"] == [1] * len(found)
    assert abs(found.double().sum().item() - record["pixel_sum"]) <= _EXACT * found.numel()
    expected = _tensors().get(f"{case.name.replace('|', '.')}.pixel_values")
    if expected is not None:
        assert (found - expected).abs().max() <= _EXACT


@pytest.mark.parametrize("case", _cases(), ids=[golden.name(_ITEMS, case.name) for case in _cases()])
def test_items(case: Case, tmp_path: Path) -> None:
    opened = _opened(json.dumps(case.options, sort_keys=True))
    corpus = _rows([case.item], tmp_path)
    rule = decide(case, _RULES)
    if rule.verdict == "refused":
        with pytest.raises(DataError, match=r"<image> marks? but \d+ image"):
            corpus.sample(0)
        return
    encoded = encode(corpus.sample(0), opened)
    ids, labels, record = encoded.input_ids.tolist(), encoded.labels.tolist(), case.record
    if rule.verdict == "equal":
        assert (ids, labels) == (record["input_ids"], record["labels"])
    else:
        assert [one for one in labels if one != IGNORED] == [one for one in record["labels"] if one != IGNORED]
    if rule.name == "padded":
        assert (ids, labels) == (record["input_ids"][: len(ids)], record["labels"][: len(ids)])
    assert sum(span.length for span in encoded.spans) == ids.count(opened.spec.context_id)
    batch = collate([[encoded]], opened, stand_in=True)
    if not case.pictures:
        # The official loader shows a white tile that counts for nothing; ours has a stand-in where ranks need one.
        assert record["image_flags"] == [0] and "pixel_values" not in batch.inputs and batch.stand_in is not None
        return
    _compare_tiles(case, batch.inputs["pixel_values"])
    tokens = len(batch.inputs["pixel_values"]) * case.options["num_image_token"]
    assert ids.count(opened.spec.context_id) == tokens, "each tile has its places"
    assert tokens == record["n_context"] or rule.verdict == "mended"


def test_the_verdicts() -> None:
    if not _cases():
        pytest.skip(f"no items in {golden.root()}")
    report(_cases(), _RULES)


_FACTS = _ITEMS.with_name("mixing_facts.json")


@dataclass(frozen=True)
class Length:
    """An item and the length by which it is grouped officially."""

    item: dict[str, Any]
    length: int
    is_known: bool
    """An item with as many characters was seen before."""


_LENGTH_RULES: Sequence[Rule[Length]] = (
    Rule(
        "a length in the row",
        "mended",
        "officially that number is taken; ours is counted",
        lambda case: "length" in case.item,
    ),
    Rule(
        "a picture",
        "mended",
        "officially most tiles are assumed, or none for the first row with so many characters; ours are counted",
        lambda case: bool(case.item.get("image")),
    ),
    Rule(
        "text as long as a row before",
        "mended",
        "officially it has the length of that row, with tiles; ours is its own",
        lambda case: case.is_known,
    ),
)


@cache
def _lengths() -> dict[str, tuple[Length, ...]]:
    facts = json.loads(_FACTS.read_text(encoding="utf-8")) if _FACTS.exists() else {}
    found: dict[str, list[tuple[dict[str, Any], int]]] = {}
    if official_ := facts.get("official_length"):
        items = {item["id"]: item for item in official_["items"]}
        order = zip(official_["order_ids"], official_["length_in_order"], strict=True)
        found["official_length"] = [(items[number], length) for number, length in order]
    if xtuner := facts.get("xtuner_group_length"):
        found["xtuner_group_length"] = list(zip(xtuner["items"], xtuner["length"], strict=True))
    cases = {}
    for name, pairs in found.items():
        seen: set[int] = set()
        cases[name] = []
        for item, length in pairs:
            characters = len(_joined(item))
            cases[name].append(Length(item, length, characters in seen))
            if "length" not in item:
                seen.add(characters)
    return {name: tuple(found) for name, found in cases.items()}


def _joined(item: dict[str, Any]) -> str:
    return "\n".join(turn["value"] for turn in item["conversations"])


@pytest.mark.parametrize("name", [pytest.param(name, id=golden.name(_FACTS, name)) for name in _lengths()])
def test_the_lengths_that_rows_are_grouped_by(name: str, tmp_path: Path) -> None:
    facts = json.loads(_FACTS.read_text(encoding="utf-8"))[name]
    options = {
        "image_size": 448,
        "num_image_token": facts.get("num_image_token", facts.get("patch_token")),
        "min_dynamic_patch": facts.get("min_dynamic_patch", 1),
        "max_dynamic_patch": facts["max_dynamic_patch"],
        "use_thumbnail": facts["use_thumbnail"],
        "dynamic_image_size": True,
    }
    opened = _opened(json.dumps(options, sort_keys=True))
    least: list[int] = []
    for case in _lengths()[name]:
        rule = decide(case, _LENGTH_RULES)
        try:
            row = encode(_rows([case.item], tmp_path).sample(0), opened)
        except DataError:
            assert rule.verdict == "mended", "text alone is always a row"
            continue
        words = len(opened.tokenizer(_joined(case.item), add_special_tokens=True).input_ids)
        tiles = sum(plan.num_tiles for _, plan in row.media)
        assert bool(tiles) == bool(case.item.get("image"))
        if rule.verdict == "equal":
            assert case.length == words, "the words are counted alike"
        if len(case.item["conversations"]) == 2 and _MARK not in _joined(case.item):
            # <img>, </img> and a newline stand around a picture; what is left is the template, the same for all rows.
            least.append(row.num_tokens - words - tiles * options["num_image_token"] - 3 * len(row.media))
    assert least and max(least) - min(least) <= 1


def test_the_verdicts_on_lengths() -> None:
    if not _lengths():
        pytest.skip(f"no mixing facts in {golden.root()}")
    for cases in _lengths().values():
        report(cases, _LENGTH_RULES)
