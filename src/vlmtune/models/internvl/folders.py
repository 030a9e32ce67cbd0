"""What an InternVL folder holds beside its weights, and how a folder of the other layout is furnished.

Which folders say official things, and what native ones keep of them, is in models/records.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from vlmtune.config.schema import ImageOptions
from vlmtune.errors import ExportError, WeightsError
from vlmtune.files import read_json, write_json
from vlmtune.models import native, records
from vlmtune.models.family import NATIVE, ModelFolder, OpenedFolder
from vlmtune.models.internvl import pictures, tokenizer
from vlmtune.models.internvl.config import is_official, official_of
from vlmtune.models.records import KEPT
from vlmtune.weights.shards import Shards

_HEADS = ("language_model.output.weight", "language_model.lm_head.weight", "lm_head.weight")


def conventions(folder: ModelFolder) -> ModelFolder | None:
    """See `records.conventions`."""
    return records.conventions(folder, official=is_official(folder.config))


def official_config(folder: ModelFolder) -> Mapping[str, Any] | None:
    """See `records.official_config`."""
    return records.official_config(folder, official=is_official(folder.config))


def has_head(folder: ModelFolder) -> bool:
    """Whether the model has an output head of its own: when the files hold one, whatever the config says of it; and
    when they lack one that the config of an official folder wants, which is said when the weights are read."""
    text = folder.config.get("llm_config") or folder.config.get("text_config") or {}
    untied = not text.get("tie_word_embeddings", False)
    try:
        names = Shards(folder.path).infos
    except WeightsError:  # said, with what is missing, when the weights are read
        return untied
    return any(name in names for name in _HEADS) or (is_official(folder.config) and untied)


def companions(folder: ModelFolder) -> Mapping[str, bytes]:
    return records.companions(folder, official=is_official(folder.config))


def write_files(opened: OpenedFolder, layout: str, out: Path) -> list[str]:
    """Everything beside the weights of a folder of `layout`; see `Family.write_files`."""
    found = conventions(opened.folder)
    if layout != NATIVE:
        return _write_official(opened, found, out)
    if found is not None:
        return _write_native(opened, found, out)
    native.copy_files(opened.folder.path, out)
    if (opened.folder.path / KEPT).is_dir():
        records.keep(opened.folder.path / KEPT, out)
    if opened.media.image != ImageOptions():
        file = out / "preprocessor_config.json"
        write_json(file, {**read_json(file), **pictures.picture_settings(opened.spec)})
    return []


def _write_official(opened: OpenedFolder, found: ModelFolder | None, out: Path) -> list[str]:
    folder = opened.folder.path
    kept = folder if found is not None else folder / KEPT
    notes = []
    if kept.is_dir():
        native.copy_files(kept, out, more=records.code(kept))
    else:
        native.copy_files(folder, out)
        notes.append(
            "the base has no official Python files; official code must be copied from a model repository, while vLLM "
            "and LMDeploy bring their own"
        )
    for name in ("processor_config.json", "chat_template.jinja"):
        if found is None and not (kept / name).is_file():
            (out / name).unlink(missing_ok=True)  # transformers' own, which no official folder has
    config = dict(official_config(opened.folder) or {})
    config = config or official_of(opened.config.to_dict(), has_head=has_head(opened.folder))
    config.update(pictures.official_settings(opened.spec))
    config.update({name: 0 for name in ("use_backbone_lora", "use_llm_lora") if name in config})
    write_json(out / "config.json", config)
    return notes


def _write_native(opened: OpenedFolder, found: ModelFolder, out: Path) -> list[str]:
    if found.config.get("ps_version", "v1") == "v1":
        raise ExportError(
            "the model has ps_version v1, for which transformers' InternVL class has no word",
            where=str(opened.folder.path),
            remedy="Export it with --layout official.",
        )
    native.copy_licences(opened.folder.path, out)
    opened.config.save_pretrained(out)
    fast = cast(PreTrainedTokenizerFast, opened.tokenizer)
    tokenizer.write_native(fast, opened.chat, out)
    write_json(out / "preprocessor_config.json", pictures.picture_settings(opened.spec))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": opened.spec.tokens_per_tile}
    write_json(out / "processor_config.json", processor)
    records.keep(opened.folder.path, out, config=found.config)
    return [f"transformers' InternVLProcessor: {gap}" for gap in pictures.native_gaps(opened.spec)]
