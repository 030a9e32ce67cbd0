"""Pseudo-text beside the pictures of InternLM-XComposer2: partial LoRA takes its places for words, not for pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import golden
import pytest
import torch
from rows import embedded_samples, varied_samples, write_picture
from xcomposer2_models import furnish

from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.sample import Encoded, Image, MediaRef, Message, PseudoText, Sample, Text
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over

pytestmark = pytest.mark.golden

MODELS = [folder for folder in golden.folders("xcomposer2") if (folder / "cases.json").is_file()]
EACH = pytest.mark.parametrize("record", [pytest.param(folder, id=golden.name(folder)) for folder in MODELS])


@pytest.fixture
def opened(record: Path, tmp_path: Path) -> OpenedFolder:
    return open_folder(furnish(record, tmp_path / "model"))


def logits(model: torch.nn.Module, rows: list[list[Encoded]], opened: OpenedFolder) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**hand_over(model, collate(rows, opened, stand_in=False).inputs)).logits
    return found.reshape(-1, found.shape[-1])


@EACH
def test_pseudo_text_that_repeats_words_is_those_words(record: Path, opened: OpenedFolder, tmp_path: Path) -> None:
    model = load_model(opened).eval()
    words = torch.tensor(opened.tokenizer("Which digit?", add_special_tokens=False).input_ids)
    torch.save(model.get_input_embeddings()(words).detach(), tmp_path / "words.pt")
    picture, pseudo = Image(write_picture(tmp_path, (64, 64))), PseudoText(MediaRef(path=str(tmp_path / "words.pt")))
    question = Message("user", (picture, Text("So: "), pseudo, Text(" left?")))
    row = encode(Sample(messages=(question, Message("assistant", (Text("seven"),))), origin="e:1"), opened)
    ids = row.input_ids.copy()
    ids[row.at_pseudo_text] = words
    said = dataclasses.replace(row, input_ids=ids, spans=row.spans[:-1], media=row.media[:1])
    assert row.at_pseudo_text.sum() == len(words) and not said.at_pseudo_text.any()
    assert torch.equal(logits(model, [[row]], opened), logits(model, [[said]], opened))


@EACH
def test_a_pack_and_a_padded_batch_are_their_rows(record: Path, opened: OpenedFolder, tmp_path: Path) -> None:
    model = load_model(opened).double().eval()
    samples = embedded_samples(tmp_path, opened.config.get_text_config().hidden_size) + varied_samples(tmp_path)[:1]
    rows = [encode(sample, opened) for sample in samples]
    alone = torch.cat([logits(model, [[row]], opened) for row in rows])
    torch.testing.assert_close(logits(model, [[row] for row in rows], opened), alone)
    torch.testing.assert_close(logits(model, [rows], opened), alone)
