"""The files of a model folder beside the weights: configuration, tokenizer, processor, chat template, licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.files import read_json, write_json
from vlmtune.models.family import OpenedFolder


def set_dtype(config: dict[str, Any], dtype: str, key: str = "dtype") -> dict[str, Any]:
    """A config.json that says `dtype` at the top and wherever a part of the model names its own.

    key: `torch_dtype` for readers before transformers 5, who know no other.
    """
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            changed[name] = set_dtype(dict(value), dtype, key) if {"dtype", "torch_dtype"} & set(value) else value
        elif name not in ("dtype", "torch_dtype"):
            changed[name] = value
        elif key not in changed:
            changed[key] = dtype
    return {**changed, key: dtype}


def finish_files(out: Path, opened: OpenedFolder, dtype: str, *, legacy: bool) -> None:
    """Bring the files of a folder in line with what was trained.

    config.json names the dtype of the weights; generation_config.json ends answers where training ended them.

    legacy: the folder is read by code older than transformers 5, and its own generation settings are kept.
    """
    config = read_json(out / "config.json")
    write_json(out / "config.json", set_dtype(config, dtype, "torch_dtype" if legacy else "dtype"))
    file = out / "generation_config.json"
    if legacy and file.is_file():
        return
    generation: dict[str, Any] = read_json(file) if file.is_file() else {"_from_model_config": True}
    stop = list(opened.chat.stop_ids)
    generation["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    if opened.tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = opened.tokenizer.pad_token_id
    write_json(file, generation)
