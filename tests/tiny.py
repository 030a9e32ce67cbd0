"""Tiny random model folders, one per architecture that the `auto` family promises; saved once per test session.

Each is an ordinary transformers folder: config, safetensors, tokenizer trained on the spot, PIL image processor files,
processor_config.json and a chat template in the manner of the public checkpoints of that architecture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

TEXT = """What is in this picture? A cat on a red mat, beside two small dogs. Which digit is this? It is a seven.
Describe the screen. The button says OK. Where is the menu? At the top left. How many people? Three of them, standing.
0 1 2 3 4 5 6 7 8 9 user assistant system human gpt yes no larger smaller same different left right first second."""

IM_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAVA_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'][0]['text'] + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- else -%}{{ 'ASSISTANT: ' + message['content'][0]['text'] + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

SMOLVLM_TEMPLATE = """<|im_start|>{%- for message in messages -%}
{{ message['role'] | capitalize }}
{%- if message['content'][0]['type'] == 'image' -%}{{ ':' }}{%- else -%}{{ ': ' }}{%- endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- elif part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}<end_of_utterance>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""


def make_tokenizer(
    special: list[str], *, eos: str, extra: Mapping[str, str], bos: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `TEXT`, 400 tokens, with the special tokens of one architecture."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token="<pad>",
        bos_token=bos,
        extra_special_tokens=dict(extra),
    )


def _text(**more: object) -> dict[str, object]:
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **more,
    }


def _internvl(folder: Path) -> PreTrainedConfig:
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(special, eos="<|im_end|>", extra=tokens)
    _save_processor(
        folder,
        tokenizer,
        IM_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\\n"),
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 16},
        image={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    )
    return transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **_text()},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=16,
    )


def _llava(folder: Path) -> PreTrainedConfig:
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = make_tokenizer(special, eos="</s>", bos="<s>", extra={"image_token": "<image>"})
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    _save_processor(
        folder,
        tokenizer,
        LLAVA_TEMPLATE,
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
        image={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
        },
    )
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_text()},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )


def _llava_merged(folder: Path) -> PreTrainedConfig:
    config = _llava(folder)
    config.update({"vlmtune": {"token_merge_ratio": 0.5}})
    return config


_QWEN_TOKENS = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def _qwen(folder: Path, processor_class: str, patch_size: int) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(_QWEN_TOKENS, eos="<|im_end|>", extra={})
    _save_processor(
        folder,
        tokenizer,
        IM_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        processor={"processor_class": processor_class},
        image={
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": (4 * patch_size) ** 2,
            "max_pixels": (8 * patch_size) ** 2,
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    )
    return tokenizer


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen2_5_vl(folder: Path) -> PreTrainedConfig:
    tokenizer = _qwen(folder, "Qwen2_5_VLProcessor", patch_size=14)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": 2,
            "rope_parameters": rope,
            **_text(),
        },
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )


def _qwen3_vl(folder: Path) -> PreTrainedConfig:
    tokenizer = _qwen(folder, "Qwen3VLProcessor", patch_size=16)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    return transformers.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": 2,
            "rope_parameters": rope,
            "head_dim": 12,
            **_text(num_hidden_layers=3),
        },
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )


def _smolvlm(folder: Path) -> PreTrainedConfig:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = [
        "<pad>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *grid,
    ]
    tokens = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = make_tokenizer(special, eos="<end_of_utterance>", bos="<|im_start|>", extra=tokens)
    _save_processor(
        folder,
        tokenizer,
        SMOLVLM_TEMPLATE,
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        image={
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 96},
            "max_image_size": {"longest_edge": 32},
            "do_image_splitting": True,
        },
    )
    return transformers.SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **_text()},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )


def _save_processor(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    *,
    processor: dict[str, object],
    image: dict[str, object],
) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**image, "processor_class": processor["processor_class"]})
    )
    stop = tokenizer.eos_token_id
    generation = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))


KINDS: Mapping[str, Callable[[Path], PreTrainedConfig]] = {
    "internvl": _internvl,
    "llava": _llava,
    "llava-merged": _llava_merged,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}


def save_tiny(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the tiny model of `kind` to `folder` with weights from a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = KINDS[kind](folder)
    generation = (folder / "generation_config.json").read_text()
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual 0.02 makes so small a model blind: all its answers would be alike
                parameter.mul_(4)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    return folder
