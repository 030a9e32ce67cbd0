"""Sample -> Encoded: ids and labels laid down side by side, segment by segment.

There is no search for token patterns: what is trained is known when it is laid down. Pictures are counted from the size
in their header; no pixel is decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.data import media
from vlmtune.data.sample import IGNORED, Encoded, Image, Laid, MediaPlan, MediaRef, Message, Part, Sample, Span, Text
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.models.family import ChatFormat, OpenedFolder
from vlmtune.models.text import Segment

Piece = Segment | int  # text, or the index of a picture of the sample


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


def lay(messages: Sequence[Message], chat: ChatFormat, *, prompt: bool) -> list[Piece]:
    """The conversation as text segments and picture indices, in the order of the sequence."""
    pieces: list[Piece] = []
    pictures = 0
    opening: Sequence[Piece] = [_fixed(chat.opening)]
    for number, message in enumerate(messages):
        if message.role == "system":
            if chat.system_opening is None:
                raise DataError(
                    "the row has a system turn, but the model's chat template has no place for one",
                    remedy="Remove the system turns, or put their text into the first question.",
                )
            before, after = chat.system_opening
            opening = [_fixed(before), Segment(message.text, trained=False, template=False), _fixed(after)]
        elif message.role == "user":
            follows_answer = number > 0 and messages[number - 1].role == "assistant"
            pieces += [_fixed(chat.again[len(chat.stop) :])] if follows_answer else opening
            user, pictures = _user(message.parts, chat, pictures)
            pieces += user
        else:
            answer = message.text.strip() if chat.strips else message.text
            pieces += [
                _fixed(chat.bridge),
                Segment(chat.answer_lead, trained=True, template=True),
                Segment(answer, trained=True, template=False),
                Segment(chat.stop, trained=True, template=True),
            ]
    pieces.append(_fixed(chat.bridge if prompt else chat.close[len(chat.stop) :]))
    return pieces


def _fixed(text: str) -> Segment:
    return Segment(text, trained=False, template=True)


def _user(parts: Sequence[Part], chat: ChatFormat, pictures: int) -> tuple[list[Piece], int]:
    """A user content and the running number of pictures."""
    texts_and_pictures = _fold(parts) if chat.fold_newlines else [_plain_part(part) for part in parts]
    if chat.strips:
        texts_and_pictures = [part.strip() if isinstance(part, str) else part for part in texts_and_pictures]
    if chat.images_first:
        texts = [part for part in texts_and_pictures if isinstance(part, str) and part]
        num_pictures = sum(part is None for part in texts_and_pictures)
        texts_and_pictures = [*[None] * num_pictures, *([chat.text_joint.join(texts)] if texts else [])]
    pieces: list[Piece] = []
    for part in texts_and_pictures:
        if part is None:
            pieces += [_fixed(chat.image[0]), pictures, _fixed(chat.image[1])]
            pictures += 1
        else:
            if not pieces:
                pieces.append(_fixed(chat.user_lead))
            pieces.append(Segment(part, trained=False, template=False))
    return pieces, pictures


def _plain_part(part: Part) -> str | None:
    """Text, or None for a picture."""
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Image):
        return None
    raise DataError(
        f"the row holds a {type(part).__name__} part, which this version does not read",
        expected="text and images",
    )


def _fold(parts: Sequence[Part]) -> list[str | None]:
    """The parts without the one newline that belongs to an `<image>` mark: the template puts its own there, or none."""
    folded = [_plain_part(part) for part in parts]
    for index, part in enumerate(folded):
        if part is None:
            after = folded[index + 1] if index + 1 < len(folded) else None
            before = folded[index - 1] if index else None
            if after is not None and after.startswith("\n"):
                folded[index + 1] = after[1:]
            elif index + 1 == len(folded) and before is not None and before.endswith("\n"):
                folded[index - 1] = before[:-1]
    return [part for part in folded if part is None or part]


def _encode(sample: Sample, opened: OpenedFolder, *, prompt: bool) -> Encoded:
    laid = lay_row(sample, opened, prompt=prompt)
    return build(laid, opened, origin=sample.origin)


def lay_row(sample: Sample, opened: OpenedFolder, *, prompt: bool = False) -> Laid:
    """The row before the ids of its media are put in: all that a prepared row keeps.

    Raises:
        DataError: as `encode`.
    """
    try:
        media_plans = plan_media(sample, opened)
        pieces = lay(sample.messages, opened.chat, prompt=prompt)
        return _lay_ids(pieces, media_plans, opened)
    except DataError as error:
        if error.where:
            raise
        raise with_origin(error, sample.origin) from error


def plan_media(sample: Sample, opened: OpenedFolder) -> tuple[tuple[MediaRef, MediaPlan], ...]:
    """What each picture of the row becomes, from the headers."""
    refs = [image.ref for image in sample.images]
    sizes = [media.size(ref, opened.media) for ref in refs]
    return tuple(zip(refs, opened.family.plan(sizes, opened.spec), strict=True))


def _lay_ids(
    pieces: Sequence[Piece], media_plans: tuple[tuple[MediaRef, MediaPlan], ...], opened: OpenedFolder
) -> Laid:
    ids = [np.array(opened.chat.prefix_ids, dtype=np.int32)]
    trained = [np.zeros(len(opened.chat.prefix_ids), dtype=bool)]
    length = len(opened.chat.prefix_ids)
    places: list[int] = []
    for group in _groups(pieces):
        if isinstance(group, int):
            places.append(length)
        else:
            new_ids, new_trained = opened.text.encode(group, at_start=length == 0 and not places)
            ids.append(new_ids)
            trained.append(new_trained)
            length += len(new_ids)
    return Laid(ids=np.concatenate(ids), trained=np.concatenate(trained), places=tuple(places), media=media_plans)


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
        spans += [Span(length + start, size, "image", index) for start, size in _runs(slots)]
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
