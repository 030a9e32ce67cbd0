"""LLaVA models with a CLIP or SigLIP tower: what `auto` makes of them, and token merging and two more layouts on top.

A native folder whose pictures are neither merged nor brought to size in another way is `auto`'s: its spec is an
`AutoSpec`, ids and pixels are those of transformers' own processor. With `model.image.token_merge_ratio` (or `fit`, or
`size`), and in folders of XTuner and of official LLaVA, the spec is a `LlavaSpec`, and pictures go through the tower
end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmtune.config.schema import ChatStyle, ImageOptions, MediaOptions
from vlmtune.data.sample import Encoded, MediaPlan, Retouch, Size
from vlmtune.models import native
from vlmtune.models.auto import AutoFamily, conventions
from vlmtune.models.auto.family import open_image_processor
from vlmtune.models.auto.pictures import AutoSpec
from vlmtune.models.family import NATIVE, BoxFormat, ChatFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.llava import chat, folders, pictures
from vlmtune.models.llava.config import LLAVA, RECORD, XTUNER
from vlmtune.models.llava.pictures import Habits, LlavaSpec
from vlmtune.models.llava.tower import TOWERS, MergingTower
from vlmtune.models.llava.weights import shield_embedding
from vlmtune.models.template import probe
from vlmtune.models.text import TextEncoder
from vlmtune.weights.layout import WeightTable

Spec = AutoSpec | LlavaSpec

_OTHER_PROMPT = (
    "this layout has no chat template: who opens it, this program too, asks in Vicuna's words as XTuner and LLaVA do, "
    "and not in those of the template that this model has been used with; a native export keeps it"
)


class LlavaFamily(AutoFamily):
    name = "llava"

    def exif(self, folder: ModelFolder) -> Literal["apply", "ignore"]:
        """The loaders of XTuner and of official LLaVA do not; transformers.image_utils.load_image does."""
        return "apply" if folders.origin(folder) == NATIVE else "ignore"

    def matches(self, folder: ModelFolder) -> bool:
        if folders.layout(folder) != NATIVE:
            return True
        tower = folder.config.get("vision_config") or {}
        return folder.config.get("model_type") == LlavaConfig.model_type and tower.get("model_type") in TOWERS

    def model_class(self, folder: ModelFolder) -> type[PreTrainedModel]:
        del folder
        return LlavaForConditionalGeneration

    def tokenizer(self, folder: ModelFolder) -> PreTrainedTokenizerBase:
        if folders.origin(folder) == NATIVE:
            return super().tokenizer(folder)
        return folders.open_tokenizer(folder)

    def config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, spec: Spec) -> PretrainedConfig:
        config = self._own_config(folder, tokenizer)
        record = _record(folder, spec)
        if record:
            config.update({RECORD: record})
        return config

    def _own_config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        if folders.layout(folder) == NATIVE:
            return self._config(folder)
        return folders.native_config(folder, tokenizer)

    def layout(self, folder: ModelFolder) -> str:
        return folders.layout(folder)

    def layouts(self, folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
        return folders.layouts(folder, config)

    def home_layout(self, folder: ModelFolder) -> str:
        return folders.origin(folder)

    def install(self, model: PreTrainedModel) -> None:
        inner: Any = model
        MergingTower.wrap(inner.model.vision_tower, strategy=inner.config.vision_feature_select_strategy)
        shield_embedding(model)

    def companions(self, folder: ModelFolder) -> Mapping[str, bytes]:
        return folders.companions(folder)

    def write_files(self, opened: OpenedFolder, layout: str, out: Path) -> list[str]:
        record = _record(opened.folder, opened.spec)
        if isinstance(opened.spec, AutoSpec) and layout == NATIVE and not record:
            plain = pictures.as_plain(_habits(opened.folder), opened.media) or opened.media
            return super().write_files(replace(opened, media=plain), layout, out)
        notes = folders.write_files(opened, layout, out, record)
        return notes if layout == NATIVE or _speaks_vicuna(opened.folder) else [*notes, _OTHER_PROMPT]

    def components(self, folder: ModelFolder) -> Components:
        if folders.layout(folder) == NATIVE:
            return super().components(folder)
        return native.components("model.vision_tower.encoder.layers")

    def media_spec(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, media: MediaOptions) -> Spec:
        habits = _habits(folder)
        plain = pictures.as_plain(habits, media) if folders.origin(folder) == NATIVE else None
        if plain is not None:
            return super().media_spec(folder, tokenizer, plain)
        image_processor = open_image_processor(folders.preprocessor_folder(folder), ImageOptions())
        return pictures.llava_spec(self._own_config(folder, tokenizer), image_processor, habits, media)

    def chat(
        self,
        folder: ModelFolder,
        tokenizer: PreTrainedTokenizerBase,
        text: TextEncoder,
        spec: Spec,
        style: ChatStyle | None,
    ) -> ChatFormat:
        if _speaks_vicuna(folder):
            native.refuse_style(style)
            return chat.vicuna(tokenizer, where=str(folder.path))
        if isinstance(spec, AutoSpec):
            return super().chat(folder, tokenizer, text, spec, style)
        native.refuse_style(style)
        template = native.read_template(folder, tokenizer)
        mark = str(tokenizer.convert_ids_to_tokens(spec.placeholder_id))
        return probe(tokenizer, template, mark, text, place=str(folder.path))

    def boxes(self, folder: ModelFolder) -> BoxFormat:
        """In every layout as LLaVA's training mix, on which XTuner's models train too, writes them."""
        del folder
        return conventions.boxes(LlavaConfig.model_type)

    def lays_end_to_end(self, spec: Spec) -> bool:
        return isinstance(spec, LlavaSpec)

    def about_pictures(self, spec: Spec) -> str | None:
        return pictures.about(spec) if isinstance(spec, LlavaSpec) else None

    def plan(self, sizes: Sequence[Size], spec: Spec, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
        if isinstance(spec, AutoSpec):
            return super().plan(sizes, spec, frames)
        return pictures.plan(sizes, spec, frames)

    def span_ids(self, plan: MediaPlan, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
        return super().span_ids(plan, spec) if isinstance(spec, AutoSpec) else pictures.span_ids(plan, spec)

    def pixels(
        self, picture: PIL.Image.Image, plan: MediaPlan, spec: Spec, retouch: Retouch | None = None
    ) -> dict[str, torch.Tensor]:
        if isinstance(spec, AutoSpec):
            return super().pixels(picture, plan, spec, retouch)
        return pictures.pixels(picture, plan, spec, retouch)

    def view(self, pixels: dict[str, torch.Tensor], spec: Spec) -> list[PIL.Image.Image]:
        return super().view(pixels, spec) if isinstance(spec, AutoSpec) else pictures.view(pixels, spec)

    def collate_pixels(self, pixels: Sequence[dict[str, torch.Tensor]], spec: Spec) -> dict[str, torch.Tensor]:
        del spec
        return pictures.collate_pixels(pixels)

    def position_inputs(
        self, rows: Sequence[Sequence[Encoded]], pixels: Sequence[Sequence[dict[str, torch.Tensor]]], spec: Spec
    ) -> dict[str, torch.Tensor]:
        return {}

    def prompt_inputs(self, prompts: Sequence[Encoded], spec: Spec) -> dict[str, torch.Tensor]:
        return {}


def _speaks_vicuna(folder: ModelFolder) -> bool:
    """XTuner's and LLaVA's prompt has pieces that no template is cut into, so native exports name it."""
    record = folder.config.get(RECORD) or {}
    return folders.origin(folder) != NATIVE or record.get("chat") == chat.VICUNA


def _record(folder: ModelFolder, spec: Spec) -> dict[str, Any]:
    """What config.json keeps for later runs: {} where the folder says already how pictures are seen."""
    own = folder.config.get(RECORD) or {}
    record = pictures.record_of(spec) if isinstance(spec, LlavaSpec) else {}
    if isinstance(spec, AutoSpec) and own.get("token_merge_ratio", 1) != 1:  # 1 is asked for, and the folder merges
        record = {"token_merge_ratio": 1.0}
    return {**record, "chat": chat.VICUNA} if _speaks_vicuna(folder) else record


def _habits(folder: ModelFolder) -> Habits:
    """What was recorded, and for the rest how the trainer that the folder comes from shows pictures."""
    origin = folders.origin(folder)
    if origin == XTUNER:  # all configurations of AuroraCap have `pad_image_to_square`; where one has not, it swaps
        return pictures.habits_of(folder.config, Habits(fit="pad_square", swap_sides=True))
    if origin == LLAVA:
        padded = folders.parts(folder).language.get("image_aspect_ratio") == "pad"
        return pictures.habits_of(folder.config, Habits(fit="pad_square" if padded else None))
    return pictures.habits_of(folder.config, Habits())
