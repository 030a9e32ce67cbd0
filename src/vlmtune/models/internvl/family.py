"""InternVL 1.5, 2, 2.5, 3 and 3.5, from official folders and from native ones (`-hf`): one family object for both.

The model is always transformers' InternVLForConditionalGeneration. Official are the names of the tensors, config.json,
the tokenizer, the prompt and the way pictures are cut; nothing of an official folder is executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import PIL.Image
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.internvl import InternVLConfig, InternVLForConditionalGeneration

from vlmtune.config.schema import ChatStyle, MediaOptions
from vlmtune.data.sample import Encoded, MediaPlan, Retouch, Size
from vlmtune.files import read_json
from vlmtune.models import native
from vlmtune.models.family import NATIVE, OFFICIAL, BoxFormat, ChatFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.internvl import chat, folders, pictures
from vlmtune.models.internvl import tokenizer as tokenizers
from vlmtune.models.internvl.config import decoder_heads, has_official_name, is_official, native_config
from vlmtune.models.internvl.pictures import InternVLSpec
from vlmtune.models.internvl.weights import official_table
from vlmtune.models.template import probe
from vlmtune.models.text import TextEncoder
from vlmtune.weights.layout import WeightTable


class InternVLFamily:
    name = "internvl"

    def exif(self, folder: ModelFolder) -> Literal["apply", "ignore"]:
        """The official data loader does not; transformers.image_utils.load_image does."""
        return "apply" if folders.conventions(folder) is None else "ignore"

    def matches(self, folder: ModelFolder) -> bool:
        return is_official(folder.config) or folder.config.get("model_type") == InternVLConfig.model_type

    def model_class(self, folder: ModelFolder) -> type[PreTrainedModel]:
        del folder
        return InternVLForConditionalGeneration

    def config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, spec: InternVLSpec) -> PretrainedConfig:
        del spec
        if not is_official(folder.config):
            return AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        where = str(folder.path)
        own = self.media_spec(folder, tokenizer, MediaOptions())
        return native_config(
            folder.config,
            context_id=own.context_id,
            tokens_per_tile=own.tokens_per_tile,
            has_head=folders.has_head(folder),
            where=where,
        )

    def layout(self, folder: ModelFolder) -> str:
        return OFFICIAL if is_official(folder.config) else NATIVE

    def layouts(self, folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
        del config
        official = folders.official_config(folder)
        if official is None:
            return {OFFICIAL: official_table(None)} if has_official_name(folder.config) else {}
        return {OFFICIAL: official_table(decoder_heads(official))}

    def home_layout(self, folder: ModelFolder) -> str:
        return NATIVE if folders.conventions(folder) is None else OFFICIAL

    def install(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        if config.to_dict().get("ps_version") == "v1":
            inner: Any = model
            inner.model.multi_modal_projector.register_forward_pre_hook(_swap_axes)

    def companions(self, folder: ModelFolder) -> Mapping[str, bytes]:
        return folders.companions(folder)

    def write_files(self, opened: OpenedFolder, layout: str, out: Path) -> list[str]:
        return folders.write_files(opened, layout, out)

    def components(self, folder: ModelFolder) -> Components:
        del folder
        return native.components("model.vision_tower.encoder.layer")

    def tokenizer(self, folder: ModelFolder) -> PreTrainedTokenizerBase:
        official = folders.conventions(folder)
        if official is None:
            return native.open_tokenizer(folder)
        return tokenizers.open_tokenizer(official)

    def media_spec(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, media: MediaOptions) -> InternVLSpec:
        native.refuse_slow_fast(media.video)
        context = tokenizers.context_token_id(cast(PreTrainedTokenizerFast, tokenizer), where=str(folder.path))
        official = folders.conventions(folder)
        if official is not None:
            return pictures.official_spec(official.config, context, media.image)
        return pictures.native_spec(
            folder.config, read_json(folder.path / "preprocessor_config.json"), context, media.image
        )

    def chat(
        self,
        folder: ModelFolder,
        tokenizer: PreTrainedTokenizerBase,
        text: TextEncoder,
        spec: InternVLSpec,
        style: ChatStyle | None,
    ) -> ChatFormat:
        official = folders.conventions(folder)
        where = str(folder.path)
        if official is None:
            native.refuse_style(style)
            template = native.read_template(folder, tokenizer)
            return chat.native_chat(probe(tokenizer, template, tokenizers.CONTEXT_TOKEN, text, place=where))
        fast = cast(PreTrainedTokenizerFast, tokenizer)
        found = chat.official_chat(official, fast, style=style or "official")
        tokenizers.check_fits(fast, found, int(official.config["llm_config"]["vocab_size"]), where=where)
        return found

    def boxes(self, folder: ModelFolder) -> BoxFormat:
        """As InternVL's fine-tuning documentation writes grounding data."""
        del folder
        return BoxFormat(template="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>")

    def lays_end_to_end(self, spec: InternVLSpec) -> bool:
        del spec
        return False

    def about_pictures(self, spec: InternVLSpec) -> str | None:
        del spec
        return None

    def plan(
        self, sizes: Sequence[Size], spec: InternVLSpec, frames: Sequence[int | None] = ()
    ) -> tuple[MediaPlan, ...]:
        return pictures.plan(sizes, spec, frames)

    def span_ids(self, plan: MediaPlan, spec: InternVLSpec) -> tuple[np.ndarray, np.ndarray]:
        return pictures.span_ids(plan, spec)

    def pixels(
        self, picture: PIL.Image.Image, plan: MediaPlan, spec: InternVLSpec, retouch: Retouch | None = None
    ) -> dict[str, torch.Tensor]:
        return pictures.pixels(picture, plan, spec, retouch)

    def view(self, pixels: dict[str, torch.Tensor], spec: InternVLSpec) -> list[PIL.Image.Image]:
        return pictures.view(pixels, spec)

    def collate_pixels(self, pixels: Sequence[dict[str, torch.Tensor]], spec: InternVLSpec) -> dict[str, torch.Tensor]:
        return pictures.collate_pixels(pixels, spec)

    def position_inputs(
        self, rows: Sequence[Sequence[Encoded]], pixels: Sequence[Sequence[dict[str, torch.Tensor]]], spec: InternVLSpec
    ) -> dict[str, torch.Tensor]:
        return {}

    def prompt_inputs(self, prompts: Sequence[Encoded], spec: InternVLSpec) -> dict[str, torch.Tensor]:
        return {}

    def why_not_packed(self, config: PretrainedConfig) -> str | None:
        del config
        return None

    def shared_length(self, config: PretrainedConfig) -> int | None:
        return native.shared_length(config)

    def lawful_zeros(self, config: PretrainedConfig) -> str | None:
        layers = config.vision_config.num_hidden_layers
        last_used = config.vision_feature_layer % (layers + 1)  # 0 is the embedding, n the output of layer n
        behind = "|".join(str(layer) for layer in range(last_used, layers))
        return rf"model\.vision_tower\.encoder\.layer\.({behind})\..*" if behind else None


def _swap_axes(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Tokens (tiles, n · n, d) of a tile column by column: what ps_version v1 leaves and v2 mends."""
    del module
    (features,) = args
    tiles, count, width = features.shape
    side = int(count**0.5)
    return (features.reshape(tiles, side, side, width).transpose(1, 2).reshape(tiles, count, width),)
