"""A path to an opened folder (no weights) or to a model (weights, strictly).

Nothing from a model folder is executed: every Auto class gets `trust_remote_code=False`.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from vlmtune import compat
from vlmtune.config.hub import HUB_ID
from vlmtune.config.schema import MediaOptions
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import BoxFormat, Family, ModelFolder, OpenedFolder
from vlmtune.models.registry import detect
from vlmtune.models.text import TextEncoder
from vlmtune.nn.attention import PACKED
from vlmtune.nn.pseudo_text import install_pseudo_text
from vlmtune.weights import strict
from vlmtune.weights.foreign.recognise import EXPORT_FIRST, WORDS, recognise
from vlmtune.weights.layout import WeightTable
from vlmtune.weights.loading import conversion_rules
from vlmtune.weights.places import PICKLED, PICKLED_INDEX, is_plain, without_safetensors
from vlmtune.weights.shards import Shards

# Python files are fetched: they are never run, but an export in the publisher's layout hands them on.
_NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.gguf"]

_PICKLED = (PICKLED, PICKLED_INDEX, "pytorch_model-*.bin")

_LOADING = threading.RLock()
"""The rules of `compat.conversion_rules` are those of the whole process: models of two layouts load one by one."""


def read_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Reads config.json of a folder, or fetches a hub id first."""
    folder = Path(path)
    kind = recognise(folder)
    if kind is not None:
        raise WeightsError(f"this is {WORDS[kind]}", where=f"model.path: {path}", remedy=EXPORT_FIRST)
    if not folder.is_dir():
        folder = _fetch(str(path))
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            "there is no config.json",
            where=str(folder),
            expected="the folder of a pretrained model",
            remedy="An adapter folder is opened by `vlmtune chat`, `eval` and `export`, which look up its base.",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"config.json is not JSON: {error}", where=str(file)) from error
    if not isinstance(config, dict):
        raise WeightsError(f"config.json holds a {type(config).__name__}", where=str(file), expected="an object")
    return ModelFolder(folder, config)


def _fetch(name: str) -> Path:
    """Downloads a hub repository's safetensors and small files, and its pickled weights only in their absence."""
    import huggingface_hub

    if not HUB_ID.fullmatch(name):
        raise WeightsError("there is no such folder", where=f"model.path: {name}", remedy="Correct the path.")
    try:
        folder = Path(huggingface_hub.snapshot_download(name, ignore_patterns=_NOT_FETCHED))
        bare = [place.relative_to(folder) for place in without_safetensors(folder)]
        if bare:
            pickled = [(place / pattern).as_posix() for place in bare for pattern in _PICKLED]
            huggingface_hub.snapshot_download(name, allow_patterns=pickled)
        return folder
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "the network is switched off, and the hub's cache does not hold it"
        raise WeightsError(
            "there is no such folder (in a YAML, a relative path starts from the YAML's own folder), and as a hub id "
            f"it cannot be fetched ({why})",
            where=f"model.path: {name}",
            remedy="Correct the path, or download the model on a machine with network and copy the folder.",
        ) from error


def open_folder(path: str | os.PathLike[str], media: MediaOptions | None = None) -> OpenedFolder:
    """Opens a model folder without reading its weights.

    Raises:
        WeightsError: no folder, an unknown architecture, no chat template, a template that cannot be cut.
        ConfigError: an option in `media.image` that has no effect on this model; a `media.chat` that it has not.
    """
    folder = read_folder(path)
    family = detect(folder)
    media = media or MediaOptions()
    try:
        tokenizer = family.tokenizer(folder)
        spec = family.media_spec(folder, tokenizer, media)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # transformers reports absent or broken tokenizer and processor files with any of these, and config.json.
        raise WeightsError(
            "the tokenizer or the image processor cannot be opened "
            f"({type(error).__name__}: {str(error).splitlines()[0]})",
            where=str(folder.path),
            expected="tokenizer.json, tokenizer_config.json and preprocessor_config.json beside config.json",
            remedy="Copy the missing files from the model's repository.",
        ) from error
    text = TextEncoder(tokenizer)
    config = family.config(folder, tokenizer, spec)
    return OpenedFolder(
        folder=folder,
        family=family,
        tokenizer=tokenizer,
        config=config,
        layout=family.layout(folder),
        layouts=family.layouts(folder, config),
        spec=spec,
        text=text,
        chat=family.chat(folder, tokenizer, text, spec, media.chat),
        components=family.components(folder),
        why_not_packed=family.why_not_packed(config),
        shared_length=family.shared_length(config),
        media=media.model_copy(update={"exif": media.exif or family.exif(folder)}),
        boxes=_box_format(folder, family, spec, media),
    )


def _box_format(folder: ModelFolder, family: Family, spec: Any, media: MediaOptions) -> BoxFormat:
    """The family's, with the unit that the user asks for."""
    own = family.boxes(folder)
    chosen = replace(own, unit=media.boxes or own.unit)
    if chosen.unit == "pixels" and family.plan([(64, 64)], spec)[0].resized is None:
        raise ConfigError(
            "is pixels, but this model sees only a part of the resized picture, in which a box may have no place",
            where="model.boxes",
            expected="thousand or unit",
        )
    return chosen


def _attention(name: str, *, packs: bool) -> str | dict[str, str]:
    """Packed attention for the language model where the family packs, else what was asked for."""
    if name != "sdpa" or not packs:
        return name
    return {"": "sdpa", "text_config": PACKED, "vision_config": "sdpa"}


def load_model(
    opened: OpenedFolder,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    quantisation: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model on the CPU (or partitioned, under ZeRO-3), in `dtype` or the checkpoint's own.

    Args:
        quantisation: layers to be quantised while they are read, see `tuning.quantised`; such a model goes to a GPU if
            there is one, since it cannot be moved there later.
        device: where a quantised model goes instead.

    Raises:
        WeightsError: files that cannot be read; a missing, unexpected or mis-shaped key, by name.
    """
    return load_weights(
        opened.folder,
        opened.family,
        opened.config,
        opened.table,
        dtype=dtype,
        attn_implementation=_attention(attention, packs=opened.why_not_packed is None),
        quantization_config=quantisation,
        device_map=None if device is None else {"": device},
    )


def empty_model(opened: OpenedFolder) -> PreTrainedModel:
    """What `load_model` gives in float32, without its weights: parameters lie on the meta device, buffers are real."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(opened.config)
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model = opened.family.model_class(opened.folder)(config)
    model.set_attn_implementation(_attention("sdpa", packs=opened.why_not_packed is None))
    compat.forget_longest_row(model)
    opened.family.install(model)
    install_pseudo_text(model)
    return model.eval()


def load_weights(
    folder: ModelFolder,
    family: Family,
    config: PretrainedConfig,
    table: WeightTable | None,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a folder from its parts, for those who have no tokenizer: see `load_model`.

    Args:
        table: the layout that the tensors are in; None for transformers' own.
        options: of transformers' `from_pretrained`.
    """
    if table is not None:
        _check_cuts(folder.path, table)
    try:
        with _LOADING, _reading(config, table):
            loaded: Any = family.model_class(folder).from_pretrained(
                **_from(folder.path),
                config=copy.deepcopy(config),
                dtype=dtype if dtype is not None else "auto",
                ignore_mismatched_sizes=True,  # reported below, by name, with the other complaints
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except (OSError, SafetensorError) as error:
        raise strict.unreadable(error, folder.path) from error
    model, info = loaded
    _say_origin(model, folder.path)
    strict.check_loading(info, where=str(folder.path))
    if table is None:
        compat.forget_unused_conversions(model)
    else:
        compat.restore_conversions(model)
    compat.forget_longest_row(model)
    compat.forget_absent_layers(model)
    family.install(model)
    install_pseudo_text(model)
    return cast(PreTrainedModel, model)


def _check_cuts(folder: Path, table: WeightTable) -> None:
    """Refuses by name a tensor that cannot be taken apart, which transformers reports as a failure of its own."""
    for info in Shards(folder).infos.values():
        if link := table.link(info.name):
            link.shapes(info.shape)


def _from(folder: Path) -> dict[str, Any]:
    """Where transformers takes the weights from: the folder; or tensors by name, which it cannot read by itself.

    The tensors are mapped from their files, so that nothing is in memory twice.
    """
    if is_plain(folder):
        return {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    source = Shards(folder)
    return {"pretrained_model_name_or_path": None, "state_dict": {name: source.read(name) for name in source.infos}}


def _say_origin(model: Any, folder: Path) -> None:
    """What transformers does by itself for a model that it reads from a folder."""
    if model.name_or_path == str(folder):
        return
    model.name_or_path = model.config.name_or_path = str(folder)  # an adapter names its base by it
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _reading(config: PretrainedConfig, table: WeightTable | None) -> AbstractContextManager[None]:
    """While it lasts, transformers reads the weights of this architecture by the table."""
    return nullcontext() if table is None else compat.conversion_rules(config.model_type, conversion_rules(table))
