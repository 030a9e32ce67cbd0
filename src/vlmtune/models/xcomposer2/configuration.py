"""The configuration of our model class for InternLM-XComposer2, for which transformers has none."""

from __future__ import annotations

from typing import Any, get_args

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from vlmtune.config.schema import ChatStyle

MODEL_TYPE = "vlmtune_xcomposer2"
"""Our own: official folders say internlm or internlm2, which belong to other models."""


@strict
class XComposer2Config(PreTrainedConfig):
    """
    high_resolution: pictures are cut into tiles beside a view of the whole (4khd); else each is one square.
    max_tiles: with `high_resolution`, most tiles of a picture; the publisher's scripts call it hd_num.
    partial_rank, partial_scale: of the partial LoRA; the scale is alpha ÷ rank.
    partial_wqkv_rank, partial_wqkv_scale: the same for the layer in front of the attention, where 4khd has others.
    partial_dropout: of what the partial LoRA gets, in training.
    chat: the form of conversations that it was trained with, as `model.chat` says it; None is that of the scripts.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    high_resolution: bool = False
    max_tiles: int = 16
    partial_rank: int = 256
    partial_scale: float = 1.0
    partial_wqkv_rank: int = 256
    partial_wqkv_scale: float = 1.0
    partial_dropout: float = 0.0
    chat: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            given = vars(self).get(name)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, name, kind(**(given or {})))
        super().__post_init__(**kwargs)

    def validate_fields(self) -> None:
        """`strict` runs this; by itself it looks at no field whose annotation is postponed."""
        for name in ("max_tiles", "partial_rank", "partial_wqkv_rank"):
            value = vars(self)[name]
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number from 1 on")
        for name in ("partial_scale", "partial_wqkv_scale", "partial_dropout"):
            if not isinstance(vars(self)[name], int | float):
                raise ValueError(f"{name} is {vars(self)[name]!r}; expected a number")
        if self.chat not in (None, *get_args(ChatStyle)):
            raise ValueError(f"chat is {self.chat!r}; expected null or {', '.join(get_args(ChatStyle))}")
