"""What native folders keep of the official folder that they came from.

Three kinds of folder say official things: an official one; a checkpoint of a run that began from one (native weights,
but `official.json` and the official tokenizer beside them, so that it goes on as the run did); and a native export of
one, which keeps the official files in `official/` for the way back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.files import read_json, write_json
from vlmtune.models import native
from vlmtune.models.family import ModelFolder

RECORD = "official.json"
"""config.json of the official folder that a native checkpoint began from."""
KEPT = "official"
"""Folder with the small files of the official folder that a native export was made from."""


def conventions(folder: ModelFolder, *, official: bool) -> ModelFolder | None:
    """The folder under its official config.json where prompts and pictures are the official ones, else None.

    Args:
        official: config.json is the official one.
    """
    if official:
        return folder
    record = folder.path / RECORD
    return ModelFolder(folder.path, read_json(record)) if record.is_file() else None


def official_config(folder: ModelFolder, *, official: bool) -> Mapping[str, Any] | None:
    """The official config.json of this model: its own, or the one that was kept; None if it never had one."""
    found = conventions(folder, official=official)
    if found is not None:
        return found.config
    kept = folder.path / KEPT / "config.json"
    return read_json(kept) if kept.is_file() else None


def companions(folder: ModelFolder, *, official: bool, more: Sequence[str] = ()) -> Mapping[str, bytes]:
    """What a native checkpoint needs beside the usual files: the official config.json, code to be handed on and `more`;
    of a native export, the official files that it keeps."""
    found = conventions(folder, official=official)
    if found is None:
        kept = folder.path / KEPT
        files = sorted(kept.iterdir()) if kept.is_dir() else []
        return {f"{KEPT}/{file.name}": file.read_bytes() for file in files if file.is_file()}
    record = json.dumps(found.config, indent=2, ensure_ascii=False).encode()
    names = [*code(folder.path), *(name for name in more if (folder.path / name).is_file())]
    return {RECORD: record, **{name: (folder.path / name).read_bytes() for name in names}}


def code(folder: Path) -> list[str]:
    """The Python files that belong to the model; DeepSpeed puts two of its own beside every checkpoint."""
    return [file.name for file in sorted(folder.glob("*.py")) if not file.name.startswith("zero_to_")]


def keep(source: Path, out: Path, *, config: Mapping[str, Any] | None = None, more: Sequence[str] = ()) -> None:
    """Copies the small official files into `official/`, for an export back; `config` in place of config.json."""
    kept = out / KEPT
    kept.mkdir()
    native.copy_files(source, kept, more=[*code(source), *more])
    if config is not None:
        write_json(kept / "config.json", config)
