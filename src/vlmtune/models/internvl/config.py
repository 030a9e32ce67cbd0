"""config.json of an official InternVL folder as the configuration of transformers' class, and back.

Source of the fields: OpenGVLab's configuration_internvl_chat.py and configuration_intern_vit.py; of the decoder's, see
models/decoders.py. Fields that are left behind stay in the official config.json, which an export brings back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig

from vlmtune.errors import WeightsError
from vlmtune.models.decoders import COPY_CONFIG, INTERNLM2, check_counts, text_config
from vlmtune.weights.ops import SplitGQA

_MODEL_TYPE = "internvl_chat"
_CAUSAL = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_QK_NORM_EPS = 1e-6  # fixed in transformers' class


def is_official(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == _MODEL_TYPE


def decoder_heads(config: Mapping[str, Any]) -> SplitGQA | None:
    """How the fused attention of an InternLM2 decoder is cut; None for other decoders."""
    decoder = config["llm_config"]
    if decoder.get("model_type") != INTERNLM2:
        return None
    heads = int(decoder["num_attention_heads"])
    groups = int(decoder.get("num_key_value_heads") or heads)
    return SplitGQA(groups=groups, queries=heads // groups, head_dim=int(decoder["hidden_size"]) // heads)


def native_config(
    config: Mapping[str, Any], *, context_id: int, tokens_per_tile: int, has_head: bool, where: str
) -> InternVLConfig:
    """The configuration of transformers' class for an official config.json.

    Args:
        context_id: id of ``<IMG_CONTEXT>``.
        tokens_per_tile: placeholders of a tile.
        has_head: the files hold an output head. Official code uses it even where the config says that it is tied; it
            is tied when there is none.
        where: names the folder in errors.

    Raises:
        WeightsError: a tower or a decoder that transformers has no class for, or a setting that its classes lack.
    """
    try:
        vision, decoder = config["vision_config"], config["llm_config"]
        check_counts(decoder, field="llm_config", where=where)
        return InternVLConfig(
            vision_config=_vision(vision, where),
            text_config=text_config(decoder, tied=not has_head, where=where),
            image_token_id=context_id,
            image_seq_length=tokens_per_tile,
            downsample_ratio=float(config.get("downsample_ratio", 0.5)),
            vision_feature_layer=int(config.get("select_layer", -1)),
            tie_word_embeddings=not has_head,
            architectures=["InternVLForConditionalGeneration"],
            dtype=config.get("torch_dtype") or config.get("dtype"),
            **_shuffle(config, where),
        )
    except KeyError as error:
        raise WeightsError(
            f"config.json has no {error.args[0]!r}", where=where, expected="the fields of an official InternVL folder",
            remedy=COPY_CONFIG,
        ) from error  # fmt: skip
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        # what transformers' classes say of a value of the wrong kind
        raise WeightsError(f"config.json: {' '.join(str(error).split())}", where=where, remedy=COPY_CONFIG) from error


def _shuffle(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`ps_version` v1 leaves rows and columns of a tile swapped; transformers' class has no word for it."""
    version = config.get("ps_version", "v1")
    if version not in ("v1", "v2"):
        raise WeightsError(f"ps_version is {version!r}", where=where, expected="v1 or v2")
    return {} if version == "v2" else {"ps_version": "v1"}


def _vision(vision: Mapping[str, Any], where: str) -> dict[str, Any]:
    architecture = (vision.get("architectures") or ["InternVisionModel"])[0]
    if architecture != "InternVisionModel":
        raise WeightsError(f"the vision tower is {architecture!r}", where=where, expected="InternVisionModel")
    eps = float(vision.get("layer_norm_eps", 1e-6))
    if vision.get("qk_normalization") and eps != _QK_NORM_EPS:
        raise WeightsError(
            f"qk_normalization with layer_norm_eps {eps}", where=where,
            expected=f"{_QK_NORM_EPS}, the only one that transformers' class has",
        )  # fmt: skip
    return {
        "hidden_size": vision["hidden_size"],
        "num_hidden_layers": vision["num_hidden_layers"],
        "num_attention_heads": vision["num_attention_heads"],
        "intermediate_size": vision["intermediate_size"],
        "attention_bias": bool(vision.get("qkv_bias", False)),
        "use_qk_norm": bool(vision.get("qk_normalization", True)),
        "hidden_act": vision.get("hidden_act", "gelu"),
        "hidden_dropout_prob": float(vision.get("dropout", 0.0)),
        "attention_dropout": float(vision.get("attention_dropout", 0.0)),
        "norm_type": vision.get("norm_type", "rms_norm"),
        "layer_norm_eps": eps,
        "image_size": [vision["image_size"]] * 2,
        "patch_size": [vision["patch_size"]] * 2,
        "num_channels": vision.get("num_channels", 3),
        "layer_scale_init_value": float(vision.get("initializer_factor", 1.0)),
    }


def has_official_name(native: Mapping[str, Any]) -> bool:
    """Whether `official_of` knows the decoder of a native config.json."""
    return (native.get("text_config") or {}).get("model_type") in _CAUSAL


def official_of(native: Mapping[str, Any], *, has_head: bool) -> dict[str, Any]:
    """An official config.json for a native one that was never official (InternVL 2.5 and later from the hub).

    Args:
        native: with the defaults of transformers' class, which files may leave out.
        has_head: the files hold an output head; native configs may call it tied all the same.

    Raises:
        WeightsError: a decoder whose official name is not known.
    """
    kind = native["text_config"]["model_type"]
    if not has_official_name(native):
        raise WeightsError(
            f"the decoder {kind!r} has no place in an official folder", where="config.json",
            expected=", ".join(_CAUSAL),
        )  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": _MODEL_TYPE,
        "downsample_ratio": native.get("downsample_ratio", 0.5),
        "ps_version": "v2",
        "select_layer": native.get("vision_feature_layer", -1),
        "template": "internvl2_5",
        "llm_config": {**_official_decoder(native["text_config"]), "tie_word_embeddings": not has_head},
        "vision_config": _official_tower(native["vision_config"]),
        "tie_word_embeddings": not has_head,
    }


def _official_decoder(text: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(text.get("rope_parameters") or {})
    theta, scaled = rope.pop("rope_theta", text.get("rope_theta", 10000.0)), rope.pop("rope_type", "default")
    return {
        **{name: value for name, value in text.items() if name not in ("rope_parameters", "dtype")},
        "architectures": [_CAUSAL[text["model_type"]]],
        "rope_theta": theta,
        "rope_scaling": None if scaled == "default" else {"type": scaled, **rope},
    }


def _official_tower(vision: Mapping[str, Any]) -> dict[str, Any]:
    size, patch = vision["image_size"], vision["patch_size"]
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": vision["hidden_size"],
        "num_hidden_layers": vision["num_hidden_layers"],
        "num_attention_heads": vision["num_attention_heads"],
        "intermediate_size": vision["intermediate_size"],
        "qkv_bias": vision.get("attention_bias", False),
        "qk_normalization": vision.get("use_qk_norm", False),
        "hidden_act": vision.get("hidden_act", "gelu"),
        "dropout": vision.get("hidden_dropout_prob", 0.0),
        "attention_dropout": vision.get("attention_dropout", 0.0),
        "norm_type": vision.get("norm_type", "layer_norm"),
        "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
        "image_size": size[0] if isinstance(size, (list, tuple)) else size,
        "patch_size": patch[0] if isinstance(patch, (list, tuple)) else patch,
        "num_channels": vision.get("num_channels", 3),
        "initializer_factor": vision.get("layer_scale_init_value", 0.1),
    }
