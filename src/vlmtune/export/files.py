"""The files of a model folder beside the weights: configuration, tokenizer, processor, chat template, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vlmtune.models.family import OpenedFolder

COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What is taken over from a model folder; weights, code, training state and other people's READMEs are not."""


def copy_files(folders: Sequence[Path], out: Path) -> list[str]:
    """Copy the files of `COPIED` into `out`, byte for byte; of a name in several folders the first counts.

    Returns:
        The names that were copied.
    """
    copied: list[str] = []
    for folder in folders:
        for file in sorted(folder.iterdir()):
            wanted = file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED)
            if wanted and file.name not in copied:
                shutil.copyfile(file, out / file.name)
                copied.append(file.name)
    return copied


def set_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says `dtype` at the top and wherever a part of the model names its own."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            changed[key] = set_dtype(dict(value), dtype) if {"dtype", "torch_dtype"} & set(value) else value
        elif key != "torch_dtype":
            changed[key] = value
    changed["dtype"] = dtype
    return changed


def finish_files(out: Path, opened: OpenedFolder, dtype: str, picture_settings: Mapping[str, Any]) -> None:
    """Bring the copied files in line with what was trained.

    config.json names the dtype of the weights; generation_config.json ends answers where training ended them;
    preprocessor_config.json cuts pictures as training did.
    """
    config = read_json(out / "config.json")
    write_json(out / "config.json", set_dtype(config, dtype))
    file = out / "generation_config.json"
    generation: dict[str, Any] = read_json(file) if file.is_file() else {"_from_model_config": True}
    stop = list(opened.chat.stop_ids)
    generation["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    if opened.tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = opened.tokenizer.pad_token_id
    write_json(file, generation)
    if picture_settings:
        file = out / "preprocessor_config.json"
        write_json(file, {**read_json(file), **picture_settings})


def read_json(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
