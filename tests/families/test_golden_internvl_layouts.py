"""Exports of the recorded official models: to the native layout, for plain transformers, and back, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from official_models import with_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlmtune.errors import ExportError
from vlmtune.export.write import export
from vlmtune.models.load import open_folder
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

CASES = [folder for folder in golden.folders("internvl/forward") if (folder / "config.json").is_file()]
LOGITS = 2e-4


def version(case: Path) -> str:
    return str(json.loads((case / "config.json").read_text(encoding="utf-8"))["ps_version"])


def cases(wanted: str) -> list[Any]:
    return [pytest.param(case, id=golden.name(case, "layouts")) for case in CASES if version(case) == wanted]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards(folder)
    return {name: shards.read(name) for name in shards.infos}


def assert_bit_identical(first: Path, second: Path) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", cases("v2"))
def test_official_to_native_to_official_is_bit_exact(case: Path, tmp_path: Path) -> None:
    base = with_tokenizer(case, tmp_path / "base")
    there = export(base, tmp_path / "native", layout="native")
    assert there.layout == "native" and len(there.comparisons) == 2
    assert all(one.difference == 0.0 for one in there.comparisons), "the same arithmetic on the same numbers"
    back = export(tmp_path / "native", tmp_path / "official", layout="official")
    assert all(one.difference == 0.0 for one in back.comparisons)
    assert_bit_identical(case, tmp_path / "official")
    before, after = (json.loads((at / "config.json").read_text()) for at in (base, tmp_path / "official"))
    assert after == before
    names = {file.name for file in base.iterdir() if file.suffix in (".py", ".json") and "index" not in file.name}
    assert names <= {file.name for file in (tmp_path / "official").iterdir()}
    for name in names:
        if name != "config.json":
            assert (tmp_path / "official" / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("case", cases("v2"))
@torch.no_grad()
def test_plain_transformers_loads_the_native_export_with_the_recorded_logits(case: Path, tmp_path: Path) -> None:
    base = with_tokenizer(case, tmp_path / "base")
    export(base, tmp_path / "native", layout="native", verify="none")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    io = load_file(case / "io.safetensors")
    seen = io["a.input.attention_mask"].bool()
    logits = model.eval()(
        input_ids=io["a.input.input_ids"], pixel_values=io["a.input.pixel_values"], use_cache=False
    ).logits
    torch.testing.assert_close(logits[seen], io["a.expected.logits"][seen], atol=LOGITS, rtol=0)
    tokenizer, opened = AutoTokenizer.from_pretrained(tmp_path / "native"), open_folder(base)
    more = tokenizer.get_vocab().items() - opened.tokenizer.get_vocab().items()
    assert {name for name, _ in more} == {"<video>"}, "a name that InternVLProcessor asks for; it is never an id"


@pytest.mark.parametrize("case", cases("v2"))
def test_an_official_export_of_an_official_folder_is_the_folder(case: Path, tmp_path: Path) -> None:
    base = with_tokenizer(case, tmp_path / "base")
    result = export(base, tmp_path / "again")
    assert result.layout == "official" and result.counts["unchanged"] == len(Shards(case))
    assert_bit_identical(case, tmp_path / "again")


@pytest.mark.parametrize("case", cases("v1"))
def test_a_model_without_words_in_the_native_layout_is_refused_there(case: Path, tmp_path: Path) -> None:
    base = with_tokenizer(case, tmp_path / "base")
    with pytest.raises(ExportError, match="ps_version v1"):
        export(base, tmp_path / "native", layout="native")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert all(one.holds for one in export(base, tmp_path / "official").comparisons)


def test_the_records_are_there() -> None:
    golden.skip_if_partial()
    assert cases("v1") and cases("v2")
