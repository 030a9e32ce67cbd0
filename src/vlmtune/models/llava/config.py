"""config.json of XTuner's and official LLaVA folders as the configuration of transformers' class, and back.

Source of the fields: XTuner's ProjectorConfig, LLaVA's llava_arch.py and multimodal_encoder/clip_encoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, LlavaConfig, PretrainedConfig

from vlmtune.errors import WeightsError

XTUNER, LLAVA = "xtuner", "llava"
RECORD = "vlmtune"
"""Key of config.json, in every layout: how pictures were seen in training."""
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_CAUSAL = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
_OFFICIAL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""model_type and class in official LLaVA, by the model_type of the decoder."""
_OF_TOWER = ("CLIPVisionModel", "SiglipVisionModel")
_MULTIMODAL = ("mm_", "image_", "unfreeze_", "use_mm_", "tune_mm_", "freeze_mm_", "tokenizer_", RECORD)
_KNOWN: dict[str, tuple[Any, ...]] = {
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("square", "pad", None),
}
"""Traits of official folders, and the values that this program follows; the first is that of a folder without one."""
_OPENAI = "openai/clip-vit-large-patch14"
_OPENAI_SIZES = {_OPENAI: 224, f"{_OPENAI}-336": 336}
_OPENAI_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
"""config.json of OpenAI's CLIP ViT-L/14, for both of its picture sizes."""


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether this is config.json of LLaVA's own code, whose model types differ by version."""
    return "mm_vision_tower" in config


def tower_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The vision tower's part of a tower folder's config.json, which may be that of a whole CLIP; nothing left out.

    Raises:
        WeightsError: neither CLIP's nor SigLIP's tower.
    """
    kind = str(config.get("model_type"))
    vision = {**config.get("vision_config", {}), "model_type": _TOWERS[kind]} if kind in _TOWERS else dict(config)
    if vision.get("model_type") not in _TOWERS.values():
        raise WeightsError(f"the vision tower is {kind!r}", where=where, expected="CLIP or SigLIP")
    return filled({name: value for name, value in vision.items() if name not in ("transformers_version", RECORD)})


def filled(part: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a language model or a tower with the sizes that it leaves to its class, as folders on the hub do.

    part: names a model_type of transformers.
    """
    whole = CONFIG_MAPPING[str(part["model_type"])](**part).to_dict()
    common = PretrainedConfig().to_dict()  # labels and the like, which say nothing of the weights
    return {**part, **{name: value for name, value in whole.items() if name not in part and name not in common}}


def filled_native(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of transformers' LLaVA class with both parts filled; those of hub folders leave most sizes out."""
    whole = LlavaConfig.from_dict(dict(config)).to_dict()
    parts = {
        name: filled({**(config.get(name) or {}), "model_type": whole[name]["model_type"]})
        for name in ("text_config", "vision_config")
    }
    return {**config, **parts}


def native_config(
    language: Mapping[str, Any],
    vision: Mapping[str, Any],
    projector: Mapping[str, Any],
    *,
    context_id: int,
    has_head: bool,
    where: str,
) -> LlavaConfig:
    """The configuration of transformers' class for the three parts.

    Args:
        language, vision: config.json of the language model and of the tower.
        projector: XTuner's, see `projector_of` for official LLaVA.
        context_id: id of the placeholder.
        has_head: the files hold an output head; without one it is tied to the embedding, if the language model's is.
        where: names the folder in errors.

    Raises:
        WeightsError: a decoder that transformers has no class for or that lacks its head, another tower, or a projector
            of another depth.
    """
    if is_official(language):
        language = {**language, **causal(language, where=where)}
    kind = str(language.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise WeightsError(f"the language model is {kind!r}", where=where, expected="a decoder of transformers")
    if projector.get("depth", 2) != 2:
        raise WeightsError(
            f"the projector has depth {projector['depth']}", where=where,
            expected="2, the only one that transformers' LLaVA class has",
        )  # fmt: skip
    tower = tower_config(vision, where=where)
    text = {name: value for name, value in language.items() if not is_of_pictures(name)}
    text.pop("transformers_version", None)
    if not (has_head or filled(text).get("tie_word_embeddings", True)):
        raise WeightsError(
            "there is no lm_head.weight, and config.json does not tie the head to the embedding", where=where,
            expected="the output head among the weights", remedy="Download or copy the folder again.",
        )  # fmt: skip
    text.update(tie_word_embeddings=not has_head, use_cache=True)
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=context_id,
        image_seq_length=(int(tower["image_size"]) // int(tower["patch_size"])) ** 2,
        projector_hidden_act=projector.get("hidden_act", "gelu"),
        multimodal_projector_bias=bool(projector.get("bias", True)),
        vision_feature_layer=int(language.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy="full" if language.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=not has_head,
        architectures=["LlavaForConditionalGeneration"],
        dtype=language.get("torch_dtype") or language.get("dtype"),
    )


def projector_of(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """XTuner's words for the projector of an official folder.

    Raises:
        WeightsError: a projector that transformers' class does not have; tiles, or tokens around a picture.
    """
    for field, known in _KNOWN.items():
        if config.get(field, known[0]) not in known:
            raise WeightsError(
                f"{field} is {config[field]!r}, which changes what the model sees and is not followed here",
                where=where, expected=" or ".join(map(str, known)),
                remedy="Take the model's `-hf` folder, if there is one.",
            )  # fmt: skip
    kind = config.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise WeightsError(f"mm_projector_type is {kind!r}", where=where, expected="mlp2x_gelu (LLaVA 1.5 and later)")
    return {"depth": 2, "hidden_act": "gelu", "bias": True}


def language_of(native: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the language model alone, in words that transformers 4 reads too.

    Raises:
        WeightsError: a decoder whose class is not known.
    """
    text = native["text_config"]
    kind = text["model_type"]
    if kind not in _CAUSAL:
        raise WeightsError(f"the decoder {kind!r} has no name here", where="config.json", expected=", ".join(_CAUSAL))
    rope = dict(text.get("rope_parameters") or {})
    theta, scaled = rope.pop("rope_theta", text.get("rope_theta", 10000.0)), rope.pop("rope_type", "default")
    plain = {name: value for name, value in text.items() if name not in ("rope_parameters", "dtype")}
    return {
        **plain,
        "architectures": [_CAUSAL[kind]],
        "rope_theta": theta,
        "rope_scaling": None if scaled == "default" else {"rope_type": scaled, **rope},
        "torch_dtype": native.get("dtype") or native.get("torch_dtype"),
    }


def vision_of(native: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the tower alone; every reader knows the plain classes, and AuroraCap's own loads them too."""
    vision = {name: value for name, value in native["vision_config"].items() if name != "dtype"}
    clip, siglip = _OF_TOWER
    vision["architectures"] = [clip if vision["model_type"] == _TOWERS["clip"] else siglip]
    return vision


def xtuner_projector(native: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["ProjectorModel"],
        "auto_map": {
            "AutoConfig": "configuration_projector.ProjectorConfig",
            "AutoModel": "modeling_projector.ProjectorModel",
        },
        "bias": bool(native.get("multimodal_projector_bias", True)),
        "depth": 2,
        "hidden_act": native.get("projector_hidden_act", "gelu"),
        "llm_hidden_size": native["text_config"]["hidden_size"],
        "model_type": "projector",
        "visual_hidden_size": native["vision_config"]["hidden_size"],
    }


def llava_config(native: Mapping[str, Any], language: Mapping[str, Any], *, aspect: str) -> dict[str, Any]:
    """config.json of an official folder.

    Args:
        language: config.json of the language model alone.
        aspect: LLaVA's `image_aspect_ratio`: ``pad`` or ``square``.

    Raises:
        WeightsError: a decoder or a projector that official LLaVA does not have.
    """
    kind = str(language["model_type"])
    if kind not in _OFFICIAL:
        raise WeightsError(
            f"official LLaVA has no {kind!r}", where="config.json", expected=", ".join(_OFFICIAL),
            remedy="Export it with --layout native or xtuner.",
        )  # fmt: skip
    if not native.get("multimodal_projector_bias", True) or native.get("projector_hidden_act", "gelu") != "gelu":
        raise WeightsError("official LLaVA's projector has biases and GELU", where="config.json")
    model_type, architecture = _OFFICIAL[kind]
    select = native.get("vision_feature_select_strategy", "default")
    return {
        **language,
        "architectures": [architecture],
        "image_aspect_ratio": aspect,
        "mm_hidden_size": native["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if select == "full" else "patch",
        "mm_vision_select_layer": native.get("vision_feature_layer", -2),
        "mm_vision_tower": tower_name(native["vision_config"]),
        "model_type": model_type,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }


def known_tower(name: str) -> dict[str, Any] | None:
    """The configuration of a tower that official LLaVA is trained with, by its hub id; None of others."""
    return {**_OPENAI_TOWER, "image_size": _OPENAI_SIZES[name]} if name in _OPENAI_SIZES else None


def tower_name(vision: Mapping[str, Any]) -> str:
    """What official LLaVA opens before it reads the weights: the hub id of OpenAI's towers, else the name in config."""
    for name, size in _OPENAI_SIZES.items():
        known = {**_OPENAI_TOWER, "image_size": size}
        if all(vision.get(field, known[field]) == known[field] for field in known if field != "projection_dim"):
            return name
    return str(vision.get("_name_or_path") or "")


def is_of_pictures(field: str) -> bool:
    """Whether a field of an official config.json is about pictures, not about the language model."""
    return field.startswith(_MULTIMODAL)


def causal(language: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """model_type and class of the language model alone, of an official folder's config.json.

    Raises:
        WeightsError: a decoder that is not known.
    """
    named = str(language["model_type"])
    kinds = {official: kind for kind, (official, _) in _OFFICIAL.items()} | {LLAVA: "llama"}  # of versions before 1.6
    if named not in kinds:
        raise WeightsError(f"model_type is {named!r}", where=where, expected=", ".join(kinds))
    return {"model_type": kinds[named], "architectures": [_CAUSAL[kinds[named]]]}
