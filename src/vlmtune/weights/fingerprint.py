"""What a model folder is recognised by, without reading its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlmtune.weights.places import INDEX, PICKLED, SINGLE, folders


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the weights' index, or the only file's header: names and shapes, cheaply.

    Of a model in several folders (XTuner's LLaVA), over all of them; of a pickled file its size.
    """
    digest = hashlib.sha256()
    for part in folders(folder):
        digest.update((part / "config.json").read_bytes())
        index, only, pickled = part / INDEX, part / SINGLE, part / PICKLED
        if index.exists():
            digest.update(index.read_bytes())
        elif only.exists():
            with open(only, "rb") as file:
                digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
        elif pickled.exists():
            digest.update(str(pickled.stat().st_size).encode())
    return digest.hexdigest()
