"""What the benchmarks run on: made-up rows over a pool of JPEG files, and a LLaVA-type model of a chosen size.

Random weights and made-up words with the frequencies of language: speed and memory do not depend on what they mean.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vlmtune.models.load import open_folder
from vlmtune.weights import shards
from vlmtune.weights.names import saved_links, skeleton
from vlmtune.weights.shards import TensorInfo

_VOCABULARY = 20_000


def _words() -> list[str]:
    """Made-up words of one to four syllables; their frequencies fall as in language (Zipf), see `sentence`."""
    generator = random.Random(1)
    syllables = [
        first + vowel + last for first in "bcdfghjklmnprstvwz" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    words: dict[str, None] = {}
    while len(words) < _VOCABULARY:
        words["".join(generator.choices(syllables, k=generator.choice((1, 2, 2, 3, 4))))] = None
    return sorted(words, key=len)  # frequent words are short


WORDS = _words()
_CUMULATED = list(itertools.accumulate(1 / (rank + 3) for rank in range(_VOCABULARY)))

TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'][0]['text'] + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- else -%}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endgeneration %}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def machine() -> str:
    """One line that belongs under every figure."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    processors = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in processors if "model name" in line), "?")
    return f"{os.cpu_count()} cores of {model}, {versions}"


def sentence(generator: random.Random, num_words: int) -> str:
    """Words with Zipf's frequencies, a comma now and then."""
    words = generator.choices(WORDS, cum_weights=_CUMULATED, k=num_words)
    return (
        "".join(word + (", " if not n % 9 else " ") for n, word in enumerate(words, 1)).strip(", ").capitalize() + "."
    )


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """`count` JPEG files of smooth noise, (width, height) = `size`; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = [f"{number:05}.jpg" for number in range(count)]
    for name in names:
        if not (folder / name).exists():
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC).save(folder / name, quality=85)
    return names


def write_rows(file: Path, count: int, pictures: Sequence[str], *, words: tuple[int, int] = (10, 100)) -> None:
    """LLaVA rows: one picture, a question and an answer of `words` (question, answer) words, half to double."""
    generator = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for number in range(count):
            question, answer = (max(1, round(n * generator.uniform(0.5, 1.5))) for n in words)
            row = {
                "id": str(number),
                "image": generator.choice(pictures),
                "conversations": [
                    {"from": "human", "value": "<image>\n" + sentence(generator, question)},
                    {"from": "gpt", "value": sentence(generator, answer)},
                ],
            }
            out.write(json.dumps(row) + "\n")


def _bpe(special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of 16,000 tokens over made-up sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((sentence(random.Random(n), 100) for n in range(5000)), trainer)
    return bpe


def write_llava(
    folder: Path,
    *,
    hidden_size: int,
    layers: int,
    tower_layers: int | None = None,
    image_size: int = 112,
    patch_size: int = 14,
    heads: int = 8,
    deviation: float = 0.02,
) -> Path:
    """A LLaVA folder that plain transformers (and TRL) can open without torchvision; `layers` of the tower too unless
    `tower_layers` says another number. `deviation`: standard deviation of the random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = _bpe(["<pad>", "<s>", "</s>", "<image>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    processor = transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": heads,
        "initializer_range": deviation,
    }
    tower = {"num_hidden_layers": tower_layers or layers, "image_size": image_size, "patch_size": patch_size, **shared}
    text = {"num_hidden_layers": layers, "vocab_size": len(tokenizer), "pad_token_id": 0, **shared}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower},
        text_config={"model_type": "llama", **text},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


_MARKS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def write_internvl(
    folder: Path,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    dtype: str = "bfloat16",
    shard_bytes: int = 10**9,
) -> Path:
    """An official InternVL folder with random weights, written tensor by tensor.

    text, vision: of llm_config (InternLM2, whose attention is fused) and vision_config: their sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(_MARKS), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    decoder = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, **text}
    tower = {"architectures": ["InternVisionModel"], "norm_type": "layer_norm", "qkv_bias": True, **vision}
    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "template": "internlm2-chat",
        "downsample_ratio": 0.5, "force_image_size": vision["image_size"], "max_dynamic_patch": 6, "ps_version": "v2",
        "select_layer": -1, "use_thumbnail": True, "torch_dtype": dtype,
        "llm_config": decoder, "vision_config": {"qk_normalization": False, **tower},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    opened = open_folder(folder)
    model = skeleton(opened)
    state, code = model.state_dict(), shards.dtype_code(dtype)
    links = saved_links(model, state, opened.layouts[opened.layout])
    plan = [
        TensorInfo(
            disk, code, (sum(state[one].shape[0] for one in link.parameters), *state[link.parameters[0]].shape[1:])
        )
        for disk, link in links.items()
    ]
    shapes = {info.name: info.shape for info in plan}
    generator = torch.Generator().manual_seed(0)

    def made(name: str) -> torch.Tensor:
        shape, kind = shapes[name], getattr(torch, dtype)
        if len(shape) > 1:
            return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(kind)
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=kind)

    shards.write_shards(folder, plan, made, max_shard_bytes=shard_bytes)
    return folder


def cut_into_shards(folder: Path, shard_bytes: int) -> Path:
    """The single file of a folder as several, each of at most `shard_bytes`."""
    source = shards.Shards(folder)
    shards.write_shards(folder, list(source.infos.values()), source.read, max_shard_bytes=shard_bytes)
    (folder / shards.SINGLE).unlink()
    return folder
