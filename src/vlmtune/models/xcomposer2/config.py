"""config.json and the shapes of an official folder as the configuration of our class, and back.

The publisher's code holds sizes as constants that config.json does not say; here they are read off the tensors. Source
of the fields and constants: configuration_internlm_xcomposer2.py, build_mlp.py and modeling_internlm2.py of the hub
folders internlm-xcomposer2-7b, -vl-7b and -4khd-7b.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig

from vlmtune.errors import WeightsError
from vlmtune.files import read_json
from vlmtune.models.decoders import COPY_CONFIG, INTERNLM2, check_activation, check_counts, text_config
from vlmtune.models.family import ModelFolder
from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.models.xcomposer2.weights import PATCHES, POSITIONS, SEPARATOR
from vlmtune.weights.ops import Shape
from vlmtune.weights.shards import Shards

TOWER_FILE = "vision_tower_config.json"
"""A CLIPVisionConfig beside config.json, for towers other than the publisher's; their folders need none."""
RECORD = "vlmtune"
"""Key of an official config.json under which it says what the publisher's has no word for: {max_tiles, chat}."""
UNSAID = ("max_tiles", "chat")
_ARCHITECTURE = "InternLMXComposer2ForCausalLM"
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}  # openai/clip-vit-large-patch14-336, which the publisher's code opens by this name
# Of the partial LoRA in front of the attention: alpha 16 and rank 8; everywhere else alpha is the rank.
_HIGH_RESOLUTION_SCALE = 2.0
_RANK_OF = "model.layers.0.attention.{}.Plora_A.weight"


def is_official(config: Mapping[str, Any]) -> bool:
    """By the architecture: model_type is internlm, internlm2 or internlmxcomposer2 in folders of the same model."""
    named = config.get("architectures")
    return isinstance(named, list) and _ARCHITECTURE in named


def native_config(folder: ModelFolder) -> XComposer2Config:
    """The configuration of our class for an official folder.

    Raises:
        WeightsError: a field or a tensor is absent, or they contradict each other.
    """
    where = str(folder.path)
    shapes = {name: info.shape for name, info in Shards(folder.path).infos.items()}
    decoder = {**folder.config, "model_type": INTERNLM2}
    high_resolution = SEPARATOR in shapes
    kept: dict[str, Any] = folder.config.get(RECORD) or {}
    try:
        check_counts(decoder, field="config.json", where=where)
        return XComposer2Config(
            text_config=text_config(decoder, tied=False, where=where),
            vision_config=_vision(folder, shapes),
            high_resolution=high_resolution,
            **{name: kept[name] for name in UNSAID if name in kept},
            partial_rank=_shape(shapes, _RANK_OF.format("wo"), where)[0],
            partial_wqkv_rank=_shape(shapes, _RANK_OF.format("wqkv"), where)[0],
            partial_wqkv_scale=_HIGH_RESOLUTION_SCALE if high_resolution else 1.0,
            architectures=["XComposer2ForConditionalGeneration"],
            dtype=folder.config.get("torch_dtype") or folder.config.get("dtype"),
        )
    except KeyError as error:
        raise WeightsError(
            f"config.json has no {error.args[0]!r}", where=where,
            expected="the fields of an official InternLM-XComposer2 folder", remedy=COPY_CONFIG,
        ) from error  # fmt: skip
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise WeightsError(f"config.json: {' '.join(str(error).split())}", where=where, remedy=COPY_CONFIG) from error


def _vision(folder: ModelFolder, shapes: Mapping[str, Shape]) -> CLIPVisionConfig:
    """The tower's sizes; its picture size is the one that the table of positions is for."""
    where = str(folder.path)
    file = folder.path / TOWER_FILE
    known = read_json(file) if file.is_file() else _CLIP_L_336
    missing = [name for name in ("hidden_size", "patch_size") if name not in known]
    if missing:
        raise WeightsError(
            f"has no {' and no '.join(missing)}", where=str(file), expected="the fields of a CLIPVisionConfig",
            remedy="Copy the tower's configuration again.",
        )  # fmt: skip
    width, _, patch, _ = _shape(shapes, PATCHES, where, axes=4)
    patches = _shape(shapes, POSITIONS, where)[0] - 1
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise WeightsError(
            f"the tensor {POSITIONS} has {patches + 1} rows", where=where, expected="1 + n² rows",
            remedy="Download the folder again.",
        )  # fmt: skip
    if (width, patch) != (known["hidden_size"], known["patch_size"]):
        raise WeightsError(
            f"the vision tower has a width of {width} and patches of {patch} pixels",
            where=where,
            expected=f"{known['hidden_size']} and {known['patch_size']}, as {TOWER_FILE} or CLIP-L/14 have them",
            remedy=f"Write the tower's configuration (of its own folder, a CLIPVisionConfig) to {TOWER_FILE}.",
        )
    return _tower({**known, "image_size": isqrt(patches) * patch}, where=str(file) if file.is_file() else where)


def _tower(fields: dict[str, Any], *, where: str) -> CLIPVisionConfig:
    try:
        vision = CLIPVisionConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise WeightsError(
            " ".join(str(error).split()), where=where, remedy="Copy the tower's configuration again."
        ) from error
    check_activation(vision.hidden_act, field="the tower", where=where)
    return vision


def _shape(shapes: Mapping[str, Shape], name: str, where: str, *, axes: int = 2) -> Shape:
    if name not in shapes:
        raise WeightsError(
            f"there is no tensor {name} in the files", where=where,
            expected="all tensors of InternLM-XComposer2, partial LoRA and vision tower among them",
            remedy="Download the folder again. Adapters alone are opened by `vlmtune chat`, `eval` and `export`.",
        )  # fmt: skip
    if len(shapes[name]) != axes:
        raise WeightsError(
            f"the tensor {name} has the shape {shapes[name]}", where=where, expected=f"{axes} axes",
            remedy="Download the folder again.",
        )  # fmt: skip
    return shapes[name]


def tower_file(config: XComposer2Config) -> dict[str, Any] | None:
    """What `TOWER_FILE` must say of a model; None for the publisher's tower."""
    vision = cast(CLIPVisionConfig, config.vision_config)
    plain = {name: vars(vision)[name] for name in _CLIP_L_336}
    if plain == _CLIP_L_336 and vision.hidden_act == "quick_gelu":
        return None
    return vision.to_diff_dict()


def official_of(config: XComposer2Config) -> dict[str, Any]:
    """An official config.json for a model whose own is not at hand."""
    text = cast(Any, config.text_config)
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    return {
        "architectures": [_ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": f"modeling_internlm_xcomposer2.{_ARCHITECTURE}",
            "AutoModelForCausalLM": f"modeling_internlm_xcomposer2.{_ARCHITECTURE}",
        },
        "model_type": "internlmxcomposer2",
        "bias": text.attention_bias,
        **{name: vars(text)[name] for name in _SAME_FIELDS},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "tie_word_embeddings": False,
    }


_SAME_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "use_cache", "vocab_size",
)  # fmt: skip
