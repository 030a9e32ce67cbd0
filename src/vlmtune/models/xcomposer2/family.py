"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b), from official folders and from native ones that this program wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlmtune.config.schema import ChatStyle, MediaOptions
from vlmtune.data.sample import Encoded, MediaPlan, Retouch, Size
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models import native
from vlmtune.models.decoders import check_counts
from vlmtune.models.family import NATIVE, OFFICIAL, BoxFormat, ChatFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.text import TextEncoder
from vlmtune.models.xcomposer2 import chat, folders, pictures
from vlmtune.models.xcomposer2.config import is_official, native_config
from vlmtune.models.xcomposer2.configuration import MODEL_TYPE, XComposer2Config
from vlmtune.models.xcomposer2.model import XComposer2ForConditionalGeneration
from vlmtune.models.xcomposer2.pictures import XComposer2Spec
from vlmtune.models.xcomposer2.weights import POSITIONS, ResizePositions, official_table
from vlmtune.weights.layout import WeightTable
from vlmtune.weights.ops import KEEP
from vlmtune.weights.shards import Shards

_EXPORT_AGAIN = "Copy config.json from where the folder was written, or export it again."


class XComposer2Family:
    name = "xcomposer2"

    def exif(self, folder: ModelFolder) -> Literal["apply", "ignore"]:
        """The official loaders open pictures as they lie in the file."""
        del folder
        return "ignore"

    def matches(self, folder: ModelFolder) -> bool:
        return is_official(folder.config) or folder.config.get("model_type") == MODEL_TYPE

    def model_class(self, folder: ModelFolder) -> type[PreTrainedModel]:
        del folder
        return XComposer2ForConditionalGeneration

    def config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, spec: XComposer2Spec) -> PretrainedConfig:
        del tokenizer
        config = _own_config(folder)
        cast(CLIPVisionConfig, config.vision_config).image_size = spec.size
        if spec.high_resolution:
            config.max_tiles = spec.max_tiles
        return config

    def layout(self, folder: ModelFolder) -> str:
        return OFFICIAL if is_official(folder.config) else NATIVE

    def layouts(self, folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
        if not is_official(folder.config):
            return {OFFICIAL: official_table()}
        vision = cast(CLIPVisionConfig, cast(XComposer2Config, config).vision_config)
        side = int(vision.image_size) // int(vision.patch_size)  # type: ignore[arg-type] # whole numbers in this family
        as_it_is = Shards(folder.path).infos[POSITIONS].shape[0] == 1 + side**2
        return {OFFICIAL: official_table(KEEP if as_it_is else ResizePositions(side))}

    def home_layout(self, folder: ModelFolder) -> str:
        return NATIVE if folders.conventions(folder) is None else OFFICIAL

    def install(self, model: PreTrainedModel) -> None:
        if model.generation_config is not None:  # from official folders' config.json, where it is a row's in training
            model.generation_config.max_length = None

    def companions(self, folder: ModelFolder) -> Mapping[str, bytes]:
        return folders.companions(folder)

    def write_files(self, opened: OpenedFolder, layout: str, out: Path) -> list[str]:
        return folders.write_files(opened, layout, out)

    def components(self, folder: ModelFolder) -> Components:
        """Partial LoRA belongs to the language model; the separators of 4khd to the projector that they go through."""
        last = int(_own_config(folder).get_text_config().num_hidden_layers) - 1
        return Components(
            vision=("vit",),
            projector=("vision_proj",),
            language=("model",),
            head=("output",),
            blocks={"vision": ("vit.encoder.layers",), "projector": ("vision_proj",), "language": ("model.layers",)},
            pictures_only=r"model\.layers\.\d+\.\w+\.\w+_partial\.[AB]",
            # The last layer's outputs at visual tokens are read only where an answer follows a picture directly.
            undemanded=rf"model\.layers\.{last}\.(attention\.wo|feed_forward\.w\d)_partial\.[AB]",
        )

    def tokenizer(self, folder: ModelFolder) -> PreTrainedTokenizerBase:
        return chat.open_tokenizer(folder)

    def media_spec(
        self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, media: MediaOptions
    ) -> XComposer2Spec:
        del tokenizer
        native.refuse_slow_fast(media.video)
        config = _own_config(folder)
        spec = pictures.spec_of(config, media.image, where=str(folder.path))
        own = cast(CLIPVisionConfig, config.vision_config).image_size
        if spec.size != own and not is_official(folder.config):
            raise ConfigError(
                f"size is {spec.size}, but the table of positions in this native folder is one for {own} pixels, and "
                "only official folders have theirs resized while they are read",
                where="model.image",
                remedy="Leave size out, or begin from the official folder (vlmtune export --layout official).",
            )
        return spec

    def chat(
        self,
        folder: ModelFolder,
        tokenizer: PreTrainedTokenizerBase,
        text: TextEncoder,
        spec: XComposer2Spec,
        style: ChatStyle | None,
    ) -> ChatFormat:
        own = cast(ChatStyle | None, _own_config(folder).chat)
        return chat.chat_format(cast(PreTrainedTokenizerFast, tokenizer), style or own)

    def boxes(self, folder: ModelFolder) -> BoxFormat:
        del folder
        return BoxFormat()

    def lays_end_to_end(self, spec: XComposer2Spec) -> bool:
        del spec
        return False

    def about_pictures(self, spec: XComposer2Spec) -> str | None:
        return pictures.about(spec)

    def plan(
        self, sizes: Sequence[Size], spec: XComposer2Spec, frames: Sequence[int | None] = ()
    ) -> tuple[MediaPlan, ...]:
        return pictures.plan(sizes, spec, frames)

    def span_ids(self, plan: MediaPlan, spec: XComposer2Spec) -> tuple[np.ndarray, np.ndarray]:
        return pictures.span_ids(plan, spec)

    def pixels(
        self, picture: PIL.Image.Image, plan: MediaPlan, spec: XComposer2Spec, retouch: Retouch | None = None
    ) -> dict[str, torch.Tensor]:
        return pictures.pixels(picture, plan, spec, retouch)

    def view(self, pixels: dict[str, torch.Tensor], spec: XComposer2Spec) -> list[PIL.Image.Image]:
        return pictures.view(pixels, spec)

    def collate_pixels(
        self, pixels: Sequence[dict[str, torch.Tensor]], spec: XComposer2Spec
    ) -> dict[str, torch.Tensor]:
        return pictures.collate_pixels(pixels, spec)

    def position_inputs(
        self,
        rows: Sequence[Sequence[Encoded]],
        pixels: Sequence[Sequence[dict[str, torch.Tensor]]],
        spec: XComposer2Spec,
    ) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": pictures.image_mask(rows).long()}

    def prompt_inputs(self, prompts: Sequence[Encoded], spec: XComposer2Spec) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": pictures.image_mask([[prompt] for prompt in prompts], left=True).long()}

    def why_not_packed(self, config: PretrainedConfig) -> str | None:
        del config
        return None

    def shared_length(self, config: PretrainedConfig) -> int | None:
        return native.shared_length(config)

    def lawful_zeros(self, config: PretrainedConfig) -> str | None:
        """Behind what the projector reads of the tower."""
        del config
        return r"vit\.post_layernorm\..*"


def _own_config(folder: ModelFolder) -> XComposer2Config:
    """As the folder says it, before any option."""
    if is_official(folder.config):
        return native_config(folder)
    where = str(folder.path)
    try:
        for part in XComposer2Config.sub_configs:
            if not isinstance(folder.config.get(part), dict):  # transformers would take a model of 7 billion parameters
                raise WeightsError(f"config.json has no {part}", where=where, remedy=_EXPORT_AGAIN)
        check_counts(folder.config["text_config"], field="text_config", where=where)
        return XComposer2Config.from_dict(dict(folder.config))
    except KeyError as error:
        raise WeightsError(
            f"config.json: text_config has no {error.args[0]!r}", where=where, remedy=_EXPORT_AGAIN
        ) from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise WeightsError(f"config.json: {' '.join(str(error).split())}", where=where, remedy=_EXPORT_AGAIN) from error
