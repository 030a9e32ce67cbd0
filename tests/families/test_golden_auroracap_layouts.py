"""Exports into every recorded layout: names and shapes of the tensors, files, and fields of the configuration files.

The model of the records is built with random weights, from its recorded names, shapes and configuration, as a folder of
XTuner's. Verdicts by what a record holds, see `RULES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden
import llava_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from verdicts import Rule, decide, report

from vlmtune.export.write import export
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

PARTS = {"llm.": "", "visual_encoder.": "visual_encoder", "projector.": "projector"}
LAYOUTS = {"xtuner": "xtuner", "huggingface": "native", "official": "llava"}
"""The program's word for each layout, by the reference's, which begins the name of a record."""
TABLE = "vision_model.embeddings.position_embedding.weight"
AGAIN = "visual_encoder.pos_emb"


def files() -> list[Path]:
    found = sorted((golden.root() / "auroracap").rglob("export_layouts*.json"))
    return [path for path in found if path.is_file()]


@dataclass(frozen=True)
class Case:
    file: Path
    name: str

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))["layouts"][self.name]
        return found

    @property
    def layout(self) -> str:
        return LAYOUTS[re.split(r"\W", self.name)[0]]

    @property
    def dtypes(self) -> set[str]:
        return {dtype for *_, dtype in self.record.get("keys", ())}

    def parts_of(self) -> dict[str, Any]:
        """The configuration of the model: of the first record of its file that has all three."""
        for record in json.loads(self.file.read_text(encoding="utf-8"))["layouts"].values():
            if "projector/config.json" in record.get("configs", {}):
                found: dict[str, Any] = record["configs"]
                return found
        raise AssertionError(f"{self.file} has no record of XTuner's three folders")


RULES: list[Rule[Case]] = [
    Rule(
        "whole models",
        "mended",
        "XTuner leaves out what it froze, and the folder is no model; here the frozen parts come from the base",
        lambda case: "keys" not in case.record,
    ),
    Rule(
        "one dtype",
        "mended",
        "a float16 language model beside a float32 tower and projector; here all are of the dtype asked for",
        lambda case: len(case.dtypes) > 1,
    ),
]


def cases() -> list[Case]:
    return [Case(file, name) for file in files() for name in json.loads(file.read_text(encoding="utf-8"))["layouts"]]


def each(which: str) -> list[Any]:
    return [
        pytest.param(case, id=golden.name(case.file, case.name))
        for case in cases()
        if (decide(case, RULES).name if which == "mended" else decide(case, RULES).verdict) == which
        or (which == "keyed" and "keys" in case.record)
    ]


def build(case: Case, into: Path) -> Path:
    """The folder of XTuner's that the export starts from; the tower's second table is as large as its first."""
    torch.manual_seed(0)
    tensors: dict[str, dict[str, torch.Tensor]] = {folder: {} for folder in PARTS.values()}
    for before, _, shape, _ in case.record["keys"]:
        part = next(part for part in PARTS if before.startswith(part))
        tensors[PARTS[part]][before.removeprefix(part)] = torch.randn(shape)
        if before == AGAIN:
            tensors[PARTS[part]][TABLE] = torch.zeros(shape)  # what a forward has made of it does not count
    found = case.parts_of()
    for folder, own in tensors.items():
        (into / folder).mkdir(parents=True, exist_ok=True)
        save_file(own, into / folder / "model.safetensors", metadata={"format": "pt"})
        (into / folder / "config.json").write_text(json.dumps(found[f"{folder}/config.json".lstrip("/")]))
    rows = tensors[""]["lm_head.weight"].shape[0]
    (into / "config.json").write_text(json.dumps({**found["config.json"], "vocab_size": rows}))
    for name in ("generation_config.json", "visual_encoder/preprocessor_config.json"):
        (into / name).write_text(json.dumps(found[name]))
    for name in llava_models.PYTHON:
        (into / "projector" / name).write_text("")
    llava_models.write_tokenizer(into, rows)
    return into


def expected_names(case: Case) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of a tensor in the export (with its folder) -> name before, and its shape."""
    rows = case.record.get("embedding_rows", {})
    found = {}
    for before, after, shape, _ in case.record["keys"]:
        place, _, name = after.rpartition("::")
        if before != AGAIN:  # pos_emb: once, under the other of its names
            folder = str(Path(place).parent) if place else "."
            found[f"{folder}::{name}"] = (before, (rows.get(name, shape[0]), *shape[1:]))
    if any(before == AGAIN for before, *_ in case.record["keys"]):
        shape = next(shape for before, _, shape, _ in case.record["keys"] if before == AGAIN)
        found[f"visual_encoder::{TABLE}"] = (AGAIN, tuple(shape))
    return found


def written(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for folder in (".", "visual_encoder", "projector"):
        if (out / folder / "model.safetensors").is_file():
            tensors = load_file(out / folder / "model.safetensors")
            found.update({f"{folder}::{name}": tensor for name, tensor in tensors.items()})
    return found


@pytest.mark.parametrize("case", each("keyed"))
def test_names_shapes_and_numbers(case: Case, tmp_path: Path) -> None:
    base = build(case, tmp_path / "base")
    result = export(base, tmp_path / "out", layout=case.layout)
    assert all(one.difference == 0.0 for one in result.comparisons)
    ours, expected, source = written(tmp_path / "out"), expected_names(case), Shards(base)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        n: shape for n, (_, shape) in expected.items()
    }
    for name, (before, shape) in expected.items():
        part = next(part for part in PARTS if before.startswith(part))
        own = source.read(TABLE if before == AGAIN else before.removeprefix(part))
        assert torch.equal(ours[name][: len(own)], own), name
        if shape[0] > len(own):
            mean = own.mean(0)
            torch.testing.assert_close(ours[name][len(own) :], mean.expand(shape[0] - len(own), -1))


LOST = {"transformers_version", "_name_or_path", "_valid_processor_keys", "temperature", "top_p", "rope_theta"}
"""Of transformers 4 or of a machine: not fields of the model. Generation settings stay those of the base."""


def same(theirs: Any, ours: Any, place: str) -> None:
    """Every recorded field is there with its value; ours may say more."""
    if isinstance(theirs, Mapping):
        for name, value in theirs.items():
            word = "dtype" if name == "torch_dtype" and name not in ours else name
            if name not in LOST:
                assert word in ours, f"{place}.{name}"
                same(value, ours[word], f"{place}.{name}")
    else:
        assert theirs == ours, place


@pytest.mark.parametrize("case", each("equal"))
def test_files_and_configuration(case: Case, tmp_path: Path) -> None:
    base = build(case, tmp_path / "base")
    export(base, tmp_path / "out", layout=case.layout, verify="none")
    tokens = {"special_tokens_map.json", "added_tokens.json", "tokenizer.model"}  # now in tokenizer.json, or the base's
    wanted = {name.replace("pytorch_model.bin", "model.safetensors") for name in case.record["files"]} - tokens
    assert wanted <= {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    for name, theirs in case.record["configs"].items():
        if name in tokens:
            continue
        ours = json.loads((tmp_path / "out" / name).read_text())
        theirs = adjusted(theirs, ours, name, case)
        same(theirs, ours, name)


def adjusted(theirs: dict[str, Any], ours: dict[str, Any], name: str, case: Case) -> dict[str, Any]:
    """What is ours by rule: the rows of this test's tokenizer, the class of a tower that merges, the tower's name."""
    theirs = dict(theirs)
    if name == "visual_encoder/config.json" or name == "config.json":
        theirs.pop("mm_vision_tower", None)
    if "vision_config" in theirs:
        vision = {k: v for k, v in theirs["vision_config"].items() if k != "architectures"}
        theirs["vision_config"] = vision
        assert ours["vision_config"]["model_type"] == vision["model_type"]
    if name == "preprocessor_config.json":
        theirs.pop("processor_class", None)  # in processor_config.json
    if name == "visual_encoder/config.json":
        theirs.pop("architectures", None)  # the base's own
    if name == "config.json" and "vocab_size" in theirs:
        theirs["vocab_size"] = next(shape[0] for before, _, shape, _ in case.record["keys"] if "lm_head" in before)
    return theirs


def test_the_records_are_there() -> None:
    assert files() and each("keyed") and each("equal")
    print(report(cases(), RULES))
