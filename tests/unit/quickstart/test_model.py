"""The tiny model: an ordinary transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlmtune.models.load import open_folder
from vlmtune.quickstart import data, model
from vlmtune.weights.shards import Shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny"
    model.write_model(out, data.texts())
    return out


def test_transformers_opens_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    native = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(native).__name__ == "InternVLForConditionalGeneration"
    pixels = processor(PIL.Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    features = native.get_image_features(pixel_values=pixels).pooler_output
    assert features.shape[-2] == json.loads((folder / "processor_config.json").read_text())["image_seq_length"] == 4
    assert native.config.image_token_id == tokenizer.context_image_token_id
    assert native.config.text_config.vocab_size == len(tokenizer)
    assert native.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_writes_any_text_and_keeps_digits_apart(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("7", "3 and 7: the second is larger.", "数字 ü 😀\n\ttab", "Which digit is this?"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    seven = tokenizer("7", add_special_tokens=False).input_ids
    assert len(seven) == 1 and tokenizer("177", add_special_tokens=False).input_ids[1:] == seven * 2
    assert {name: getattr(tokenizer, name) for name in model.NAMED_TOKENS} == model.NAMED_TOKENS


def test_vlmtune_opens_it_like_any_other(folder: Path) -> None:
    opened = open_folder(str(folder))
    assert opened.why_not_packed is None
    assert opened.chat.stop == "<|im_end|>"
    (plan,) = opened.family.plan([(32, 32)], opened.spec)
    assert plan.num_tiles == 1 and plan.num_tokens == 4  # <img> and </img> are text of the template


def test_seed_and_size(folder: Path, tmp_path: Path) -> None:
    def weights(path: Path) -> dict[str, torch.Tensor]:
        shards = Shards(path)
        return {name: shards.read(name) for name in shards.infos}

    model.write_model(tmp_path / "same", data.texts())
    model.write_model(tmp_path / "other", data.texts(), seed=1)
    model.write_model(tmp_path / "small", data.texts(), size=model.TinySize(hidden_size=32, text_layers=1))
    ours, same, other, small = (weights(path) for path in (folder, *(tmp_path / n for n in ("same", "other", "small"))))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert set(small) < set(ours) == set(other)
    assert not any(torch.equal(ours[name], other[name]) for name in ours if name.endswith("q_proj.weight"))
