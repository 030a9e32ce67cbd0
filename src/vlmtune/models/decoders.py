"""The decoders inside official folders, in the words of transformers' configurations.

Source of the fields: OpenGVLab's configuration_internlm2.py and configuration_phi3.py, and InternLM's
configuration_internlm_xcomposer2.py. Fields that only steer generation or that every v4 config carried are left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlmtune.errors import WeightsError

INTERNLM2 = "internlm2"
_LLAMA = "llama"  # InternLM2 is Llama's arithmetic under other names
_ROPE_NAMES = {"su": "longrope"}
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_MOST_LAYERS = 1000  # every one is built before it is known to be absent from the files
COPY_CONFIG = "Copy config.json from the model's repository again."


def check_counts(decoder: Mapping[str, Any], *, field: str, where: str) -> None:
    """The numbers that names, shapes and cuts of the decoder's tensors are worked out from.

    Args:
        field: where in config.json the decoder is described.

    Raises:
        WeightsError: one is no such number.
        KeyError: one is not there.
    """
    found = {name: decoder[name] for name in _COUNTS}
    if decoder.get("max_position_embeddings") is not None:
        found["max_position_embeddings"] = decoder["max_position_embeddings"]
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise WeightsError(f"{field}: {name} is {value!r}", where=where, expected="a positive number")
    if found["num_hidden_layers"] > _MOST_LAYERS:
        raise WeightsError(
            f"{field}: num_hidden_layers is {found['num_hidden_layers']:,}", where=where,
            expected=f"at most {_MOST_LAYERS:,}", remedy=COPY_CONFIG,
        )  # fmt: skip
    heads, groups = decoder["num_attention_heads"], decoder.get("num_key_value_heads") or 0
    if not isinstance(groups, int) or (groups and heads % groups):
        raise WeightsError(
            f"{field}: {heads} heads share num_key_value_heads {groups!r}", where=where, expected="equal groups",
            remedy=COPY_CONFIG,
        )  # fmt: skip


def check_activation(name: object, *, field: str, where: str) -> None:
    """
    Raises:
        WeightsError: transformers, which builds the layers, has no activation of this name.
    """
    if not isinstance(name, str) or name not in ACT2FN:
        raise WeightsError(
            f"{field}: hidden_act is {name!r}", where=where,
            expected="the name of an activation of transformers, like silu or gelu", remedy=COPY_CONFIG,
        )  # fmt: skip


def text_config(decoder: Mapping[str, Any], *, tied: bool, where: str) -> dict[str, Any]:
    """The fields of transformers' class for a decoder that is described in the publisher's words.

    Args:
        tied: the output head is the embedding.

    Raises:
        WeightsError: a kind of decoder that transformers has no class for, or an activation or a scaling of
            positions that it does not know.
    """
    kind = str(decoder.get("model_type"))
    native = _LLAMA if kind == INTERNLM2 else kind
    if native not in CONFIG_MAPPING:
        raise WeightsError(
            f"the decoder is of model_type {kind!r}", where=where,
            expected="internlm2, qwen2, phi3, llama, or another decoder of transformers",
        )  # fmt: skip
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[native])}
    text = {name: value for name, value in decoder.items() if name in known - {"architectures", "return_dict"}}
    text.pop("transformers_version", None)
    if kind == INTERNLM2:
        text["attention_bias"] = bool(decoder.get("bias", True))
    text.update(model_type=native, tie_word_embeddings=tied, use_cache=True)
    if "hidden_act" in text:
        check_activation(text["hidden_act"], field="the decoder", where=where)
    text["rope_parameters"] = _rope(decoder, where)
    return text


def _rope(decoder: Mapping[str, Any], where: str) -> dict[str, Any]:
    scaling = dict(decoder.get("rope_scaling") or {})
    named = [scaling.pop(key, None) for key in ("rope_type", "type")]  # folders saved by later versions have both
    kind = next(filter(None, named), "default")
    rope = {
        "rope_type": _ROPE_NAMES.get(kind, kind),
        "rope_theta": float(decoder.get("rope_theta", 10000.0)),
        **scaling,
    }
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in known:
        raise WeightsError(
            f"the decoder: rope_scaling is of the type {kind!r}", where=where,
            expected=f"{', '.join(known)}, or su", remedy=COPY_CONFIG,
        )  # fmt: skip
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = decoder["original_max_position_embeddings"]
    return rope
