"""What an InternLM-XComposer2 folder holds beside its weights, and how a folder of the other layout is furnished.

Which folders say official things, and what native ones keep of them, is in models/records.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from vlmtune.files import write_json
from vlmtune.models import native, records
from vlmtune.models.family import NATIVE, ModelFolder, OpenedFolder
from vlmtune.models.records import KEPT
from vlmtune.models.xcomposer2 import chat
from vlmtune.models.xcomposer2.config import RECORD, TOWER_FILE, UNSAID, is_official, official_of, tower_file
from vlmtune.models.xcomposer2.configuration import XComposer2Config


def conventions(folder: ModelFolder) -> ModelFolder | None:
    """See `records.conventions`."""
    return records.conventions(folder, official=is_official(folder.config))


def companions(folder: ModelFolder) -> Mapping[str, bytes]:
    return records.companions(folder, official=is_official(folder.config), more=[TOWER_FILE])


def write_files(opened: OpenedFolder, layout: str, out: Path) -> list[str]:
    """Everything beside the weights of a folder of `layout`; see `Family.write_files`."""
    if layout != NATIVE:
        return _write_official(opened, out)
    folder = opened.folder.path
    native.copy_licences(folder, out)
    _as_trained(opened).save_pretrained(out)
    chat.write_tokenizer(cast(PreTrainedTokenizerFast, opened.tokenizer), opened.chat, out)
    found = conventions(opened.folder)
    if found is not None:
        records.keep(folder, out, config=found.config, more=[TOWER_FILE])
    elif (folder / KEPT).is_dir():
        records.keep(folder / KEPT, out, more=[TOWER_FILE])
    return ["transformers has no class for the model: AutoModelForCausalLM opens it after `import vlmtune.models`"]


def _as_trained(opened: OpenedFolder) -> XComposer2Config:
    """The configuration with the form of conversations, which an opened folder has as an option."""
    config = cast(XComposer2Config, copy.deepcopy(opened.config))
    config.chat = opened.media.chat or config.chat
    return config


def _write_official(opened: OpenedFolder, out: Path) -> list[str]:
    folder, config = opened.folder.path, _as_trained(opened)
    official = records.official_config(opened.folder, official=is_official(opened.folder.config))
    kept = folder / KEPT if (folder / KEPT).is_dir() else folder
    native.copy_files(kept, out, more=records.code(kept))
    if (tower := tower_file(config)) is not None:
        write_json(out / TOWER_FILE, tower)
    size, before = cast(CLIPVisionConfig, config.vision_config).image_size, (official or {}).get("img_size")
    said = {**(official or official_of(config)), "img_size": size}
    unsaid = {name: vars(config)[name] for name in UNSAID if vars(config)[name] != vars(XComposer2Config)[name]}
    if unsaid:
        said[RECORD] = unsaid
    write_json(out / "config.json", said)
    notes = []
    if before not in (None, size):
        notes.append(
            f"pictures are squares of {size} pixels, and were of {before} in the base: the official code has the grid "
            "of its positions as a constant in build_mlp.py (resize_pos), to be changed before it opens the folder"
        )
    if records.code(kept):
        return notes
    return [
        *notes,
        "the base has no official Python files; to load the folder with the official code, copy them from a model "
        "repository",
    ]
