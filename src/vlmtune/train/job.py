"""What a run brings beside transformers' own arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from vlmtune.config.schema import Component, RunConfig
from vlmtune.models.family import OpenedFolder
from vlmtune.train.callbacks import Plan, StopSignal


@dataclass(frozen=True, slots=True)
class Job:
    """The run as the trainer sees it.

    rates: peak learning rate per component.
    say: prints a line for the user, on the first rank; does nothing on the others.
    provenance: written into every checkpoint.
    skeleton: the model without weights, against which the keys of a full checkpoint are checked; None for adapters.
    """

    config: RunConfig
    opened: OpenedFolder
    plan: Plan
    rates: Mapping[Component, float]
    strategy: str
    provenance: Mapping[str, Any]
    say: Callable[[str], None]
    skeleton: PreTrainedModel | None
    stop: StopSignal = field(default_factory=StopSignal)
