"""The alpha of a LoRA that another trainer wrote: what its update is multiplied with, times the rank.

It is not in the tensors. Without it the update would be folded in with a wrong strength, so it is never guessed.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlmtune.errors import UsageError, WeightsError

Alpha = Callable[[str, int], float]
"""Official name of a module and its rank -> alpha, for a scale of alpha / rank."""

_SECTIONS = {
    "language_model": ("llm_lora",),
    "model": ("llm_lora",),
    "lm_head": ("llm_lora",),
    "vision_model": ("visual_encoder_lora", "vision_lora"),
}
_OPTIONS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}
_ALPHA_PER_RANK = 2  # the official trainer's wrap_llm_lora and wrap_backbone_lora are always called with 2 · r


def given(value: float) -> Alpha:
    """What the user says."""
    return lambda module, rank: value


def of_text(text: str, *, where: str) -> Alpha:
    """From the configuration that mmengine keeps as text; only its syntax is read."""
    found = {part: _settings(text, names) for part, names in _SECTIONS.items()}

    def alpha(module: str, rank: int) -> float:
        settings = found[module.split(".")[0]]
        value = settings.get("lora_alpha")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(
                f"the alpha of the LoRA on {module.split('.')[0]} (rank {rank}) is not in this checkpoint, and without "
                "it the strength of the update is not known",
                where=where,
                remedy="Give lora_alpha of the training configuration: --lora-alpha N.",
            )
        return _per_rank(float(value), rank, bool(settings.get("use_rslora")))

    return alpha


def of_official(config: Mapping[str, Any], *, where: str) -> Alpha:
    """From the config.json of the official trainer, which names the rank and always uses twice as much."""

    def alpha(module: str, rank: int) -> float:
        option = _OPTIONS[module.split(".")[0]]
        if config.get(option) != rank:
            raise WeightsError(
                f"{option} is {config.get(option)!r}, but the LoRA of {module} has rank {rank}",
                where=where, expected=f"{option}: {rank}", remedy="Copy the config.json of this checkpoint.",
            )  # fmt: skip
        return float(_ALPHA_PER_RANK * rank)

    return alpha


def of_adapter(config: Mapping[str, Any], *, where: str) -> Alpha:
    """From an adapter_config.json."""
    usual, own = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(usual, int | float):
        raise WeightsError(f"lora_alpha is {usual!r}", where=where, expected="a number")

    def alpha(module: str, rank: int) -> float:
        # As PEFT matches its patterns: the end of the name from the start of a part, the first that fits.
        value = next((v for key, v in own.items() if re.match(rf"(.*\.)?({key})$", module)), usual)
        return _per_rank(float(value), rank, bool(config.get("use_rslora")))

    return alpha


def _per_rank(alpha: float, rank: int, by_root: bool) -> float:
    """Rank-stabilised LoRA divides by the root of the rank; said here as an alpha that is divided by the rank."""
    return alpha * math.sqrt(rank) if by_root else alpha


def _settings(text: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of ``llm_lora = dict(…)`` wherever it stands in a configuration; {} where it is not clear."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of text nested too deep
        return {}
    found = [dict(_plain(value)) for name, value in _named(tree) if name in names]
    found = [settings for settings in found if settings]
    return found[0] if found and all(settings == found[0] for settings in found) else {}


def _named(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            yield from _items(node)
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))


def _items(node: ast.Dict) -> Iterator[tuple[str, ast.expr]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value, value


def _plain(value: ast.expr) -> Iterator[tuple[str, Any]]:
    inner: Iterator[tuple[str, ast.expr]] = iter(())
    if isinstance(value, ast.Dict):
        inner = _items(value)
    elif isinstance(value, ast.Call):
        inner = ((keyword.arg, keyword.value) for keyword in value.keywords if keyword.arg)
    return ((name, one.value) for name, one in inner if isinstance(one, ast.Constant))
