"""Rows with embedding files, from the file of rows to the tensors of a batch, and what a person sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from rows import write_embedding
from safetensors.torch import load_file, save_file

from vlmtune.config.schema import SourceConfig
from vlmtune.data.checks.quick import look_over
from vlmtune.data.collate import collate, prompt_batch
from vlmtune.data.encode import RESERVED, encode, encode_prompt
from vlmtune.data.prepared.prepare import prepare
from vlmtune.data.preview import media_counts, runs
from vlmtune.data.preview_page import show_rows
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder
from vlmtune.nn.pseudo_text import MASK, ROWS


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(str(tiny_folder("internvl")))


def row(question: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is a seven. {RESERVED * 2}"}]
    return {"conversations": turns, **more}


@pytest.fixture
def corpus(tmp_path: Path, opened: OpenedFolder) -> Corpus:
    length = opened.config.get_text_config().hidden_size
    write_embedding(tmp_path / "a.pt", 3, length)
    write_embedding(tmp_path / "b.safetensors", 2, length, seed=1)
    generator = torch.Generator().manual_seed(2)
    save_file({f"p#{i}": torch.randn(i + 1, length, generator=generator) for i in range(3)}, tmp_path / "s.safetensors")
    PIL.Image.new("RGB", (40, 60), (9, 9, 9)).save(tmp_path / "i.png")
    broken = torch.zeros(2, length)
    broken[1, 0] = torch.nan
    torch.save(broken, tmp_path / "nan.pt")
    torch.save(torch.zeros(2, length + 1), tmp_path / "long.pt")
    rows = [
        row("<image>\n<embedding> What?", image="i.png", embedding="a.pt"),
        row(f"{RESERVED * 2}<image>{RESERVED * 3} What?", image="i.png", embedding=["b.safetensors", "a.pt"]),
        row("Which digit? <embedding>", embedding="s.safetensors#p#1"),
        row("What is 3?"),
        row("<embedding>", embedding="nan.pt"),
        row("<embedding>", embedding="long.pt"),
        row(RESERVED * 4, embedding="a.pt"),
        row("<embedding>", embedding="gone.pt"),
        row("<embedding>", embedding="../a.pt"),
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_corpus([SourceConfig(path=str(tmp_path / "r.jsonl"))])


BAD = {
    5: r"the embedding long\.pt has rows of 49 numbers; expected 48, as the input of this model's language model has",
    6: r"the text holds a place of 4 reserved tokens, and the embedding a\.pt has 3 rows; expected one token for each",
    7: r"there is no file .*gone\.pt",
    8: r"the path \.\./a\.pt holds `\.\.`",
}


def test_every_row_of_a_file_takes_one_place(corpus: Corpus, opened: OpenedFolder) -> None:
    first, second, third, plain = (encode(corpus.sample(i), opened) for i in range(4))
    assert [(span.kind, span.length) for span in first.spans][-1] == ("pseudo_text", 3)
    assert first.spans[-1].index == 1 and first.at_pseudo_text.sum() == 3
    assert [(span.kind, span.index) for span in second.spans] == [
        ("pseudo_text", 0), *[("image", 1)] * (len(second.spans) - 2), ("pseudo_text", 2)
    ]  # fmt: skip
    assert third.media[0][0].key == "p#1" and third.at_pseudo_text.sum() == 2 and not plain.at_pseudo_text.any()
    for encoded in (first, second, third):
        assert (encoded.labels[encoded.at_pseudo_text] == -100).all()
        text = encoded.input_ids[~(encoded.at_pseudo_text | encoded.at_pictures)]
        assert opened.tokenizer.decode(text).count(RESERVED) == 2, "in the answer it is text"
        assert opened.config.image_token_id not in encoded.input_ids[encoded.at_pseudo_text]


def test_collated_rows_stand_in_the_order_of_their_places(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    encoded = [encode(corpus.sample(i), opened) for i in (1, 3, 2, 0)]
    a, b = torch.load(tmp_path / "a.pt"), stored(tmp_path / "b.safetensors", "rows")
    expected = torch.cat([b, a, stored(tmp_path / "s.safetensors", "p#1"), a])
    packed = collate([encoded], opened, stand_in=False).inputs
    assert torch.equal(packed[ROWS], expected) and packed[MASK].shape == packed["input_ids"].shape
    padded = collate([[one] for one in encoded], opened, stand_in=False).inputs
    assert torch.equal(padded[ROWS], expected)
    for mask, one in zip(padded[MASK], encoded, strict=True):
        assert np.array_equal(mask[: one.num_tokens].numpy(), one.at_pseudo_text) and not mask[one.num_tokens :].any()
    prompts = [encode_prompt(Sample(messages=corpus.sample(i).messages[:-1], origin="p"), opened) for i in (2, 3, 1)]
    left = prompt_batch(prompts, opened)
    assert torch.equal(left[ROWS], torch.cat([expected[5:7], expected[:5]]))
    for mask, one in zip(left[MASK], prompts, strict=True):
        assert np.array_equal(mask[len(mask) - one.num_tokens :].numpy(), one.at_pseudo_text)
        assert mask.sum() == one.at_pseudo_text.sum()
    assert not {ROWS, MASK} & collate([encoded[1:2]], opened, stand_in=False).inputs.keys()


def stored(path: Path, key: str) -> torch.Tensor:
    return load_file(path)[key]


def test_bad_rows_name_their_origin(corpus: Corpus, opened: OpenedFolder) -> None:
    for i, reason in BAD.items():
        with pytest.raises(DataError, match=rf"^r\.jsonl:{i + 1}: {reason}") as caught:
            encode(corpus.sample(i), opened)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^r\.jsonl:5: the embedding nan\.pt has NaN or infinity in 1 of its 2 rows"):
        collate([[encode(corpus.sample(4), opened)]], opened, stand_in=False)


def test_prepared_rows_are_what_encode_gives(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    found = prepare(corpus, opened, into=tmp_path / "p", workers=0)
    for i in range(4):
        ours, theirs = found.rows.encoded(i), encode(corpus.sample(i), opened)
        assert np.array_equal(ours.input_ids, theirs.input_ids) and np.array_equal(ours.labels, theirs.labels)
        assert (ours.spans, ours.media) == (theirs.spans, theirs.media)
    measured = found.measured
    assert measured.num_embedded[:4].tolist() == [3, 5, 2, 0] and measured.num_images[:4].tolist() == [1, 1, 0, 0]
    assert measured.smallest_side[:4].tolist() == [40, 40, 0, 0]
    for i in range(4):
        assert measured.num_tokens[i] == encode(corpus.sample(i), opened).num_tokens
    assert [bad.index for bad in measured.bad] == list(BAD)
    decoded = prepare(corpus, opened, into=tmp_path / "p", workers=0, look="pixels")
    assert [bad.index for bad in decoded.measured.bad] == [4, *BAD], "only --decode reads the numbers themselves"
    quick = look_over(corpus, opened, workers=0, decode=True)
    assert [bad.index for bad in quick.bad] == [4, *BAD]


def test_a_file_that_changed_is_seen(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    prepare(corpus, opened, into=tmp_path / "p", workers=0)
    write_embedding(tmp_path / "a.pt", 4, opened.config.get_text_config().hidden_size)
    again = prepare(corpus, opened, into=tmp_path / "p", workers=0, look="headers")
    assert again.num_made and again.measured.num_embedded[0] == 4
    assert [bad.index for bad in again.measured.bad] == [1, 5, 7, 8], "runs of 4 fit now, those of 3 no more"


def test_a_person_sees_the_place_and_the_rows(corpus: Corpus, opened: OpenedFolder) -> None:
    encoded = encode(corpus.sample(1), opened)
    tags = [run.text for run in runs(encoded, opened) if run.kind == "image"]
    assert tags[0] == "[embedding b.safetensors: 2 tokens]" and tags[2] == "[embedding a.pt: 3 tokens]"
    assert tags[1].startswith("[image 40×60")
    assert media_counts(encoded) == ["1 image", "2 embeddings of 5 rows"]
    keyed = encode(corpus.sample(2), opened)
    assert "[embedding s.safetensors#p#1: 2 tokens]" in [run.text for run in runs(keyed, opened)]
    shown = list(show_rows([1, 2], RowEncoder(corpus, opened), 512))
    assert [len(one.pictures) for one in shown] == [1, 0]
    tags = [part.tag for part in shown[0].stretches if part.kind == "image"]
    assert tags[0] == "embedding b.safetensors: 2 tokens"
