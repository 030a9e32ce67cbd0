"""A new LLaVA model from a language model, a vision tower and a fresh projector, as XTuner lays one out.

This layout leaves the parts as they are: no name changes, and no row is added to the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmtune.errors import WeightsError
from vlmtune.files import read_json, write_json
from vlmtune.models import native
from vlmtune.models.llava import config as configs
from vlmtune.weights import shards
from vlmtune.weights.places import PROJECTOR, TOWER
from vlmtune.weights.shards import Shards, TensorInfo, main_dtype
from vlmtune.weights.strict import listed

_PREPROCESSOR = "preprocessor_config.json"
_BUFFERS = re.compile(r".*\.(?:rotary_emb\.inv_freq|position_ids)")  # of old files; they follow from config.json
_FLOATS = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_LANGUAGE = re.compile(r"model\..+|lm_head\.weight")
_TOWER = re.compile(r"vision_model\..+")


def assemble(language: Path, tower: Path, out: Path, *, seed: int) -> None:
    """Writes the three folders.

    Args:
        language: folder of a language model.
        tower: folder of a CLIP or SigLIP, whole or the tower alone.
        out: exists and is empty.
        seed: of the projector's random weights.

    Raises:
        WeightsError: parts that transformers' LLaVA class does not take, or files that are missing.
    """
    text, vision = read_json(language / "config.json"), read_json(tower / "config.json")
    vision = configs.tower_config(vision, where=str(tower))
    source = Shards(language)
    whole = configs.native_config(
        text, vision, {}, context_id=0, has_head="lm_head.weight" in source, where=str(language)
    )
    projector = configs.xtuner_projector(whole.to_dict())
    if not (tower / _PREPROCESSOR).is_file():
        raise WeightsError(
            f"there is no {_PREPROCESSOR}", where=str(tower), expected="how pictures are brought to the tower's size",
            remedy="Copy it from the tower's repository.",
        )  # fmt: skip
    for name in (TOWER, PROJECTOR):
        (out / name).mkdir()
    strangers = [name for name in source.infos if not (_LANGUAGE.fullmatch(name) or _BUFFERS.fullmatch(name))]
    if strangers:
        raise WeightsError(f"{listed(strangers)} are no tensors of a language model alone", where=str(language))
    _copy(source, {name: name for name in source.infos}, out)
    native.copy_files(language, out)
    _copy(Shards(tower), _of_tower(Shards(tower)), out / TOWER)
    write_json(out / TOWER / "config.json", vision)
    write_json(out / TOWER / _PREPROCESSOR, read_json(tower / _PREPROCESSOR))
    _write(out / PROJECTOR, _fresh(projector, main_dtype(source), seed))
    write_json(out / PROJECTOR / "config.json", projector)


def _of_tower(source: Shards) -> dict[str, str]:
    """Name of a tensor of the tower -> its name in the folder, which may hold CLIP's text side too."""
    found = {name: name for name in source.infos if _TOWER.fullmatch(name)}
    if not found and "embeddings.patch_embedding.weight" in source:
        found = {f"vision_model.{name}": name for name in source.infos}
    if not found:
        raise WeightsError(
            "there is no vision tower in the weights", where=str(source.folder), expected="names such as vision_model.…"
        )
    return found


def _copy(source: Shards, names: Mapping[str, str], folder: Path) -> None:
    kept = {new: old for new, old in names.items() if not _BUFFERS.fullmatch(new)}
    plan = [TensorInfo(new, source.infos[old].dtype, source.infos[old].shape) for new, old in kept.items()]
    shards.write_shards(folder, plan, lambda name: source.read(kept[name]))


def _write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    plan = [shards.describe(name, tensor.dtype, tensor.shape, folder) for name, tensor in tensors.items()]
    shards.write_shards(folder, plan, tensors.__getitem__)


def _fresh(projector: Mapping[str, Any], dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Two linear layers as torch makes them: uniform within 1/√(inputs), as XTuner's are."""
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = int(projector["visual_hidden_size"]), int(projector["llm_hidden_size"])
    found = {}
    for place, inputs in ((0, wide), (2, narrow)):
        bound = 1 / math.sqrt(inputs)
        for part, shape in (("weight", (narrow, inputs)), ("bias", (narrow,))):
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            found[f"model.{place}.{part}"] = values.to(_FLOATS[dtype])
    return found
