"""The tensors of another trainer's checkpoint under the official names of the model that they belong to.

Official are InternVL's names, and for LLaVA models those that XTuner's folders have (the parts' own).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from vlmtune.errors import WeightsError
from vlmtune.weights.foreign.alpha import Alpha
from vlmtune.weights.places import POSITIONS, POSITIONS_AGAIN
from vlmtune.weights.shards import Source, TensorInfo
from vlmtune.weights.strict import listed

Naming = Literal["official", "xtuner"]
"""The layout whose names a checkpoint's tensors have: InternVL's official one, or LLaVA's of XTuner."""
_PROJECTOR = re.compile(r"mlp1\..+|model\.\d+\.(?:weight|bias)")
_OUTER = re.compile(r"(?:module\.|model\.|_orig_mod\.)*(?=(?:language_model|vision_model|mlp1)\.)")
_XTUNER = re.compile(r"(?:module\.|_orig_mod\.)*(?:llm|visual_encoder|projector)\.(?:base_model\.model\.)?(.+)")
_WRAPPER = re.compile(r"^(language_model|vision_model)\.base_model\.model\.")
_LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.(\w+))?\.weight")
_SAVED = re.compile(r"\.modules_to_save\.\w+\.")


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a source."""

    source: Source
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.source.infos[self.name]

    def read(self) -> torch.Tensor:
        return self.source.read(self.name)


@dataclass(frozen=True, slots=True)
class Lora:
    """The update of a linear layer: b (out, rank) times a (rank, in), times alpha / rank."""

    a: Place
    b: Place
    alpha: Alpha

    @property
    def rank(self) -> int:
        return self.a.info.shape[0]


@dataclass(frozen=True, slots=True)
class Parts:
    """whole: official name -> tensor that was trained or kept in full. lora: official name of a layer -> its update."""

    where: Path
    whole: dict[str, Place] = field(default_factory=dict)
    lora: dict[str, Lora] = field(default_factory=dict)

    def joined(self, other: Parts) -> Parts:
        """Both, which must not have a name in common.

        Raises:
            WeightsError: a layer that both change.
        """
        twice = sorted(set(self.whole) & set(other.whole) | set(self.lora) & set(other.lora))
        if twice:
            raise WeightsError(f"{listed(twice)} in both adapters", where=f"{self.where} and {other.where}")
        return Parts(self.where, self.whole | other.whole, self.lora | other.lora)


def sort(source: Source, alpha: Alpha, *, prefix: str = "") -> Parts:
    """Sort the tensors of a checkpoint by what they are.

    Args:
        prefix: the official part that the names of an adapter lack (``language_model.``).

    Raises:
        WeightsError: names that are not InternVL's official ones, several adapters, half an update, by name.
    """
    parts = Parts(source.folder)
    halves: dict[str, dict[str, Place]] = {}
    adapters: set[str] = set()
    strangers: list[str] = []
    for name in source.infos:
        official = official_name(prefix + name)
        place = Place(source, name)
        match = None if official is None else _LORA.fullmatch(official)
        if match:
            halves.setdefault(match[1], {})[match[2]] = place
            adapters.add(match[3] or "default")
        elif official is None or ".lora_" in official:
            strangers.append(name)
        elif ".original_module." not in official:  # what a copy that was trained in full has replaced
            parts.whole[_SAVED.sub(".", official).replace(".base_layer.", ".")] = place
    if POSITIONS_AGAIN in parts.whole:
        parts.whole[POSITIONS] = parts.whole.pop(POSITIONS_AGAIN)
    _refuse(source.folder, strangers, adapters, [layer for layer, found in halves.items() if len(found) < 2])
    parts.lora.update({layer: Lora(found["A"], found["B"], alpha) for layer, found in halves.items()})
    return parts


def naming(source: Source) -> Naming:
    """By the names of most of the tensors."""
    return (
        "xtuner" if sum(_XTUNER.fullmatch(name) is not None for name in source.infos) * 2 > len(source) else "official"
    )


def is_projector(name: str) -> bool:
    """Whether an official name is that of a tensor of the projector."""
    return _PROJECTOR.fullmatch(name) is not None


def official_name(name: str) -> str | None:
    """A name without the prefixes of trainers and wrappers; None if it is none of an official InternVL model, or of a
    LLaVA model of XTuner."""
    if llava := _XTUNER.fullmatch(name):
        return llava[1]
    match = _OUTER.match(name)
    return None if match is None else _WRAPPER.sub(r"\1.", name[match.end() :])


def _refuse(where: Path, strangers: Iterable[str], adapters: set[str], halves: Iterable[str]) -> None:
    strangers, halves = list(strangers), list(halves)
    if strangers:
        raise WeightsError(
            f"{len(strangers)} tensors are none of an official InternVL model, of XTuner's LLaVA, or of a LoRA on one: "
            f"{listed(strangers)}",
            where=str(where),
            expected="names such as language_model.…, vision_model.…, mlp1.…, or llm.…, visual_encoder.…, projector.…",
        )  # fmt: skip
    if len(adapters) > 1:
        raise WeightsError(f"several adapters: {listed(sorted(adapters))}", where=str(where), expected="one")
    if halves:
        raise WeightsError(f"only one of lora_A and lora_B of {listed(halves)}", where=str(where))


def check_fit(parts: Parts, base: Mapping[str, TensorInfo], *, base_folder: Path) -> None:
    """Refuse a checkpoint of another model before anything is written.

    Raises:
        WeightsError: a tensor without a place in the base, or of another shape, by name.
    """
    lost = [name for name in parts.whole if name not in base]
    lost += [layer for layer in parts.lora if f"{layer}.weight" not in base]
    wrong = [
        f"{name} {place.info.shape}, in the base {base[name].shape}"
        for name, place in parts.whole.items()
        if name in base and place.info.shape != base[name].shape
    ]
    for layer, lora in parts.lora.items():
        a, b = lora.a.info.shape, lora.b.info.shape
        weight = base.get(f"{layer}.weight")
        if weight and not (len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == weight.shape):
            wrong.append(f"{layer} with lora_A {a} and lora_B {b}, in the base {weight.shape}")
    complaints = [f"{len(lost)} have no place there: {listed(lost)}"] if lost else []
    complaints += [f"{len(wrong)} are of another shape: {listed(wrong)}"] if wrong else []
    if complaints:
        raise WeightsError(
            f"the checkpoint does not fit the base {base_folder}: " + "; ".join(complaints),
            where=str(parts.where),
            expected="the folder of the model that it was trained on, in its publisher's layout",
            remedy="Point to that folder: --base DIR.",
        )
