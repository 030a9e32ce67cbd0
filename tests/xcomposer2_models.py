"""InternLM-XComposer2 folders: recorded weights with a tokenizer, and tiny official ones with random weights.

Names and shapes of the random tensors are written out as the publisher's files have them, apart from the tables of the
product. Partial LoRA is random in both halves: a fresh one adds nothing, and tests on it would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KINDS = ("xcomposer2", "xcomposer2-4khd")
"""Official folders: pictures as squares, and cut into tiles."""
NATIVE = ("xcomposer2-native", "xcomposer2-4khd-native")
"""Native exports of them."""

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 320, 64, 128, 2, 4  # multiples of 64: NF4 packs whole blocks of 64 numbers
KEY_HEADS, TOWER, TOWER_LAYERS, IMAGE, PATCH, RANK = 2, 32, 2, 28, 7, 8
_START, _END = 319, 318


def furnish(case: Path, out: Path) -> Path:
    """`out` with the weights and settings of a recorded model (linked), and a tokenizer of its vocabulary's size."""
    out.mkdir(parents=True)
    for file in case.iterdir():
        if file.name in ("config.json", "vision_tower_config.json") or file.name.startswith("model"):
            (out / file.name).symlink_to(file.absolute())
    constants = json.loads((case / "constants.json").read_text(encoding="utf-8"))
    places = {constants["end_token_id"]: "[UNUSED_TOKEN_145]", constants["start_token_id"]: "[UNUSED_TOKEN_146]"}
    return add_tokenizer(out, {0: "<unk>", 1: "<s>", 2: "</s>", **places}, constants["vocab_size"])


def add_tokenizer(out: Path, special: dict[int, str], size: int) -> Path:
    """A tokenizer of bytes in `out`, with special tokens at their ids; what is left of the `size` ids nobody writes."""
    free = [number for number in range(size) if number not in special]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(symbols) <= len(free), "too small a vocabulary for all bytes"
    names = [*symbols, *(f"[UNUSED_TOKEN_{i}]" for i in range(len(free) - len(symbols)))]
    vocabulary = {name: number for number, name in zip(free, names, strict=True)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, **{name: number for number, name in special.items()}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special.values(), *names[len(symbols) :]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(out)
    return out


def official_folder(kind: str, into: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the tiny folder of a kind in `KINDS`."""
    high_resolution = kind == "xcomposer2-4khd"
    into.mkdir(parents=True, exist_ok=True)
    add_tokenizer(
        into,
        {0: "<unk>", 1: "<s>", 2: "</s>", _END: "[UNUSED_TOKEN_145]", _START: "[UNUSED_TOKEN_146]"},
        VOCABULARY,
    )
    torch.manual_seed(0)
    tensors = {name: _random(name, shape).to(dtype) for name, shape in _tensors(high_resolution)}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps({**_CONFIG, "torch_dtype": str(dtype).removeprefix("torch.")}))
    (into / "vision_tower_config.json").write_text(json.dumps(_VISION))
    (into / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}))
    for name in ("configuration_internlm_xcomposer2", "modeling_internlm_xcomposer2"):
        (into / f"{name}.py").write_text('raise SystemExit("code of a model folder was run")\n')
    return into


def native_folder(official: Path, into: Path) -> Path:
    """The native export of an official folder."""
    from vlmtune.export.write import export

    return export(official, into, layout="native", verify="none").out


_CLASS = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
_CONFIG: dict[str, Any] = {
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
        "AutoModel": _CLASS,
        "AutoModelForCausalLM": _CLASS,
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "img_size": IMAGE,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "model_type": "internlmxcomposer2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 1.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": VOCABULARY,
}
_VISION: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": TOWER,
    "image_size": IMAGE,
    "intermediate_size": 2 * TOWER,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": TOWER_LAYERS,
    "patch_size": PATCH,
    "projection_dim": TOWER,
}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    scale = torch.randn(shape) * (0.1 if len(shape) < 2 else 0.2)
    return 1 + scale if "norm" in name and name.endswith("weight") else scale


def _tensors(high_resolution: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    seen = 4 * TOWER if high_resolution else TOWER
    yield "model.tok_embeddings.weight", (VOCABULARY, WIDTH)
    head = WIDTH // HEADS
    for layer in range(LAYERS):
        linear = {
            "attention.wqkv": ((HEADS + 2 * KEY_HEADS) * head, WIDTH),
            "attention.wo": (WIDTH, WIDTH),
            "feed_forward.w1": (INNER, WIDTH),
            "feed_forward.w3": (INNER, WIDTH),
            "feed_forward.w2": (WIDTH, INNER),
        }
        at = f"model.layers.{layer}"
        for name, (rows, columns) in linear.items():
            rank = RANK // 4 if high_resolution and name == "attention.wqkv" else RANK
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.Plora_A.weight", (rank, columns)
            yield f"{at}.{name}.Plora_B.weight", (rows, rank)
        for name in ("attention_norm", "ffn_norm"):
            yield f"{at}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "output.weight", (VOCABULARY, WIDTH)
    for place, columns in ((0, seen), (2, WIDTH)):
        yield f"vision_proj.{place}.weight", (WIDTH, columns)
        yield f"vision_proj.{place}.bias", (WIDTH,)
    if high_resolution:
        yield "plora_glb_GN", (1, 1, seen)
        yield "plora_sub_GN", (1, 1, 1, seen)
    for name, shape in _tower():
        yield f"vit.vision_tower.vision_model.{name}", shape


def _tower() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.class_embedding", (TOWER,)
    yield "embeddings.patch_embedding.weight", (TOWER, 3, PATCH, PATCH)
    yield "embeddings.position_embedding.weight", ((IMAGE // PATCH) ** 2 + 1, TOWER)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield f"{name}.weight", (TOWER,)
        yield f"{name}.bias", (TOWER,)
    linear = [(f"self_attn.{one}_proj", TOWER, TOWER) for one in ("q", "k", "v", "out")]
    linear += [("mlp.fc1", 2 * TOWER, TOWER), ("mlp.fc2", TOWER, 2 * TOWER)]
    for layer in range(TOWER_LAYERS):
        at = f"encoder.layers.{layer}"
        for name, rows, columns in linear:
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.bias", (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{at}.{name}.weight", (TOWER,)
            yield f"{at}.{name}.bias", (TOWER,)
