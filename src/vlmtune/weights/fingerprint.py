"""What a model folder is recognised by, without reading its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the weights' index, or the only file's header: names and shapes, cheaply."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    index = folder / "model.safetensors.index.json"
    only = folder / "model.safetensors"
    if index.exists():
        digest.update(index.read_bytes())
    elif only.exists():
        with open(only, "rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
    return digest.hexdigest()
