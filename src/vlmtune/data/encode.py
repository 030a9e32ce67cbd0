"""Sample -> Encoded: ids and labels laid down side by side, segment by segment.

There is no search for token patterns: what is trained is known when it is laid down. Pictures are counted from the size
in their header; no pixel is decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlmtune.data.boxes import write_box
from vlmtune.data.lay import Piece, lay
from vlmtune.data.media import embedding, pictures
from vlmtune.data.media.video import Film, film
from vlmtune.data.sample import (
    IGNORED,
    Encoded,
    Image,
    Laid,
    MediaPlan,
    MediaRef,
    Planned,
    PseudoText,
    Sample,
    Size,
    Span,
    Video,
    pictures_of,
)
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.text import Run, Segment, join


def encode(sample: Sample, opened: OpenedFolder) -> Encoded:
    """A training row: every answer and the stop behind it is trained, everything else is context.

    Raises:
        DataError: a picture that cannot be read, a turn that the chat format has no place for; with the row's origin.
    """
    return _encode(sample, opened, prompt=False)


def encode_prompt(sample: Sample, opened: OpenedFolder) -> Encoded:
    """The same ids as in training up to the point where the next answer begins; the last turn is the user's."""
    if not sample.messages or sample.messages[-1].role != "user":
        raise DataError("the last turn is not the user's, so there is nothing to answer", where=sample.origin)
    return _encode(sample, opened, prompt=True)


def _encode(sample: Sample, opened: OpenedFolder, *, prompt: bool) -> Encoded:
    laid = lay_row(sample, opened, prompt=prompt)
    return build(laid, opened, origin=sample.origin)


def lay_row(sample: Sample, opened: OpenedFolder, *, prompt: bool = False) -> Laid:
    """The row before the ids of its media are put in: all that a prepared row keeps.

    Raises:
        DataError: as `encode`.
    """
    draft = _draft(sample, opened, prompt=prompt)
    opened.text.tokenise(draft.lines)
    return _finish(draft, opened)


def lay_rows(samples: Sequence[Sample], opened: OpenedFolder) -> list[Laid | DataError]:
    """`lay_row` of many samples, tokenised together, which takes a third less time; a bad row gives its error."""
    drafts: list[_Draft | DataError] = []
    for sample in samples:
        try:
            drafts.append(_draft(sample, opened, prompt=False))
        except DataError as error:
            drafts.append(error)
    opened.text.tokenise(line for draft in drafts if isinstance(draft, _Draft) for line in draft.lines)
    return [draft if isinstance(draft, DataError) else _finish(draft, opened) for draft in drafts]


@dataclass(frozen=True, slots=True)
class _Draft:
    """groups: text cut into runs, and indices of media, in the order of the sequence."""

    groups: list[list[Run] | int]
    media: Planned

    @property
    def lines(self) -> list[list[Run]]:
        return [group for group in self.groups if not isinstance(group, int)]


def _draft(sample: Sample, opened: OpenedFolder, *, prompt: bool) -> _Draft:
    media, pieces = _pieces(sample, opened, prompt=prompt)
    groups: list[list[Run] | int] = []
    for group in _groups(pieces):
        at_start = not groups and not opened.chat.prefix_ids
        alone = opened.chat.runs_alone
        groups.append(group if isinstance(group, int) else opened.text.cut(group, at_start=at_start, alone=alone))
    return _Draft(groups, media)


def _pieces(sample: Sample, opened: OpenedFolder, *, prompt: bool) -> tuple[Planned, list[Piece]]:
    """The media of the row in the order of the sequence, and its text and places in their order."""
    try:
        found = _plan(sample, opened)
        planned = [plan for _, plan in pictures_of(found.media) if not plan.is_frame]
        pieces = lay(
            sample.messages,
            opened.chat,
            prompt=prompt,
            films=found.films,
            write_box=lambda box: write_box(box, planned, opened.boxes),
        )
    except DataError as error:
        if error.where:
            raise
        raise with_origin(error, sample.origin) from error
    # Templates that put pictures first move them past pseudo-text.
    order = [piece for piece in pieces if isinstance(piece, int)]
    numbers = iter(range(len(order)))
    renumbered = [next(numbers) if isinstance(piece, int) else piece for piece in pieces]
    return tuple(found.media[i] for i in order), renumbered


def _finish(draft: _Draft, opened: OpenedFolder) -> Laid:
    chat = opened.chat
    alone = not pictures_of(draft.media) and chat.text_prefix_ids is not None
    ids = list((chat.text_prefix_ids or ()) if alone else chat.prefix_ids)
    trained = [False] * len(ids)
    places: list[int] = []
    behind_picture = False
    for group in draft.groups:
        new_ids, new_trained = join([] if isinstance(group, int) else group)
        is_picture = isinstance(group, int) and not draft.media[group][1].is_pseudo_text
        if behind_picture and chat.repeats_prefix and not is_picture and (new_ids or isinstance(group, int)):
            ids += chat.prefix_ids
            trained += [False] * len(chat.prefix_ids)
            behind_picture = False
        behind_picture |= is_picture
        if isinstance(group, int):
            places.append(len(ids))
        ids += new_ids
        trained += new_trained
    return Laid(ids=np.array(ids, np.int32), trained=np.array(trained, bool), places=tuple(places), media=draft.media)


@dataclass(frozen=True, slots=True)
class _RowMedia:
    """media: pictures, chosen frames and pseudo-text in the order of the row. films: its videos."""

    media: Planned
    films: tuple[Film, ...]


def look_at(sample: Sample, opened: OpenedFolder) -> Planned:
    """What each medium of a row that `lay_row` would take becomes, from the headers, in the order of the sequence.

    Chosen frames of videos are included; everything but the ids of the row is looked at.

    Raises:
        DataError: as `lay_row`.
    """
    return _pieces(sample, opened, prompt=False)[0]


def _plan(sample: Sample, opened: OpenedFolder) -> _RowMedia:
    refs: list[MediaRef] = []
    sizes: list[Size] = []
    films: list[Film] = []
    among: list[tuple[int, tuple[MediaRef, MediaPlan]]] = []  # pseudo-text, each with the pictures before it
    for part in (part for message in sample.messages for part in message.parts):
        if isinstance(part, Image):
            refs.append(part.ref)
            sizes.append(pictures.size(part.ref, opened.media))
        elif isinstance(part, Video):
            films.append(film(part.ref, opened.media))
            refs += films[-1].frames
            sizes += films[-1].sizes
        elif isinstance(part, PseudoText):
            among.append((len(refs), (part.ref, _plan_pseudo_text(part, opened))))
    plans = opened.family.plan(sizes, opened.spec, [ref.frame for ref in refs])
    media = list(zip(refs, plans, strict=True))
    for place, medium in reversed(among):
        media.insert(place, medium)
    return _RowMedia(tuple(media), tuple(films))


def pseudo_text_size(ref: MediaRef, opened: OpenedFolder) -> Size:
    """(d, n) of a file of pseudo-text for this model, from the header.

    Raises:
        DataError: as `embedding.shape`; rows of another length than the model's.
    """
    length, number = embedding.shape(ref)
    wanted = int(opened.config.get_text_config().hidden_size)
    if length != wanted:
        raise DataError(
            f"the embedding {embedding.name_of(ref)} has rows of {length:,} numbers",
            expected=f"{wanted:,}, as the input of this model's language model has",
            remedy="Make it again with this model (`vlmtune embed`).",
        )
    return length, number


def _plan_pseudo_text(part: PseudoText, opened: OpenedFolder) -> MediaPlan:
    """
    Raises:
        DataError: as `pseudo_text_size`; another number of rows than was marked.
    """
    size = pseudo_text_size(part.ref, opened)
    number = size[1]
    if part.run not in (None, number):
        raise DataError(
            f"the text holds a place of {part.run:,} reserved tokens, and the embedding {embedding.name_of(part.ref)} "
            f"has {number:,} rows",
            expected="one token for each row",
            remedy="Correct the number, or write <embedding> there, which stands for all rows.",
        )
    return MediaPlan(size=size, num_tokens=number, num_tiles=0, layout=(), is_pseudo_text=True)


RESERVED = "[UNUSED_TOKEN_140]"
"""What stands at the places of pseudo-text where the tokenizer has it, as in CalliReader's data."""


def _neutral_id(opened: OpenedFolder) -> int:
    """An id of the vocabulary for places of pseudo-text; it is never looked at, but must not be one of pictures."""
    (plan,) = opened.family.plan([(32, 32)], opened.spec, [0])
    ids, slots = opened.family.span_ids(plan, opened.spec)
    tokenizer = opened.tokenizer
    reserved: Any = tokenizer.convert_tokens_to_ids(RESERVED)  # the unknown token, or None, where there is none
    for candidate in (reserved, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate not in ids[slots]:
            return int(candidate)
    return next(number for number in range(len(ids) + 1) if number not in ids)


def build(laid: Laid, opened: OpenedFolder, *, origin: str) -> Encoded:
    """The whole row: the ids of each medium at its place among the ids of the text."""
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    spans: list[Span] = []
    done = length = 0
    for index, (place, (_, plan)) in enumerate(zip(laid.places, laid.media, strict=True)):
        new_ids, slots = _ids_of(plan, opened)
        ids += [laid.ids[done:place], new_ids]
        trained += [laid.trained[done:place], np.zeros(len(new_ids), dtype=bool)]
        length += place - done
        kind: Literal["image", "video", "pseudo_text"] = "video" if plan.is_frame else "image"
        kind = "pseudo_text" if plan.is_pseudo_text else kind
        spans += [Span(length + start, size, kind, index) for start, size in _runs(slots)]
        length += len(new_ids)
        done = place
    input_ids = np.concatenate([*ids, laid.ids[done:]])
    labels = np.where(np.concatenate([*trained, laid.trained[done:]]), input_ids, IGNORED).astype(np.int32)
    return Encoded(
        input_ids=input_ids, labels=labels, spans=tuple(spans), media=laid.media, origin=origin, spec=opened.spec
    )


def _ids_of(plan: MediaPlan, opened: OpenedFolder) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a medium, int32 (n,), and where features or rows go among them, bool (n,)."""
    if plan.is_pseudo_text:
        return np.full(plan.num_tokens, _neutral_id(opened), np.int32), np.ones(plan.num_tokens, bool)
    return opened.family.span_ids(plan, opened.spec)


def _groups(pieces: Sequence[Piece]) -> list[list[Segment] | int]:
    """Neighbouring text segments together; media alone."""
    groups: list[list[Segment] | int] = []
    for piece in pieces:
        if isinstance(piece, int):
            groups.append(piece)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def with_origin(error: VlmtuneError, origin: str) -> DataError:
    """The same complaint about a row."""
    return DataError(error.found, where=origin, expected=error.expected, remedy=error.remedy)
