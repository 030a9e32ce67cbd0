"""A language model whose only vocabulary is a SentencePiece model, as Vicuna's repository has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llava_models import xtuner_folder
from rows import conversation
from sentencepieces import pieces, write_model

from vlmtune.data.encode import encode
from vlmtune.errors import WeightsError
from vlmtune.export.write import export
from vlmtune.models.load import open_folder

TEXT = "ab abc </s>"
ROW = conversation(("user", [TEXT]), ("assistant", ["cab"]))


def slow_folder(into: Path, **settings: Any) -> Path:
    folder = xtuner_folder(into)
    (folder / "tokenizer.json").unlink()
    write_model(folder, add_dummy_prefix=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    described = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def spelled(text: str) -> list[str]:
    """What no piece has is bytes."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def test_the_ids_are_those_of_the_pieces(tmp_path: Path) -> None:
    names = [text for text, *_ in pieces()]
    opened = open_folder(slow_folder(tmp_path / "model"))
    assert opened.tokenizer.is_fast and len(opened.tokenizer) == len(names) + 1, "and <image>"
    row = [names[number] for number in encode(ROW, opened).input_ids.tolist()]
    assert row[0] == "<s>" and row.count("<s>") == 1 and row.count("</s>") == 1, "no text is a special token"
    said = ["ab", "▁a", "bc", "▁", *spelled("</s>"), "▁", *spelled("ASSISTANT:")]
    assert row[1:] == ["▁", *spelled("USER:"), "▁", *said, "▁", "c", "ab", "</s>", "▁", *spelled("\n")]


@pytest.mark.parametrize("layout", ["native", "xtuner", "llava"])
def test_every_layout_gives_the_same_ids(layout: str, tmp_path: Path) -> None:
    folder = slow_folder(tmp_path / "model")
    export(folder, tmp_path / "out", layout=layout, verify="none")
    assert (tmp_path / "out" / "tokenizer.json").is_file() == (layout == "native")
    wanted, found = (encode(ROW, open_folder(place)) for place in (folder, tmp_path / "out"))
    assert found.input_ids.tolist() == wanted.input_ids.tolist()
    assert found.labels.tolist() == wanted.labels.tolist()


def test_a_class_with_rules_of_its_own_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected tokenizer\.json"):
        open_folder(slow_folder(tmp_path / "model", tokenizer_class="GemmaTokenizer"))
