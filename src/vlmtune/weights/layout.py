"""A layout: how the tensors of a checkpoint are named and packed, as a table against the names of the parameters.

The same table loads, exports and checks keys; every rule can be read in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.errors import WeightsError
from vlmtune.weights.ops import KEEP, Op, Shape


@dataclass(frozen=True, slots=True)
class Rule:
    """disk: a name in the files; parameters: what it becomes. `*` stands for a number, a closing `**` for any rest.

    The same wildcards stand in the same order on both sides. folder: inside the model's, where it is another one.
    """

    disk: str
    parameters: tuple[str, ...]
    op: Op = KEEP
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """One tensor on disk and the parameters that it fills, in the order of `op.split`; `folder` as of its rule."""

    disk: str
    parameters: tuple[str, ...]
    op: Op = KEEP
    folder: str = ""

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Shapes of the parameters of a tensor of shape `whole`.

        Raises:
            WeightsError: a tensor of this shape cannot be taken apart.
        """
        try:
            return self.op.shapes(whole)
        except ValueError as error:
            raise WeightsError(
                f"the tensor {self.disk} has the shape {whole}", expected=str(error),
                remedy="Check that config.json belongs to these files.",
            ) from None  # fmt: skip


class WeightTable:
    """The rules of one layout; the first that matches counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._by_disk = [(_regex(rule.disk), rule) for rule in self.rules]
        self._by_parameter = [(_regex(name), rule) for rule in self.rules for name in rule.parameters]
        self._known: dict[str, Link | None] = {}
        self._known_parameters: dict[str, Link | None] = {}

    def __getstate__(self) -> tuple[Rule, ...]:
        return self.rules

    def __setstate__(self, rules: tuple[Rule, ...]) -> None:
        self.__init__(rules)  # type: ignore[misc] # the compiled patterns and the cache are made anew

    def __deepcopy__(self, memo: object) -> WeightTable:
        return self  # it never changes, and transformers copies its loading rules once per tensor

    def link(self, disk: str) -> Link | None:
        """Where a tensor of the files goes; None when no rule knows its name."""
        if disk not in self._known:
            self._known[disk] = _first(disk, self._by_disk)
        return self._known[disk]

    def link_of(self, parameter: str) -> Link | None:
        """The tensor of the files that holds a parameter; None when no rule covers it."""
        if parameter not in self._known_parameters:
            self._known_parameters[parameter] = _first(parameter, self._by_parameter)
        return self._known_parameters[parameter]


def _first(name: str, patterns: Sequence[tuple[re.Pattern[str], Rule]]) -> Link | None:
    for pattern, rule in patterns:
        if match := pattern.fullmatch(name):
            values = match.groups()
            parameters = tuple(_filled(one, values) for one in rule.parameters)
            return Link(_filled(rule.disk, values), parameters, rule.op, rule.folder)
    return None


def _regex(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)"))


def _filled(name: str, values: Sequence[str]) -> str:
    rest = iter(values)
    return re.sub(r"\*\*|\*", lambda _: next(rest), name)
