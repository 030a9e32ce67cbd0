"""Encoded rows as a person reads them: what is trained stands out, a picture is one tag, nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Literal

import numpy as np
from rich.text import Text

from vlmtune.config.schema import RunConfig
from vlmtune.data.mixture import Mixture, make_mixture, mixing_text
from vlmtune.data.sample import IGNORED, Encoded, Sample
from vlmtune.data.sources import Corpus
from vlmtune.models.family import OpenedFolder

STYLES: dict[Kind, str] = {"trained": "bold green", "masked": "dim", "image": "cyan"}

Kind = Literal["trained", "masked", "image"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring positions of the sequence that are shown alike."""

    kind: Kind
    text: str
    num_tokens: int


def runs(encoded: Encoded, opened: OpenedFolder) -> list[Run]:
    """The whole sequence: trained and masked text with its special tokens, and one tag per picture."""
    kinds = np.where(encoded.labels != IGNORED, 1, 0)
    for start, end, index in _pictures(encoded):
        kinds[start:end] = 2 + index
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    found = []
    for start, end in pairwise(borders):
        kind = int(kinds[start])
        if kind >= 2:
            found.append(Run("image", _tag(encoded, kind - 2), end - start))
        else:
            text = _decode(opened, encoded.input_ids[start:end], is_first=start == 0)
            found.append(Run("trained" if kind else "masked", text, end - start))
    return found


def row_text(sample: Sample, encoded: Encoded, opened: OpenedFolder, *, brackets: bool = False) -> Text:
    """One row: a line of counts, then the coloured sequence; `brackets` enclose what is trained, without colours."""
    num, trained = encoded.num_tokens, encoded.num_trained
    images = len(encoded.media)
    head = f"  {num:,} tokens, {trained:,} trained ({trained / num:.0%})"
    head += f", {images} image{'' if images == 1 else 's'}" if images else ""
    text = Text()
    text.append(sample.origin, "bold")
    text.append(head + (f", id {sample.id}" if sample.id else "") + "\n")
    for run in runs(encoded, opened):
        shown = run.text.replace("\n", "↵\n")
        text.append(_bracketed(shown) if brackets and run.kind == "trained" else shown, STYLES[run.kind])
    return text


def legend(*, brackets: bool = False) -> Text:
    trained = _bracketed("trained") if brackets else "trained"
    return Text.assemble(
        (trained, STYLES["trained"]), "  ", ("not trained", STYLES["masked"]), "  ", ("[image]", STYLES["image"])
    )


def _bracketed(text: str) -> str:
    return f"⟦{text}⟧"


def first_rows(corpus: Corpus, config: RunConfig, count: int) -> list[int]:
    """The rows that training takes first, as long as none of them is bad."""
    return _mixture(corpus, config).epoch(0)[:count].tolist()


def epoch_lines(corpus: Corpus, config: RunConfig) -> Iterator[str]:
    """What an epoch holds, from the numbers of rows alone."""
    mixture = _mixture(corpus, config)
    for source, count in zip(corpus.sources, mixture.counts, strict=True):
        yield f"{source.name}: {len(source):,} rows, {mixing_text(source.options)} = {count:,} in an epoch"
    if config.train.global_batch_size is None:
        steps = f"in steps of {config.train.global_batch_tokens:,} tokens"
    else:
        number = ceil(mixture.epoch_size / config.train.global_batch_size)
        steps = f"in {number:,} step{'' if number == 1 else 's'} of {config.train.global_batch_size}"
    yield f"An epoch: {mixture.epoch_size:,} rows {steps} (`vlmtune check` reads all of them)."


def _mixture(corpus: Corpus, config: RunConfig) -> Mixture:
    every = np.ones(len(corpus), bool)
    options = [source.options for source in corpus.sources]
    return make_mixture(every, corpus.source_sizes, options, corpus.names, config.train.seed)


def _pictures(encoded: Encoded) -> Iterator[tuple[int, int, int]]:
    """(start, end, index) of each picture, from its first placeholder to its last, separators between them included."""
    for index in sorted({span.index for span in encoded.spans}):
        own = [span for span in encoded.spans if span.index == index]
        yield min(span.start for span in own), max(span.start + span.length for span in own), index


def _tag(encoded: Encoded, index: int) -> str:
    plan = encoded.media[index][1]
    tiles = f"{plan.num_tiles} tile{'' if plan.num_tiles == 1 else 's'}"
    return f"[image {plan.size[0]}×{plan.size[1]} → {tiles}, {plan.num_tokens:,} tokens]"


def _decode(opened: OpenedFolder, ids: np.ndarray, *, is_first: bool) -> str:
    tokenizer = opened.tokenizer
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    first = str(tokenizer.convert_ids_to_tokens(int(ids[0])))
    # SentencePiece decoders take the space in front of a text for their own mark.
    return f" {text}" if not is_first and first.startswith("▁") and not text.startswith(" ") else text
