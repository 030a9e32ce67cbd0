"""Verdicts on records of official code, decided by what a case holds and never by its name.

equal: our result is the record's. mended: the official result loses or twists something; ours is right, which the test
states without our code. refused: the row cannot be trained as it stands, and our error says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Verdict = Literal["equal", "mended", "refused"]
Case = TypeVar("Case")


@dataclass(frozen=True)
class Rule(Generic[Case]):
    """`holds` looks at the case's content. why: what the official code does, and what ours does instead."""

    name: str
    verdict: Verdict
    why: str
    holds: Callable[[Case], bool]


def decide(case: Case, rules: Sequence[Rule[Case]]) -> Rule[Case]:
    """The first rule that holds; without one the case must be equal."""
    return next((rule for rule in rules if rule.holds(case)), _EQUAL)


_EQUAL: Rule = Rule("none", "equal", "everything else", lambda case: True)


def report(cases: Iterable[Case], rules: Sequence[Rule[Case]]) -> str:
    """Prints and returns the table of verdicts; something must be equal."""
    found = Counter(decide(case, rules) for case in cases)
    assert found[_EQUAL], "no case is compared for equality"
    lines = [f"{rule.verdict:8} {found[rule]:4}  {rule.name}: {rule.why}" for rule in (_EQUAL, *rules) if found[rule]]
    table = "\n".join(lines)
    print(table)
    return table
