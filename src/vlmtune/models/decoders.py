"""The decoders inside official folders, in the words of transformers' configurations.

Source of the fields: OpenGVLab's configuration_internlm2.py and configuration_phi3.py, and InternLM's
configuration_internlm_xcomposer2.py. Fields that only steer generation or that every v4 config carried are left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from vlmtune.errors import WeightsError

INTERNLM2 = "internlm2"
_LLAMA = "llama"  # InternLM2 is Llama's arithmetic under other names
_ROPE_NAMES = {"su": "longrope"}
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
COPY_CONFIG = "Copy config.json from the model's repository again."


def check_counts(decoder: Mapping[str, Any], *, field: str, where: str) -> None:
    """The numbers that names, shapes and cuts of the decoder's tensors are worked out from.

    Args:
        field: where in config.json the decoder is described.

    Raises:
        WeightsError: one is no such number.
        KeyError: one is not there.
    """
    for name in _COUNTS:
        if not isinstance(decoder[name], int) or decoder[name] < 1:
            raise WeightsError(f"{field}: {name} is {decoder[name]!r}", where=where, expected="a positive number")
    heads, groups = decoder["num_attention_heads"], decoder.get("num_key_value_heads") or 0
    if not isinstance(groups, int) or (groups and heads % groups):
        raise WeightsError(
            f"{field}: {heads} heads share num_key_value_heads {groups!r}", where=where, expected="equal groups",
            remedy=COPY_CONFIG,
        )  # fmt: skip


def text_config(decoder: Mapping[str, Any], *, tied: bool, where: str) -> dict[str, Any]:
    """The fields of transformers' class for a decoder that is described in the publisher's words.

    Args:
        tied: the output head is the embedding.

    Raises:
        WeightsError: a kind of decoder that transformers has no class for.
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
    text["rope_parameters"] = _rope(decoder)
    return text


def _rope(decoder: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(decoder.get("rope_scaling") or {})
    named = [scaling.pop(key, None) for key in ("rope_type", "type")]  # folders saved by later versions have both
    kind = next(filter(None, named), "default")
    rope = {
        "rope_type": _ROPE_NAMES.get(kind, kind),
        "rope_theta": float(decoder.get("rope_theta", 10000.0)),
        **scaling,
    }
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = decoder["original_max_position_embeddings"]
    return rope
