"""A tiny InternVL with random weights and a tokenizer trained on the spot, saved as an ordinary transformers folder.

Nothing in the folder knows vlmtune: `AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor` open it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from vlmtune.files import write_atomic

SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""Attributes that transformers' InternVLProcessor expects of the tokenizer."""

# Turns in the ChatML manner. A picture is one placeholder and a line break; the processor widens the placeholder to
# <img>, as many <IMG_CONTEXT> as the picture has tokens, and </img>.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<IMG_CONTEXT>\\n' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySize:
    """Sizes of the tiny model; the defaults are those of the quickstart."""

    image_size: int = 32
    """Side of a tile, in pixels."""
    patch_size: int = 8
    """Side of a patch of the vision tower, in pixels; four patches become one token."""
    hidden_size: int = 96
    vision_layers: int = 2
    text_layers: int = 2
    heads: int = 4
    vocabulary: int = 384
    """Most tokens, bytes and special tokens included."""
    max_tiles: int = 4
    """Most tiles that a large or oblong picture is cut into."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile."""
        return (self.image_size // self.patch_size // 2) ** 2


def write_model(folder: Path, texts: Iterable[str], *, size: TinySize | None = None, seed: int = 0) -> None:
    """Writes config, random weights from `seed`, tokenizer, processor files, chat template and generation config."""
    size = size or TinySize()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, size.vocabulary)
    tokenizer.save_pretrained(folder)
    for name, content in _processor_files(size).items():
        write_atomic(folder / name, json.dumps(content, indent=2) + "\n")
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(_config(size, tokenizer))
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of Qwen2: any text can be written, and each digit stays a token of its own."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r"\p{N}| ?[^\s\p{N}\p{P}]+|\p{P}|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=NAMED_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _processor_files(size: TinySize) -> Mapping[str, Mapping[str, Any]]:
    return {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "size": {"height": size.image_size, "width": size.image_size},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": size.max_tiles,
            "do_convert_rgb": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": size.image_tokens},
    }


def _config(size: TinySize, tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    shared = {
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.heads,
        "intermediate_size": 3 * size.hidden_size,
    }
    return InternVLConfig(
        vision_config={
            **shared,
            "num_hidden_layers": size.vision_layers,
            "image_size": [size.image_size] * 2,
            "patch_size": [size.patch_size] * 2,
        },
        text_config={
            **shared,
            "model_type": "qwen2",
            "num_hidden_layers": size.text_layers,
            "num_key_value_heads": size.heads // 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=SPECIAL_TOKENS.index("<IMG_CONTEXT>"),
        image_seq_length=size.image_tokens,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
