"""The families, in the order in which they are asked; the only place that names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.errors import WeightsError
from vlmtune.models.auto import AutoFamily
from vlmtune.models.family import Family, ModelFolder
from vlmtune.models.internvl import InternVLFamily
from vlmtune.models.llava import LlavaFamily, assemble
from vlmtune.models.xcomposer2 import XComposer2Family

# `auto` is last: it takes whatever transformers knows
FAMILIES: Sequence[Family] = (InternVLFamily(), LlavaFamily(), XComposer2Family(), AutoFamily())


def detect(folder: ModelFolder) -> Family:
    """The first family that recognises a folder."""
    config = folder.config
    for family in FAMILIES:
        if family.matches(folder):
            return family
    raise WeightsError(
        f"model_type {config.get('model_type')!r} with architectures {config.get('architectures')!r} is not known",
        where=str(folder.path),
        expected="an image-text-to-text model that transformers has a class for ("
        + ", ".join(f.name for f in FAMILIES)
        + ")",
        remedy="No code from a model folder is run. Convert the folder to its `-hf` layout if there is one.",
    )


def assemble_parts(language: Path, tower: Path, out: Path, *, seed: int) -> None:
    """A new model from a language model and a tower; see the function that it calls."""
    assemble.assemble(language, tower, out, seed=seed)
