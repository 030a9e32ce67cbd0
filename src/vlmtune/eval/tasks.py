"""From a row of an eval source to what is asked of the model: the last answer, with everything before it as prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import Part, Sample, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """row: the whole sample, for the loss. prompt: without the last answer. reference: the last answer."""

    row: Sample
    prompt: Sample
    reference: str

    @property
    def question(self) -> str:
        """The prompt as plain text for people: one line per turn, pictures as `<image>`."""
        turns = []
        for message in self.prompt.messages:
            shown = [_plain(part).strip() for part in message.parts]
            turns.append(f"{message.role}: {' '.join(shown)}")
        return "\n".join(turns)


def _plain(part: Part) -> str:
    return part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>"


def to_task(sample: Sample) -> Task:
    """Split off the last answer; `data.rows.adapters` guarantees that a row ends with one."""
    *before, last = sample.messages
    if last.role != "assistant":
        raise ValueError(f"{sample.origin}: a row ends with an answer, not with a {last.role} turn")
    return Task(row=sample, prompt=replace(sample, messages=tuple(before)), reference=last.text)


def tasks(corpus: Corpus, limit: int | None = None) -> Iterator[Task]:
    """The tasks of the first `limit` rows (of all if None), in order.

    Raises:
        DataError: a bad row, at the moment when its turn comes.
    """
    return (to_task(corpus.sample(i)) for i in range(num_tasks(corpus, limit)))


def num_tasks(corpus: Corpus, limit: int | None = None) -> int:
    return len(corpus) if limit is None else min(limit, len(corpus))
