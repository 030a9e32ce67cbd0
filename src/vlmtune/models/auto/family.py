"""The `auto` family: whatever `AutoModelForImageTextToText` knows."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from vlmtune import compat
from vlmtune.config.schema import ChatStyle, Component, ImageOptions, MediaOptions
from vlmtune.data.sample import Encoded, MediaPlan, Retouch, Size, pictures_of
from vlmtune.errors import WeightsError
from vlmtune.files import read_json, write_json
from vlmtune.models import native
from vlmtune.models.auto import conventions, pictures
from vlmtune.models.auto.pictures import AutoSpec, KeyedConfig
from vlmtune.models.family import NATIVE, BoxFormat, ChatFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.template import probe
from vlmtune.models.text import TextEncoder
from vlmtune.weights.layout import WeightTable

# Where transformers' image-text-to-text classes keep their parts; the longest matching prefix wins.
_VISION = ("model.vision_tower", "model.vision_model", "model.visual")
_PROJECTOR = (
    "model.multi_modal_projector",
    "model.connector",
    "model.visual.merger",
    "model.visual.deepstack_merger_list",
    "model.image_newline",
)
_LANGUAGE = ("model.language_model", "model.text_model")

# Architectures whose packed rows are shown to equal unpacked ones by the conformance suite.
_PACKS = frozenset({"llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3"})
_MULTI_AXIS = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
_PROCESSOR_PARTS = frozenset({"image_processor", "tokenizer", "video_processor", "chat_template"})


class AutoFamily:
    name = "auto"

    def exif(self, folder: ModelFolder) -> Literal["apply", "ignore"]:
        del folder
        return "apply"  # as transformers.image_utils.load_image does

    def matches(self, folder: ModelFolder) -> bool:
        return str(folder.config.get("model_type")) in _known_model_types()

    def config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, spec: Any) -> PretrainedConfig:
        del tokenizer, spec
        return self._config(folder)

    def _config(self, folder: ModelFolder) -> PretrainedConfig:
        return transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)

    def model_class(self, folder: ModelFolder) -> type[PreTrainedModel]:
        return _class_for(self._config(folder))

    def components(self, folder: ModelFolder) -> Components:
        model = _skeleton(self.model_class(folder), self._config(folder))
        names = [name for name, _ in model.named_parameters()]
        prefixes: dict[Component, tuple[str, ...]] = {
            "vision": _present(_VISION, names),
            "projector": _present(_PROJECTOR, names),
            "language": _present(_LANGUAGE, names),
        }
        blank = Components(vision=prefixes["vision"], projector=prefixes["projector"], language=prefixes["language"])
        uncovered = [name for name in names if blank.of(name) is None]
        if uncovered:
            raise WeightsError(
                f"{uncovered[0]!r} and {len(uncovered) - 1} more parameters belong to no component",
                where=str(folder.path),
                expected="names under " + ", ".join((*_VISION, *_PROJECTOR, *_LANGUAGE, "lm_head")),
                remedy=f"The architecture {folder.config.get('model_type')!r} is not supported yet.",
            )
        return dataclasses.replace(blank, blocks=_blocks(model, blank))

    def tokenizer(self, folder: ModelFolder) -> PreTrainedTokenizerBase:
        return native.open_tokenizer(folder)

    def media_spec(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, media: MediaOptions) -> Any:
        native.refuse_slow_fast(media.video)
        config = self._config(folder)
        image_processor = open_image_processor(folder, media.image)
        processor = _processor(folder, config, tokenizer, image_processor)
        rope_config = KeyedConfig(config) if config.model_type in _MULTI_AXIS else None
        if rope_config is not None:
            _rope_model(rope_config)  # made now: later, DeepSpeed's ZeRO-3 would want to spread it over all processes
        return AutoSpec(
            image_processor=image_processor,
            processor=processor,
            placeholder_id=int(processor.image_token_id),
            rope_config=rope_config,
        )

    def layout(self, folder: ModelFolder) -> str:
        del folder
        return NATIVE

    def layouts(self, folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
        del folder, config
        return {}

    def home_layout(self, folder: ModelFolder) -> str:
        del folder
        return NATIVE

    def install(self, model: PreTrainedModel) -> None:
        del model

    def companions(self, folder: ModelFolder) -> Mapping[str, bytes]:
        del folder
        return {}

    def write_files(self, opened: OpenedFolder, layout: str, out: Path) -> list[str]:
        native.copy_files(opened.folder.path, out)
        settings = _picture_settings(opened.folder, opened.media.image)
        if settings:
            file = out / "preprocessor_config.json"
            write_json(file, {**read_json(file), **settings})
        return []

    def chat(
        self,
        folder: ModelFolder,
        tokenizer: PreTrainedTokenizerBase,
        text: TextEncoder,
        spec: AutoSpec,
        style: ChatStyle | None,
    ) -> ChatFormat:
        native.refuse_style(style)
        template = native.read_template(folder, tokenizer)
        chat = probe(tokenizer, template, spec.processor.image_token, text, place=str(folder.path))
        return dataclasses.replace(chat, frames=conventions.frames(str(folder.config.get("model_type"))))

    def boxes(self, folder: ModelFolder) -> BoxFormat:
        return conventions.boxes(str(folder.config.get("model_type")))

    def lays_end_to_end(self, spec: Any) -> bool:
        del spec
        return False

    def about_pictures(self, spec: Any) -> str | None:
        del spec
        return None

    def plan(self, sizes: Sequence[Size], spec: AutoSpec, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
        numbers = frames or [None] * len(sizes)
        return tuple(
            pictures.plan_picture(size, spec, is_frame=number is not None)
            for size, number in zip(sizes, numbers, strict=True)
        )

    def span_ids(self, plan: MediaPlan, spec: AutoSpec) -> tuple[np.ndarray, np.ndarray]:
        return pictures.picture_ids(plan, spec)

    def pixels(
        self, picture: PIL.Image.Image, plan: MediaPlan, spec: AutoSpec, retouch: Retouch | None = None
    ) -> dict[str, torch.Tensor]:
        return pictures.picture_pixels(retouch(picture) if retouch else picture, spec, is_frame=plan.is_frame)

    def view(self, pixels: dict[str, torch.Tensor], spec: AutoSpec) -> list[PIL.Image.Image]:
        return pictures.picture_view(pixels, spec)

    def collate_pixels(self, pixels: Sequence[dict[str, torch.Tensor]], spec: AutoSpec) -> dict[str, torch.Tensor]:
        return pictures.collate_pixels(pixels, spec)

    def position_inputs(
        self, rows: Sequence[Sequence[Encoded]], pixels: Sequence[Sequence[dict[str, torch.Tensor]]], spec: AutoSpec
    ) -> dict[str, torch.Tensor]:
        if spec.rope_config is None:
            return {}
        width = max(sum(sample.num_tokens for sample in row) for row in rows)
        types = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(4, len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            start = 0
            own_pixels = list(pixels[index])
            for sample in row:
                end = start + sample.num_tokens
                count = len(pictures_of(sample.media))
                taken, own_pixels = own_pixels[:count], own_pixels[count:]
                types[index, start:end], positions[:, index, start:end] = _axes(sample, taken, spec)
                start = end
        return {"mm_token_type_ids": types, "position_ids": positions}

    def prompt_inputs(self, prompts: Sequence[Encoded], spec: AutoSpec) -> dict[str, torch.Tensor]:
        if spec.rope_config is None:
            return {}
        width = max(prompt.num_tokens for prompt in prompts)
        types = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            types[row, width - prompt.num_tokens :] = _token_types(prompt)
        return {"mm_token_type_ids": types}

    def why_not_packed(self, config: PretrainedConfig) -> str | None:
        model_type = config.model_type
        return None if model_type in _PACKS else f"packing is not proven for the architecture {model_type!r}"

    def shared_length(self, config: PretrainedConfig) -> int | None:
        return native.shared_length(config)

    def lawful_zeros(self, config: PretrainedConfig) -> str | None:
        if config.model_type != "llava" or not isinstance(config.vision_feature_layer, int):
            return None
        layers = config.vision_config.num_hidden_layers
        last_used = config.vision_feature_layer % (layers + 1)  # 0 is the embedding, n the output of layer n
        behind = "|".join(str(layer) for layer in range(last_used, layers)) or "none"
        return rf"model\.vision_tower\..*(layers\.({behind})\..*|post_layernorm\..*|\bhead\..*)"


def _picture_settings(folder: ModelFolder, options: ImageOptions) -> Mapping[str, Any]:
    """What preprocessor_config.json must say so that others cut pictures as `options` do; {} without options."""
    changed = pictures.overrides(open_image_processor(folder, ImageOptions()), options)
    if "size" not in changed or "shortest_edge" not in changed["size"]:
        return changed
    # Older folders say the same thing under these names, and they would win over `size`.
    edges = changed["size"]
    return {**changed, "min_pixels": edges["shortest_edge"], "max_pixels": edges["longest_edge"]}


def _class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])


@functools.cache
def _known_model_types() -> frozenset[str]:
    return frozenset(config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)


def _skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without storage: names and shapes only."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _present(prefixes: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        prefix for prefix in prefixes if any(name == prefix or name.startswith(prefix + ".") for name in names)
    )


def _blocks(model: PreTrainedModel, components: Components) -> dict[Component, tuple[str, ...]]:
    """Per component the list of its transformer blocks: the ModuleList with the most parameters in it."""
    found: dict[Component, tuple[int, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            component = components.of(name + ".0")
            size = sum(parameter.numel() for parameter in module.parameters())
            if component and size > found.get(component, (0, ""))[0]:
                found[component] = (size, name)
    blocks: dict[Component, tuple[str, ...]] = {component: (name,) for component, (_, name) in found.items()}
    blocks["projector"] = components.projector
    return blocks


def open_image_processor(folder: ModelFolder, options: ImageOptions) -> Any:
    def opened(**changed: Any) -> Any:
        # The PIL backend everywhere: torchvision's differs by up to one step of 255, and is not on every machine.
        return transformers.AutoImageProcessor.from_pretrained(
            folder.path, backend="pil", trust_remote_code=False, **changed
        )

    plain = opened()
    changed = pictures.overrides(plain, options)
    return opened(**changed) if changed else plain


def _processor(
    folder: ModelFolder, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, image_processor: Any
) -> Any:
    """The model's processor class, for what it knows of ids per picture; the pictures go through `image_processor`."""
    try:
        processor_class = cast(type[ProcessorMixin], PROCESSOR_MAPPING[type(config)])
    except KeyError as error:
        raise WeightsError(
            f"transformers has no processor class for {config.model_type!r}", where=str(folder.path)
        ) from error
    file = folder.path / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    accepted = {name: value for name, value in settings.items() if name not in _PROCESSOR_PARTS | {"processor_class"}}
    slots = processor_class.get_attributes()
    parts: dict[str, Any] = {"tokenizer": tokenizer, "image_processor": image_processor, **accepted}
    if "video_processor" in slots:
        parts["video_processor"] = compat.NullVideoProcessor()
    return compat.construct_processor(processor_class, **parts)


def _axes(
    sample: Encoded, pixels: Sequence[dict[str, torch.Tensor]], spec: AutoSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token types (T,) and positions (4, T) of one sample: text positions from 0, then time, height and width.

    The first row restarts at 0 in every sample: transformers builds the block-diagonal mask of a pack from it.
    """
    if spec.rope_config is None:
        raise ValueError("this model has one position axis")
    types = _token_types(sample)
    grids = torch.cat([picture["image_grid_thw"] for picture in pixels]) if pixels else None
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    model = _rope_model(spec.rope_config)
    axes, _ = model.get_rope_index(ids, mm_token_type_ids=types[None], image_grid_thw=grids)
    return types, torch.cat([torch.arange(sample.num_tokens)[None], axes[:, 0]])


def _token_types(sample: Encoded) -> torch.Tensor:
    """1 where picture features go, 0 elsewhere, (T,)."""
    return torch.from_numpy(sample.at_pictures).long()


@functools.lru_cache(maxsize=4)
def _rope_model(keyed: KeyedConfig) -> Any:
    """The model's inner class without storage and with one layer: its `get_rope_index` reads the config only."""
    shallow = copy.deepcopy(keyed.config)
    shallow.get_text_config().num_hidden_layers = 1
    return _skeleton(_class_for(shallow), shallow).model
