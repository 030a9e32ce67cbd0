"""The processes of a run: how many there are, and work that one of them does for all."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

# The first process may read a large corpus for long while the others wait for its result.
_PATIENCE = datetime.timedelta(hours=3)


class Processes:
    """The group of processes that a launcher started; one process when there was none."""

    def __init__(self) -> None:
        use_cpu = torch.accelerator.current_accelerator() is None
        options: dict[str, Any] = {"timeout": _PATIENCE}
        self._state = PartialState(cpu=use_cpu, **options)

    @property
    def world(self) -> int:
        return int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        return bool(self._state.is_main_process)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self._state.wait_for_everyone()

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of `work`, which runs in the first process only and is sent to the others."""
        box: list[Any] = [work() if self.is_first else None]
        if self.world > 1:
            broadcast_object_list(box)
        result: T = box[0]
        return result
