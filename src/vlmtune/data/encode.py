"""Sample -> Encoded: ids and labels laid down side by side, segment by segment.

There is no search for token patterns: what is trained is known when it is laid down. Pictures are counted from the size
in their header; no pixel is decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmtune.data.boxes import write_box
from vlmtune.data.lay import Piece, lay
from vlmtune.data.media import pictures
from vlmtune.data.media.video import Film, film
from vlmtune.data.sample import IGNORED, Encoded, Image, Laid, MediaRef, Planned, Sample, Size, Span, Video
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
    """The media of the row, and its text and places in their order."""
    try:
        found = _plan(sample, opened)
        planned = [plan for _, plan in found.media if not plan.is_frame]
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
    return found.media, pieces


def _finish(draft: _Draft, opened: OpenedFolder) -> Laid:
    chat = opened.chat
    alone = not draft.media and chat.text_prefix_ids is not None
    ids = list((chat.text_prefix_ids or ()) if alone else chat.prefix_ids)
    trained = [False] * len(ids)
    places: list[int] = []
    for group in draft.groups:
        if isinstance(group, int):
            places.append(len(ids))
        else:
            new_ids, new_trained = join(group)
            if new_ids and places and chat.repeats_prefix:
                ids += chat.prefix_ids
                trained += [False] * len(chat.prefix_ids)
            ids += new_ids
            trained += new_trained
    return Laid(ids=np.array(ids, np.int32), trained=np.array(trained, bool), places=tuple(places), media=draft.media)


@dataclass(frozen=True, slots=True)
class _RowMedia:
    """media: every picture and every chosen frame in the order of the row. films: its videos."""

    media: Planned
    films: tuple[Film, ...]


def look_at(sample: Sample, opened: OpenedFolder) -> Planned:
    """What `plan_media` gives, of a row that `lay_row` would take: everything but its ids is looked at.

    Raises:
        DataError: as `lay_row`.
    """
    return _pieces(sample, opened, prompt=False)[0]


def plan_media(sample: Sample, opened: OpenedFolder) -> Planned:
    """What each picture of the row becomes, chosen frames of videos included, from the headers."""
    return _plan(sample, opened).media


def _plan(sample: Sample, opened: OpenedFolder) -> _RowMedia:
    refs: list[MediaRef] = []
    sizes: list[Size] = []
    films: list[Film] = []
    for part in (part for message in sample.messages for part in message.parts):
        if isinstance(part, Image):
            refs.append(part.ref)
            sizes.append(pictures.size(part.ref, opened.media))
        elif isinstance(part, Video):
            films.append(film(part.ref, opened.media))
            refs += films[-1].frames
            sizes += films[-1].sizes
    plans = opened.family.plan(sizes, opened.spec, [ref.frame for ref in refs])
    return _RowMedia(tuple(zip(refs, plans, strict=True)), tuple(films))


def build(laid: Laid, opened: OpenedFolder, *, origin: str) -> Encoded:
    """The whole row: the ids of each medium at its place among the ids of the text."""
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    spans: list[Span] = []
    done = length = 0
    for index, (place, (_, plan)) in enumerate(zip(laid.places, laid.media, strict=True)):
        new_ids, slots = opened.family.span_ids(plan, opened.spec)
        ids += [laid.ids[done:place], new_ids]
        trained += [laid.trained[done:place], np.zeros(len(new_ids), dtype=bool)]
        length += place - done
        kind: Literal["image", "video"] = "video" if plan.is_frame else "image"
        spans += [Span(length + start, size, kind, index) for start, size in _runs(slots)]
        length += len(new_ids)
        done = place
    input_ids = np.concatenate([*ids, laid.ids[done:]])
    labels = np.where(np.concatenate([*trained, laid.trained[done:]]), input_ids, IGNORED).astype(np.int32)
    return Encoded(
        input_ids=input_ids, labels=labels, spans=tuple(spans), media=laid.media, origin=origin, spec=opened.spec
    )


def _groups(pieces: Sequence[Piece]) -> list[list[Segment] | int]:
    """Neighbouring text segments together; pictures alone."""
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
