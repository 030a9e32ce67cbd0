"""Tiny official InternVL folders with random weights, one for each decoder; their tokenizers need no recorded files.

Names and shapes of the tensors are written out here as the official modelling files have them, apart from the tables
that the product reads them with. `official.py` has folders with real tokenizers, without weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DECODERS: Mapping[str, tuple[str, str]] = {
    "internlm2": ("InternLM2ForCausalLM", "internlm2-chat"),
    "qwen2": ("Qwen2ForCausalLM", "Hermes-2"),
    "phi3": ("Phi3ForCausalLM", "phi3-chat"),
    "llama": ("LlamaForCausalLM", "Hermes-2"),
}
"""model_type of llm_config -> architecture and template."""


def dynamic(limit: int) -> dict[str, Any]:
    """Changes of llm_config: rows longer than `limit` tokens have other frequencies (dynamic NTK)."""
    return {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": limit}


def su(limit: int) -> dict[str, Any]:
    """The same for Phi-3's su (longrope): a table of factors each for short and for long rows."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
    return {
        "rope_scaling": {"type": "su", **factors},
        "max_position_embeddings": 4 * limit,
        "original_max_position_embeddings": limit,
    }


_WIDTH, _INNER, _LAYERS, _HEADS, _KEY_HEADS = 64, 128, 2, 4, 2  # multiples of 64: NF4 packs whole blocks of 64 numbers
_HEAD_DIM = _WIDTH // _HEADS
_IMAGE, _PATCH = 28, 7  # 16 patches, 4 tokens a tile

_SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_OF_PICTURES = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
_BOOBY_TRAP = 'raise SystemExit("code of a model folder was run")\n'


def official_folder(
    decoder: str, into: Path, *, text: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes the folder; `text` changes llm_config."""
    architecture, template = DECODERS[decoder]
    into.mkdir(parents=True, exist_ok=True)
    stop = "<|end|>" if template == "phi3-chat" else "<|im_end|>"
    tokenizer = make_tokenizer([*_SPECIAL, *_OF_PICTURES], eos=stop, bos="<s>", extra={})
    tokenizer.save_pretrained(into)
    torch.manual_seed(0)
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors(decoder, len(tokenizer))}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    llm = {"model_type": decoder, "architectures": [architecture], **_llm(len(tokenizer)), **(text or {})}
    config = {**_CHAT, "template": template, "llm_config": llm, "vision_config": _VISION}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (into / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"_from_model_config": True, "eos_token_id": [tokenizer.eos_token_id, 2]}
    (into / "generation_config.json").write_text(json.dumps(generation))
    for name in ("configuration_internvl_chat", "modeling_internvl_chat"):
        (into / f"{name}.py").write_text(_BOOBY_TRAP)
    return into


_CHAT: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": _IMAGE,
    "max_dynamic_patch": 4,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "use_thumbnail": True,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
_VISION: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "image_size": _IMAGE,
    "patch_size": _PATCH,
    "num_channels": 3,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "drop_path_rate": 0.1,
    "initializer_factor": 1.0,
    "use_flash_attn": True,
}


def _llm(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_HEADS,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _tensors(decoder: str, vocabulary: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in (*_tower(), *_projector(), *_decoder(decoder, vocabulary)):
        scale = torch.randn(shape) * (0.1 if len(shape) < 2 else 0.3)
        norm = len(shape) == 1 and ("norm" in name or ".ls" in name or name == "mlp1.0.weight")
        yield name, 1 + scale if norm and name.endswith(("weight", "ls1", "ls2")) else scale


def _tower() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "vision_model.embeddings.class_embedding", (1, 1, _WIDTH)
    yield "vision_model.embeddings.position_embedding", (1, (_IMAGE // _PATCH) ** 2 + 1, _WIDTH)
    yield "vision_model.embeddings.patch_embedding.weight", (_WIDTH, 3, _PATCH, _PATCH)
    yield "vision_model.embeddings.patch_embedding.bias", (_WIDTH,)
    linear = (("attn.qkv", 3 * _WIDTH, _WIDTH), ("attn.proj", _WIDTH, _WIDTH))
    linear += (("mlp.fc1", _INNER, _WIDTH), ("mlp.fc2", _WIDTH, _INNER))
    for layer in range(_LAYERS):
        at = f"vision_model.encoder.layers.{layer}"
        for name, rows, columns in linear:
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.bias", (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1", "ls2"):
            yield f"{at}.{name}", (_WIDTH,)


def _projector() -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("0", (4 * _WIDTH,)), ("1", (_WIDTH, 4 * _WIDTH)), ("3", (_WIDTH, _WIDTH))):
        yield f"mlp1.{name}.weight", shape
        yield f"mlp1.{name}.bias", shape[:1]


def _decoder(decoder: str, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    own = decoder == "internlm2"
    heads = (_HEADS + 2 * _KEY_HEADS) * _HEAD_DIM
    narrow = _KEY_HEADS * _HEAD_DIM
    yield f"language_model.model.{'tok_embeddings' if own else 'embed_tokens'}.weight", (vocabulary, _WIDTH)
    for layer in range(_LAYERS):
        at = f"language_model.model.layers.{layer}"
        if own:
            shapes = {"attention.wqkv": (heads, _WIDTH), "attention.wo": (_WIDTH, _WIDTH)}
            shapes |= {"feed_forward.w1": (_INNER, _WIDTH), "feed_forward.w3": (_INNER, _WIDTH)}
            shapes |= {"feed_forward.w2": (_WIDTH, _INNER)}
        elif decoder == "phi3":
            shapes = {"self_attn.qkv_proj": (heads, _WIDTH), "self_attn.o_proj": (_WIDTH, _WIDTH)}
            shapes |= {"mlp.gate_up_proj": (2 * _INNER, _WIDTH), "mlp.down_proj": (_WIDTH, _INNER)}
        else:
            shapes = {"self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.o_proj": (_WIDTH, _WIDTH)}
            shapes |= {"self_attn.k_proj": (narrow, _WIDTH), "self_attn.v_proj": (narrow, _WIDTH)}
            shapes |= {"mlp.gate_proj": (_INNER, _WIDTH), "mlp.up_proj": (_INNER, _WIDTH)}
            shapes |= {"mlp.down_proj": (_WIDTH, _INNER)}
        for name, shape in shapes.items():
            yield f"{at}.{name}.weight", shape
            if decoder == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{at}.{name}.bias", shape[:1]
        for name in ("attention_norm", "ffn_norm") if own else ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (_WIDTH,)
    yield "language_model.model.norm.weight", (_WIDTH,)
    yield f"language_model.{'output' if own else 'lm_head'}.weight", (vocabulary, _WIDTH)


def with_tokenizer(case: Path, into: Path) -> Path:
    """A recorded model (golden `forward/<case>`) with a tokenizer whose special tokens have the recorded ids.

    Its other tokens are single characters and numbers, so that any text has ids inside the embedding.
    """
    shutil.copytree(case, into, ignore=shutil.ignore_patterns("io.safetensors", "meta.json"))
    record = json.loads((case / "meta.json").read_text(encoding="utf-8"))
    config = json.loads((case / "config.json").read_text(encoding="utf-8"))
    roles = record["special_token_ids"]
    phi = config["template"] == "phi3-chat"
    names = {"img": "<img>", "img_end": "</img>", "img_context": "<IMG_CONTEXT>"}
    names |= {"im_start": "<|system|>" if phi else "<|im_start|>", "im_end": "<|end|>" if phi else "<|im_end|>"}
    names |= {"user": "<|user|>" if phi else "[user]", "assistant": "<|assistant|>" if phi else "[assistant]"}
    special = {2: "</s>", **{roles[role]: token for role, token in names.items()}}
    characters = iter(
        [*"\n abcdefghijklmnopqrstuvwxyz.,?", *(f"[{i}]" for i in range(config["llm_config"]["vocab_size"]))]
    )
    vocabulary = {special.get(i) or next(characters): i for i in range(config["llm_config"]["vocab_size"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[0]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=names["im_end"], pad_token="[1]")
    tokenizer.save_pretrained(into)
    (into / "modeling_internvl_chat.py").write_text(_BOOBY_TRAP)
    (into / "generation_config.json").write_text(json.dumps({"eos_token_id": [roles["im_end"], 2]}))
    return into
