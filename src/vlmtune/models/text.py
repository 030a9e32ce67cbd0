"""Text runs to ids, with the rule that special tokens come from the chat format and never from the user's words.

A literal `<image>` or `</s>` inside a question or an answer is ordinary text here: it is cut into ordinary tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_SHORT = 40  # characters
_REMEMBERED = 10_000  # runs


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text in the sequence."""

    text: str
    trained: bool
    template: bool
    """From the chat format: special tokens in it are special."""


@dataclass(slots=True)
class Run:
    """Plain text between special tokens, or one special token.

    pieces: the text with its trained flags. first: nothing stands before the run in its sequence, or it is tokenised as
    if that were so. ids, trained: what it becomes, once tokenised.
    """

    pieces: list[tuple[str, bool]]
    first: bool
    ids: Sequence[int] | None = None
    trained: list[bool] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.pieces[0][0] if len(self.pieces) == 1 else "".join(piece for piece, _ in self.pieces)

    @property
    def is_mixed(self) -> bool:
        flag = self.pieces[0][1]
        return any(other != flag for _, other in self.pieces[1:])


@dataclass(frozen=True, slots=True)
class _Special:
    id: int
    eats_left: bool
    eats_right: bool


class TextEncoder:
    """Lays segments down as ids and a trained flag per id.

    Runs of plain text between special tokens are tokenised whole, so that words which cross a segment border get the
    ids that the rendered conversation gets. Only where an answer begins is there always a border: in training the ids
    before it are those that a generation prompt ends with. White space that a special token before it swallows is no
    border: nothing of it is left in either. A token is trained if any of its characters is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._json: str = tokenizer.backend_tokenizer.to_str()
        self._special = {
            token.content: _Special(number, token.lstrip, token.rstrip)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        return {"_json": self._json, "_special": self._special}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._json = state["_json"]
        self._special = state["_special"]
        self._build()

    def _build(self) -> None:
        # `encode_special_tokens` makes special strings in the text plain text; it is not part of the JSON.
        self._first = _plain(Tokenizer.from_str(self._json))
        later = _without_first_space(self._json)
        self._later = self._first if later == self._json else _plain(Tokenizer.from_str(later))
        self._known_atoms: dict[str, list[tuple[str, _Special | None]]] = {}
        self._known_runs: dict[tuple[str, bool], list[int]] = {}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = (
            re.compile("(" + "|".join(re.escape(text) for text in longest_first) + ")") if longest_first else None
        )

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text."""
        found = self._special.get(text)
        return found.id if found else None

    def first_special(self, text: str) -> tuple[int, int] | None:
        """Character range of the first special token in template text."""
        match = self._pattern.search(text) if self._pattern else None
        return match.span() if match else None

    def encode(self, segments: Sequence[Segment], *, at_start: bool) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (n,) and trained bool (n,). `at_start`: nothing stands before the segments in the sequence."""
        line = self.cut(segments, at_start=at_start)
        self.tokenise([line])
        ids, trained = join(line)
        return np.array(ids, dtype=np.int32), np.array(trained, dtype=bool)

    def cut(self, segments: Sequence[Segment], *, at_start: bool, alone: bool = False) -> list[Run]:
        """The segments as runs between special tokens, which are runs with their id; to be tokenised and joined.

        alone: every run is tokenised as if nothing stood before it.
        """
        line: list[Run] = []
        pieces: list[tuple[str, bool]] = []
        eat_left = False  # the special token before swallows leading whitespace

        def close(eats_left: bool) -> None:
            nonlocal eat_left
            kept = _trimmed(pieces, start=eat_left, end=eats_left) if eat_left or eats_left else list(pieces)
            pieces.clear()
            eat_left = False
            if kept:
                line.append(Run(kept, first=alone or (at_start and not line)))

        for segment in segments:
            if pieces and segment.trained and not pieces[-1][1] and not (eat_left and _is_blank(pieces)):
                # A border where an answer begins: the ids before it must be those that a prompt ends with.
                close(False)
            for piece, special in self._atoms(segment):
                if special is None:
                    pieces.append((piece, segment.trained))
                else:
                    close(special.eats_left)
                    line.append(Run([("", segment.trained)], first=False, ids=[special.id], trained=[segment.trained]))
                    eat_left = special.eats_right
        close(False)
        return line

    def tokenise(self, lines: Iterable[Sequence[Run]]) -> None:
        """Give every run its ids; many lines at once take a third less time than one by one."""
        alike: dict[bool, list[Run]] = {True: [], False: []}
        for line in lines:
            for run in line:
                if run.ids is None and not self._known(run):
                    alike[run.first].append(run)
        for first, runs in alike.items():
            tokenizer = self._first if first else self._later
            texts = [run.text for run in runs]
            # The form without offsets takes a fifth less time; they are needed for runs that are trained in part only.
            for run, encoding in zip(runs, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                run.ids = ids = encoding.ids  # every look at it makes a new list
                run.trained = [run.pieces[0][1]] * len(ids)
                if len(run.text) <= _SHORT and len(self._known_runs) < _REMEMBERED:
                    self._known_runs[run.text, first] = ids

    def _known(self, run: Run) -> bool:
        """Whether the run's ids could be told at once: a short run seen before, or one that is trained in part."""
        if run.is_mixed:
            run.ids, run.trained = self._encode_mixed(run)
            return True
        ids = self._known_runs.get((run.text, run.first)) if len(run.text) <= _SHORT else None
        if ids is not None:
            run.ids, run.trained = ids, [run.pieces[0][1]] * len(ids)
        return ids is not None

    def _atoms(self, segment: Segment) -> list[tuple[str, _Special | None]]:
        if not segment.template or self._pattern is None:
            return [(segment.text, None)] if segment.text else []
        if segment.text not in self._known_atoms:
            parts = self._pattern.split(segment.text)
            atoms = [(part, self._special[part] if number % 2 else None) for number, part in enumerate(parts) if part]
            self._known_atoms[segment.text] = atoms
        return self._known_atoms[segment.text]

    def _encode_mixed(self, run: Run) -> tuple[Sequence[int], list[bool]]:
        """A token is trained if any of its characters is."""
        per_character = np.repeat([flag for _, flag in run.pieces], [len(piece) for piece, _ in run.pieces])
        encoding = (self._first if run.first else self._later).encode(run.text, add_special_tokens=False)
        # A token without characters (a prepended space) goes with the character that it stands before.
        spans = [(start, max(end, start + 1)) for start, end in encoding.offsets]
        return encoding.ids, [bool(per_character[start:end].any()) for start, end in spans]


def join(line: Sequence[Run]) -> tuple[list[int], list[bool]]:
    """The ids of tokenised runs, and which of them are trained."""
    ids: list[int] = []
    trained: list[bool] = []
    for run in line:
        ids += run.ids or ()
        trained += run.trained
    return ids, trained


def _is_blank(pieces: Sequence[tuple[str, bool]]) -> bool:
    return not any(text.strip() for text, _ in pieces)


def _trimmed(run: list[tuple[str, bool]], *, start: bool, end: bool) -> list[tuple[str, bool]]:
    """The run without the whitespace that neighbouring special tokens swallow."""
    pieces = list(run)
    while start and pieces:
        kept = pieces[0][0].lstrip()
        pieces[:1] = [(kept, pieces[0][1])] if kept else []
        start = not kept
    while end and pieces:
        kept = pieces[-1][0].rstrip()
        pieces[-1:] = [(kept, pieces[-1][1])] if kept else []
        end = not kept
    return pieces


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_first_space(text: str) -> str:
    """The tokenizer's JSON for a run that does not begin the sequence.

    SentencePiece-type tokenizers with `prepend_scheme: first` put a space before the very first word only; a run behind
    a special token must not get one.
    """
    if '"first"' not in text:
        return text
    description = json.loads(text)
    for part in _walk(description.get("pre_tokenizer")):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return json.dumps(description)


def _walk(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [part, *(inner for child in part.get("pretokenizers", []) for inner in _walk(child))]
