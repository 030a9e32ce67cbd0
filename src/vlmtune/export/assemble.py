"""``vlmtune assemble``: a model folder that did not exist before, from the folders of its parts."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.errors import UsageError
from vlmtune.export.card import licence_of
from vlmtune.export.write import ASSEMBLED, export
from vlmtune.files import write_json
from vlmtune.infer.locate import PROVENANCE
from vlmtune.models.family import NATIVE
from vlmtune.models.load import open_folder, read_folder
from vlmtune.models.registry import assemble_parts

AS_ASSEMBLED = "xtuner"
"""The layout in which the parts stay as they are."""
LAYOUTS = (AS_ASSEMBLED, NATIVE, "llava")


def assemble(language: str, tower: str, out: str | Path, *, layout: str = AS_ASSEMBLED, seed: int = 0) -> Path:
    """Write a LLaVA model of a language model, a vision tower and a fresh projector.

    Args:
        language: folder or hub id of a language model.
        tower: folder or hub id of a CLIP or SigLIP model.
        out: must not exist or be empty.
        layout: ``xtuner`` leaves the parts as they are; into another one the model is exported.
        seed: of the projector.

    Returns:
        The folder.

    Raises:
        UsageError: an output folder in use, an unknown layout.
        WeightsError: parts that do not make a model.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"no layout {layout!r}", where="--layout", expected=" or ".join(LAYOUTS))
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("the output folder is in use", where=str(target), remedy="Choose another folder.")
    text, vision = read_folder(language).path, read_folder(tower).path
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.parts")
    try:
        draft.mkdir(parents=True)
        assemble_parts(text, vision, draft, seed=seed)
        open_folder(draft)  # tokenizer, image processor and prompt, before the folder has its name
        if layout == AS_ASSEMBLED:
            draft.rename(target)
        else:
            parts = {"language": _about(language, text), "tower": _about(tower, vision)}
            record = {**parts, "projector": "fresh: random numbers, untrained", "seed": seed}
            write_json(draft / PROVENANCE, {ASSEMBLED: record})
            export(draft, target, layout=layout)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _about(given: str, folder: Path) -> Mapping[str, Any]:
    """A part for the record: its hub id or whole path, and the licence that its folder states."""
    name = str(folder.absolute()) if Path(given).is_dir() else given
    return {"name": name, "licence": licence_of(folder)}
