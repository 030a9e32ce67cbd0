"""What kind of another trainer's checkpoint a path is, from its names alone; nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from vlmtune.errors import WeightsError
from vlmtune.weights.places import INDEX, SINGLE, folders
from vlmtune.weights.shards import Shards, read_header

Kind = Literal["pickle", "deepspeed", "unmerged", "peft", "parts"]
WORDS: dict[Kind, str] = {
    "pickle": "a pickled checkpoint",
    "deepspeed": "a DeepSpeed checkpoint",
    "unmerged": "a checkpoint of the official trainer whose LoRA is not merged",
    "peft": "an adapter with the official names of its layers",
    "parts": "what XTuner writes of a LLaVA model whose language model was frozen",
}
EXPORT_FIRST = (
    "Make a model folder of it first: `vlmtune export PATH -o DIR`, with --base MODEL where it holds no whole model."
)
ADAPTER = "adapter_model.safetensors"
LATEST = "latest"
"""DeepSpeed's file beside the folder of a step, with that folder's name."""
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_OFFICIAL = "internvl_chat"
_LANGUAGE, _VISION = "base_model.model.model.layers.", "base_model.model.encoder.layers."


def recognise(path: Path) -> Kind | None:
    """The kind of a checkpoint that only ``vlmtune export`` reads; None for everything else.

    A folder's weights in safetensors count before DeepSpeed's, which the official trainer writes beside them.
    """
    if path.is_file():
        return "pickle" if path.suffix in _PICKLED else None
    if (path / ADAPTER).is_file():
        return "peft" if _is_of_a_tower(path) else None
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return "unmerged" if _is_unmerged(path) else None
    if rank_folder(path):
        return "deepspeed"
    return "parts" if not (path / "config.json").is_file() and folders(path)[1:] else None


def tower(file: Path) -> Literal["language_model", "vision_model"] | None:
    """The official model's part that an adapter file was trained on alone; None if its names are not of such a part."""
    names = [info.name for info in read_header(file)]
    if any(name.startswith(_LANGUAGE) for name in names):
        return "language_model"
    return "vision_model" if any(name.startswith(_VISION) for name in names) else None


def rank_folder(path: Path) -> Path | None:
    """The folder with the files of DeepSpeed's ranks: `path` itself, or the one that its file `latest` names."""
    if not path.is_dir():
        return None
    if any(path.glob("*_model_states.pt")):
        return path
    latest = path / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        inner = path / name
        if name == inner.name and inner.is_dir() and any(inner.glob("*_model_states.pt")):
            return inner
    return None


def _is_of_a_tower(folder: Path) -> bool:
    try:
        return tower(folder / ADAPTER) is not None
    except WeightsError:  # whoever loads the adapter says what is wrong with it
        return False


def _is_unmerged(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != _OFFICIAL:
            return False
        return any(".lora_A." in name for name in Shards(folder).infos)
    except (OSError, ValueError, RecursionError, WeightsError):
        return False  # whoever opens the folder as a model says what is wrong with it
