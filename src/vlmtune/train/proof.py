"""The first-step proof: every tensor that should train got a finite, non-zero gradient, or the run stops.

Gradients are watched by tensor hooks during the backward pass: before DDP or ZeRO reduces, and where ZeRO later leaves
no `.grad`. Under FSDP2 a parameter is a shard whose hooks do not fire; the reduced shard is read after the backward.
Either way the figures of all ranks are joined by their maximum. There is no tolerance: exactly zero, or not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlmtune.config.schema import COMPONENTS, Component
from vlmtune.errors import ProofError
from vlmtune.models.family import OpenedFolder
from vlmtune.tuning.components import component_of, native_name

# Softmax does not see a constant added to all keys: this gradient is zero by algebra unless positions are rotated in.
_KEY_BIAS = re.compile(r"(?:^|\.)(?:k_proj|key|k)\.bias$")
_LORA_A = re.compile(r"\.lora_(?:embedding_)?A\.")
_SHOWN = 12

_UNLIKELY = 1e-9  # that drop path alone leaves a branch out in so many steps running


class FirstStepProof:
    """Watches one model until every trained tensor is proven.

    A tensor that may lawfully be zero now is demanded later: the tower at the first step with pictures, LoRA's A at the
    first step after B moved, a layer that drop path left out at one of the next steps. `pending` names what is open.
    """

    def __init__(self, model: nn.Module, opened: OpenedFolder, *, drop_path: float = 0.0) -> None:
        self._trained: dict[str, tuple[Component, nn.Parameter]] = {
            name: (component_of(name, opened.components), parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not _matches(opened.components.undemanded, native_name(name))
        }
        self._pictures_only = opened.components.pictures_only
        self.pending: set[str] = set(self._trained)
        self._watched: set[str] = set()
        self._saw_pictures = False
        self._largest: dict[str, torch.Tensor] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._droppable = tuple(f"{prefix}." for prefix in opened.components.blocks.get("vision", ()) if drop_path)
        self._allowed_misses = math.log(_UNLIKELY) / math.log(drop_path) if drop_path else 0.0
        self._misses: dict[str, int] = {}

    def begin_step(self, *, pictures: bool, adapters_moved: bool) -> None:
        """Chooses what this step must prove.

        Args:
            pictures: some micro batch of the step, on any rank, holds a picture.
            adapters_moved: an optimizer step with a learning rate above zero has been taken, so LoRA's B is not zero.
        """
        self._saw_pictures |= pictures
        self._largest.clear()
        self._watched = {name for name in self.pending if self._is_due(name, pictures, adapters_moved)}
        for name in self._watched:
            parameter = self._trained[name][1]
            if name not in self._hooks and not isinstance(parameter, DTensor):
                self._hooks[name] = parameter.register_hook(partial(self._saw, name))

    def _is_due(self, name: str, pictures: bool, adapters_moved: bool) -> bool:
        for_pictures = self._trained[name][0] != "language" or _matches(self._pictures_only, native_name(name))
        if for_pictures and not pictures:
            return False
        return adapters_moved or not _LORA_A.search(name)

    def _saw(self, name: str, gradient: torch.Tensor) -> None:
        if name not in self._watched or not gradient.numel():
            return
        largest = gradient.detach().abs().amax().float()  # NaN wins over every number here and below
        before = self._largest.get(name)
        self._largest[name] = largest if before is None else torch.maximum(before, largest)

    def end_step(self, device: torch.device, join: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Judges the step.

        Args:
            join: element-wise maximum over all ranks of a float32 tensor (k,).

        Raises:
            ProofError: names tensors with a zero or non-finite gradient.
        """
        if not self._watched:
            return
        for name in self._watched:
            parameter = self._trained[name][1]
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                self._saw(name, parameter.grad.to_local())
        order = sorted(self._watched)
        nothing = torch.zeros((), device=device)
        seen = torch.stack([self._largest.get(name, nothing).to(device) for name in order])
        broken = ~torch.isfinite(seen)
        figures = join(torch.cat([torch.where(broken, 0.0, seen), broken.float()])).tolist()
        largest = dict(zip(order, figures[: len(order)], strict=True))
        not_finite = [name for name, flag in zip(order, figures[len(order) :], strict=True) if flag]
        zero = [
            name
            for name in order
            if not largest[name] and name not in not_finite and not _KEY_BIAS.search(native_name(name))
        ]
        dropped = {name for name in zero if self._may_be_dropped(name)}
        if not_finite or len(zero) > len(dropped):
            raise _failed(not_finite, [name for name in zero if name not in dropped])
        self._watched -= dropped
        self.pending -= self._watched
        for name in self._watched & set(self._hooks):
            self._hooks.pop(name).remove()
        self._watched = set()

    def _may_be_dropped(self, name: str) -> bool:
        """Whether drop path explains that this tensor got no gradient, in this step and those before."""
        if not native_name(name).startswith(self._droppable):
            return False
        self._misses[name] = self._misses.get(name, 0) + 1
        return self._misses[name] <= self._allowed_misses

    def open_questions(self) -> list[str]:
        """What no step could prove so far, and why, one sentence per component."""
        sentences = []
        for component in COMPONENTS:
            names = [name for name in self.pending if self._trained[name][0] == component]
            if not names:
                continue
            why = "it needs a row with a picture, and none came"
            if all(name in self._misses for name in names):
                why = "drop path left it out in every step so far"
            if all(_LORA_A.search(name) for name in names) and (self._saw_pictures or component == "language"):
                why = "the run was too short, as LoRA's A gets a gradient only once B has moved"
            sentences.append(f"{_tensors(len(names))} of {component} could not be proven: {why}.")
        return sentences


def _matches(pattern: str | None, name: str) -> bool:
    return pattern is not None and re.fullmatch(pattern, name) is not None


def _failed(not_finite: list[str], zero: list[str]) -> ProofError:
    found = []
    if not_finite:
        found.append(f"gradients that are not finite, in {_tensors(len(not_finite))}: {_listed(not_finite)}")
    if zero:
        found.append(f"a gradient of zero in {_tensors(len(zero))} that should train: {_listed(zero)}")
    return ProofError(
        "; ".join(found),
        where="first-step proof",
        expected="a finite, non-zero gradient in every trained tensor",
        remedy="Freeze what cannot train, lower the learning rate if it overflowed, or look at the rows with "
        "`vlmtune preview`; train.first_step_proof=false skips this test.",
    )


def _tensors(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
