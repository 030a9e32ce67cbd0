"""Tiny LLaVA folders as XTuner and official LLaVA write them, with random weights; no recorded files are needed.

Names and shapes of the tensors are written out as those programs have them, apart from the tables of the product. The
tokenizer has as many tokens as the embedding has rows, so that `<image>` lies beyond it, as in Vicuna.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Form = Literal["safetensors", "bin"]
VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 320, 64, 128, 2, 4  # multiples of 64: NF4 packs whole blocks of 64 numbers
TOWER_WIDTH, TOWER_LAYERS, IMAGE, PATCH = 32, 4, 48, 8
PYTHON = ("configuration_projector.py", "modeling_projector.py")

LANGUAGE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
TOWER: dict[str, Any] = {
    "architectures": ["AuroraEncoder"],
    "hidden_act": "quick_gelu",
    "hidden_size": TOWER_WIDTH,
    "image_size": IMAGE,
    "intermediate_size": 2 * TOWER_WIDTH,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": TOWER_LAYERS,
    "patch_size": PATCH,
    "projection_dim": TOWER_WIDTH,
    "torch_dtype": "float32",
}
PROJECTOR: dict[str, Any] = {
    "architectures": ["ProjectorModel"],
    "auto_map": {
        "AutoConfig": "configuration_projector.ProjectorConfig",
        "AutoModel": "modeling_projector.ProjectorModel",
    },
    "bias": True,
    "depth": 2,
    "hidden_act": "gelu",
    "llm_hidden_size": WIDTH,
    "model_type": "projector",
    "torch_dtype": "float32",
    "visual_hidden_size": TOWER_WIDTH,
}
PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": IMAGE, "width": IMAGE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": IMAGE},
}


def xtuner_folder(into: Path, *, form: Form = "safetensors", merging: bool = False) -> Path:
    """Writes the three folders; with `form` bin the tower holds its position table twice, as AuroraCap's does.

    merging: config.json says a ratio, as exports of this program do.
    """
    torch.manual_seed(0)
    write_language(
        into, form=form, more={"vlmtune": {"token_merge_ratio": 0.5, "fit": "pad_square"}} if merging else {}
    )
    write_tower(into / "visual_encoder", form=form)
    projector = into / "projector"
    projector.mkdir()
    _weights(projector, dict(random(projector_shapes())), form)
    (projector / "config.json").write_text(json.dumps(PROJECTOR, indent=1))
    for name in PYTHON:
        (projector / name).write_text('raise SystemExit("code of a model folder was run")\n')
    return into


def write_language(into: Path, *, form: Form = "safetensors", more: Mapping[str, Any] | None = None) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    _weights(into, dict(random(language_shapes())), form)
    (into / "config.json").write_text(json.dumps({**LANGUAGE, **(more or {})}, indent=1))
    (into / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    write_tokenizer(into)
    return into


def write_tower(into: Path, *, form: Form = "safetensors") -> Path:
    into.mkdir(parents=True, exist_ok=True)
    tower = dict(random(tower_shapes()))
    if form == "bin":
        tower["pos_emb"] = tower["vision_model.embeddings.position_embedding.weight"]
    _weights(into, tower, form)
    (into / "config.json").write_text(json.dumps(TOWER, indent=1))
    (into / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    return into


def write_tokenizer(into: Path, count: int = VOCABULARY) -> None:
    """Characters, and names that no text has; bos and eos as Llama has them, no pad token."""
    characters = [*"\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:'"]
    names = ["<unk>", "<s>", "</s>", *characters]
    names += [f"[{i}]" for i in range(count - len(names))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(into)


def random(shapes: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes:
        scale = torch.randn(shape) * (0.1 if len(shape) < 2 else 0.3)
        yield name, 1 + scale if "norm" in name and name.endswith("weight") else scale


def language_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name in ("q_proj", "o_proj"):
            yield f"{at}.self_attn.{name}.weight", (WIDTH, WIDTH)
        for name in ("k_proj", "v_proj"):
            yield f"{at}.self_attn.{name}.weight", (WIDTH // 2, WIDTH)
        for name in ("gate_proj", "up_proj"):
            yield f"{at}.mlp.{name}.weight", (INNER, WIDTH)
        yield f"{at}.mlp.down_proj.weight", (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def tower_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    width = TOWER_WIDTH
    yield "vision_model.embeddings.class_embedding", (width,)
    yield "vision_model.embeddings.patch_embedding.weight", (width, 3, PATCH, PATCH)
    yield "vision_model.embeddings.position_embedding.weight", ((IMAGE // PATCH) ** 2 + 1, width)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield f"vision_model.{name}.weight", (width,)
        yield f"vision_model.{name}.bias", (width,)
    linear = [(f"self_attn.{one}_proj", width, width) for one in ("q", "k", "v", "out")]
    linear += [("mlp.fc1", 2 * width, width), ("mlp.fc2", width, 2 * width)]
    for i in range(TOWER_LAYERS):
        at = f"vision_model.encoder.layers.{i}"
        for name, rows, columns in linear:
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.bias", (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{at}.{name}.weight", (width,)
            yield f"{at}.{name}.bias", (width,)


def projector_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    for place, columns in ((0, TOWER_WIDTH), (2, WIDTH)):
        yield f"model.{place}.weight", (WIDTH, columns)
        yield f"model.{place}.bias", (WIDTH,)


def _weights(folder: Path, tensors: Mapping[str, torch.Tensor], form: Form) -> None:
    if form == "bin":
        torch.save(dict(tensors), folder / "pytorch_model.bin")
    else:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
