"""Encoded rows as a person reads them: what is trained stands out, a picture is one tag, nothing is left out.

Frames of one video that stand side by side share a tag; where the model's format puts text between them, each has its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Literal

import numpy as np
from rich.text import Text

from vlmtune.config.schema import RunConfig
from vlmtune.data.media import embedding
from vlmtune.data.plan.mixture import Mixture, make_mixture, mixing_text
from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import IGNORED, Encoded, MediaRef, Sample, pictures_of, pseudo_texts_of
from vlmtune.models.family import OpenedFolder

STYLES: dict[Kind, str] = {"trained": "bold green", "masked": "dim", "image": "cyan"}

Kind = Literal["trained", "masked", "image"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring positions of the sequence that are shown alike. media: which of the row's media they belong to."""

    kind: Kind
    text: str
    start: int
    num_tokens: int
    media: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Film:
    """The frames of one video among the media of a row: numbers of those media, and of the video itself (from 1)."""

    number: int
    media: tuple[int, ...]


def runs(encoded: Encoded, opened: OpenedFolder) -> list[Run]:
    """The whole sequence: trained and masked text with its special tokens, and one tag per picture or film."""
    kinds = np.where(encoded.labels != IGNORED, 1, 0)
    groups = _groups(encoded)
    for start, end, media in groups:
        kinds[start:end] = 2 + media[0]
    shown = {media[0]: media for _, _, media in groups}
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    found = []
    for start, end in pairwise(borders):
        kind = int(kinds[start])
        if kind >= 2:
            media = shown[kind - 2]
            found.append(Run("image", _tag(encoded, media), start, end - start, media))
        else:
            text = decode(opened, encoded.input_ids[start:end], is_first=start == 0)
            found.append(Run("trained" if kind else "masked", text, start, end - start))
    return found


def films(encoded: Encoded) -> list[Film]:
    """Which media are frames of which video; the same video twice in a row counts twice."""
    found: list[list[int]] = []
    last: MediaRef | None = None
    for index, (ref, _) in enumerate(encoded.media):
        if ref.frame is not None:
            goes_on = last is not None and last.frame is not None and ref.frame > last.frame
            if goes_on and last is not None and replace(last, frame=ref.frame) == ref:
                found[-1].append(index)
            else:
                found.append([index])
        last = ref
    return [Film(number, tuple(media)) for number, media in enumerate(found, 1)]


def row_text(sample: Sample, encoded: Encoded, opened: OpenedFolder, *, brackets: bool = False) -> Text:
    """One row: a line of counts, then the coloured sequence; `brackets` enclose what is trained, without colours."""
    num, trained = encoded.num_tokens, encoded.num_trained
    head = f"  {num:,} tokens, {trained:,} trained ({trained / num:.0%})"
    head += "".join(f", {words}" for words in media_counts(encoded))
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


def media_counts(encoded: Encoded) -> list[str]:
    """`2 images`, `1 video of 8 frames`, `1 embedding of 6 rows`."""
    videos = films(encoded)
    frames = sum(len(film.media) for film in videos)
    images = len(pictures_of(encoded.media)) - frames
    embeddings = pseudo_texts_of(encoded.media)
    words = [f"{images} image{'' if images == 1 else 's'}"] if images else []
    if videos:
        of = f"{frames} frame{'' if frames == 1 else 's'}"
        words.append(f"{len(videos)} video{'' if len(videos) == 1 else 's'} of {of}")
    if embeddings:
        number = sum(plan.num_tokens for _, plan in embeddings)
        of = f"{number:,} row{'' if number == 1 else 's'}"
        words.append(f"{len(embeddings)} embedding{'' if len(embeddings) == 1 else 's'} of {of}")
    return words


def _groups(encoded: Encoded) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, end, media) of each tag: a picture from its first placeholder to its last, separators included."""
    film_of = {index: film.number for film in films(encoded) for index in film.media}
    groups: list[tuple[int, int, tuple[int, ...]]] = []
    for index in sorted({span.index for span in encoded.spans}):
        own = [span for span in encoded.spans if span.index == index]
        start, end = min(span.start for span in own), max(span.start + span.length for span in own)
        before = groups[-1] if groups else None
        if before and before[1] == start and film_of.get(index) == film_of.get(before[2][-1], -1):
            groups[-1] = (before[0], end, (*before[2], index))
        else:
            groups.append((start, end, (index,)))
    return groups


def _tag(encoded: Encoded, media: tuple[int, ...]) -> str:
    ref, plan = encoded.media[media[0]]
    tokens = sum(encoded.media[index][1].num_tokens for index in media)
    width, height = plan.size
    if plan.is_pseudo_text:
        return f"[embedding {embedding.name_of(ref)}: {tokens:,} token{'' if tokens == 1 else 's'}]"
    if ref.frame is None:
        tiles = f"{plan.num_tiles} tile{'' if plan.num_tiles == 1 else 's'}"
        return f"[image {width}×{height} → {tiles}, {tokens:,} tokens]"
    film = next(film for film in films(encoded) if media[0] in film.media)
    name = f"video {film.number}"
    if len(media) > 1:
        last = encoded.media[media[-1]][0].frame
        return f"[{name}: {len(media)} frames of {width}×{height}, {ref.frame} … {last}, {tokens:,} tokens]"
    return f"[{name}: frame {ref.frame}, {width}×{height}, {tokens:,} tokens]"


def decode(opened: OpenedFolder, ids: np.ndarray, *, is_first: bool) -> str:
    """The text of neighbouring ids, special tokens written out."""
    tokenizer = opened.tokenizer
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    first = str(tokenizer.convert_ids_to_tokens(int(ids[0])))
    # SentencePiece decoders take the space in front of a text for their own mark.
    return f" {text}" if not is_first and first.startswith("▁") and not text.startswith(" ") else text
