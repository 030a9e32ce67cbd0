"""What decides the prepared rows of a source, as one hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import tokenizers
import transformers

from vlmtune.data.rows.corpus import Source
from vlmtune.models.family import OpenedFolder

ENCODING = 3
"""Raised whenever the ids of a row, or the files of a shard, come out differently."""

# The files of a model folder that say how text and pictures become ids.
_DECIDING = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "official.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


def key_of(source: Source, opened: OpenedFolder) -> str:
    """16 hexadecimal digits: the rows, how they are read, and how the model folder lays them down."""
    how = {"prompt", "columns", "replace_prefix", "unmarked_media", "lone_turns", "pseudo_text_token"}
    options = source.options.model_dump(mode="json", include=how)
    parts = {
        "encoding": ENCODING,
        "rows": [source.rows.digest, len(source)],
        "read": options,
        "root": _root(source),
        "family": opened.family.name,
        "media": opened.media.model_dump(mode="json"),
        "chat": dataclasses.asdict(opened.chat),
        "boxes": dataclasses.asdict(opened.boxes),
        "files": {name: _hash(opened.folder.path / name) for name in _DECIDING},
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _root(source: Source) -> list[str]:
    """Where media lie, as seen from the file of rows, so that both can move together."""
    root = source.options.model_dump(include={"root"}).get("root")
    folder = os.path.dirname(source.rows.files[0])
    roots = [root] if isinstance(root, str) else list(root or ())
    # References into a tar are offsets, so an archive that was written again makes them void.
    return [*(os.path.relpath(path, folder) for path in roots), *filter(None, [source.media.digest])]


def _hash(path: Path) -> str | None:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None
