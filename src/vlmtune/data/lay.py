"""A conversation as text segments and places of media, in the order of the sequence, after a chat format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from vlmtune.data.media.video import Film
from vlmtune.data.sample import Box, Image, Message, Part, PseudoText, Text, Video
from vlmtune.errors import DataError
from vlmtune.models.family import ChatFormat, FrameFormat
from vlmtune.models.text import Segment

Piece = Segment | int
"""Text, or the number of a medium of the row: a picture, a frame of a video, or pseudo-text."""


@dataclass(frozen=True, slots=True)
class _Place(Segment):
    """Where pseudo-text stands: among words, as words do, whatever a template does with pictures."""

    number: int


@dataclass(slots=True)
class _Words:
    """Text, boxes and places of pseudo-text without a picture between them."""

    segments: list[Segment]


@dataclass(slots=True)
class _Medium:
    """A picture, or the frames of a video, with what the chat format puts around them."""

    pieces: list[Piece]
    begins_with_text: bool = False


def lay(
    messages: Sequence[Message],
    chat: ChatFormat,
    *,
    prompt: bool,
    films: Sequence[Film] = (),
    write_box: Callable[[Box], str] = str,
) -> list[Piece]:
    """The whole conversation.

    Args:
        prompt: end where the next answer begins.
        films: what is shown of each video, in the order of the row.
        write_box: a box as template text.

    Raises:
        DataError: a turn or a part that the chat format has no place for.
    """
    writer = _Writer(chat, films, write_box)
    pieces: list[Piece] = []
    opening: Sequence[Piece] = [_fixed(chat.opening)]
    for number, message in enumerate(messages):
        if message.role == "system":
            if chat.system_opening is None:
                raise DataError(
                    "the row has a system turn, but the model's chat template has no place for one",
                    remedy="Remove the system turns, or put their text into the first question.",
                )
            before, after = chat.system_opening
            words = writer.words(message)
            opening = [_fixed(before), *words, _fixed(after)]
            if not words and chat.bare_opening is not None:
                opening = [_fixed(chat.bare_opening)]
        elif message.role == "user":
            follows_answer = number > 0 and messages[number - 1].role == "assistant"
            pieces += [_fixed(chat.again[len(chat.stop) :])] if follows_answer else opening
            pieces += writer.user(message.parts)
        else:
            pieces += [
                _fixed(chat.bridge),
                Segment(chat.answer_lead, trained=True, template=True),
                *(
                    replace(segment, trained=True)
                    for segment in writer.words(message, strips=chat.strips or chat.strips_ends)
                ),
                Segment(chat.stop, trained=True, template=True),
            ]
    if prompt:
        return [*pieces, _fixed(chat.bridge)]
    return [*pieces, Segment(chat.close[len(chat.stop) :], trained=chat.trains_close, template=True)]


def _piece(segment: Segment) -> Piece:
    return segment.number if isinstance(segment, _Place) else segment


def _fixed(text: str) -> Segment:
    return Segment(text, trained=False, template=True)


class _Writer:
    """Contents of turns; counts the media."""

    def __init__(self, chat: ChatFormat, films: Sequence[Film], write_box: Callable[[Box], str]) -> None:
        self._chat = chat
        self._films = iter(films)
        self._write_box = write_box
        self._num_media = 0

    def words(self, message: Message, *, strips: bool = False) -> list[Segment]:
        """A content without media."""
        segments: list[Segment] = []
        for item in self._items(message.parts):
            if isinstance(item, _Medium):
                raise DataError(f"a turn of the {message.role} holds a picture", expected="pictures in user turns")
            if any(isinstance(segment, _Place) for segment in item.segments):
                raise DataError(f"a turn of the {message.role} holds pseudo-text", expected="pseudo-text in user turns")
            segments += item.segments
        return _strip(segments) if strips else segments

    def user(self, parts: Sequence[Part]) -> list[Piece]:
        chat = self._chat
        items = list(self._items(parts))
        if chat.fold_newlines:
            _fold(items)
        if chat.strips:
            for item in items:
                if isinstance(item, _Words):
                    item.segments = _strip(item.segments)
        items = [item for item in items if not isinstance(item, _Words) or item.segments]
        if chat.images_first:
            items = _media_first(items, chat.text_joint)
        if chat.strips_ends:
            items = _strip_ends(items)
        if chat.block:
            items = _in_block(items, chat.block, chat.image_joint)
        pieces: list[Piece] = []
        for item in items:
            if not pieces and (isinstance(item, _Words) or item.begins_with_text):
                pieces.append(_fixed(chat.user_lead))
            pieces += map(_piece, item.segments) if isinstance(item, _Words) else item.pieces
        return pieces

    def _items(self, parts: Sequence[Part]) -> Iterator[_Words | _Medium]:
        """Boxes and pseudo-text stick to the text beside them; two texts side by side stay two, as in templates."""
        words: list[Segment] = []
        for part in parts:
            sticks = isinstance(part, Box | PseudoText) or (
                isinstance(part, Text) and bool(words) and words[-1].template
            )
            if words and not sticks:
                yield _Words(words)
                words = []
            if isinstance(part, Text):
                words += [Segment(part.text, trained=False, template=False)] if part.text else []
            elif isinstance(part, Box):
                words.append(_fixed(self._write_box(part)))
            elif isinstance(part, Image):
                yield _Medium([_fixed(self._chat.image[0]), self._next(), _fixed(self._chat.image[1])])
            elif isinstance(part, Video):
                yield self._frames(next(self._films))
            else:
                words.append(_Place("", trained=False, template=True, number=self._next()))
        if words:
            yield _Words(words)

    def _frames(self, film: Film) -> _Medium:
        around = self._chat.frames
        if around is None:
            before, after = map(_fixed, self._chat.image)
            return _Medium([piece for _ in film.frames for piece in (before, self._next(), after)])
        pieces: list[Piece] = [_fixed(_opening(around, film))]
        for i in range(len(film.frames)):
            time = _minutes(film.times[i]) if film.times else ""
            lead = around.before.format(number=i + 1, time=time)
            pieces += [_fixed((around.joint if i else "") + lead), self._next()]
        return _Medium([*pieces, _fixed(around.close)], begins_with_text=bool(around.opening or around.before))

    def _next(self) -> int:
        self._num_media += 1
        return self._num_media - 1


def _opening(around: FrameFormat, film: Film) -> str:
    if film.duration is None and ("{time}" in around.before or "{duration}" in around.opening):
        raise DataError(
            "this model reads when each frame is shown, and a folder of pictures does not say it",
            remedy="Make a video file of the pictures.",
        )
    count = str(len(film.frames))
    if around.count_in_words:
        from num2words import num2words

        count = num2words(len(film.frames))
    return around.opening.format(count=count, duration=timedelta(seconds=int(film.duration or 0)))


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _media_first(items: Sequence[_Words | _Medium], joint: str) -> list[_Words | _Medium]:
    texts = [item for item in items if isinstance(item, _Words)]
    joined: list[Segment] = []
    for number, text in enumerate(texts):
        joined += [Segment(joint, trained=False, template=False)] if number and joint else []
        joined += text.segments
    media = [item for item in items if isinstance(item, _Medium)]
    return [*media, *([_Words(joined)] if joined else [])]


def _fold(items: Sequence[_Words | _Medium]) -> None:
    """Takes away the one newline that belongs to an `<image>` mark: the template puts its own there, or none."""
    for i, item in enumerate(items):
        if isinstance(item, _Words):
            continue
        after = items[i + 1] if i + 1 < len(items) else None
        before = items[i - 1] if i else None
        if isinstance(after, _Words) and after.segments:
            first = after.segments[0]
            after.segments[:1] = [first] if first.template else _kept(first, first.text.removeprefix("\n"))
        elif after is None and isinstance(before, _Words) and before.segments:
            last = before.segments[-1]
            before.segments[-1:] = [last] if last.template else _kept(last, last.text.removesuffix("\n"))


def _in_block(
    items: Sequence[_Words | _Medium], block: tuple[str, str, str], image_joint: str
) -> list[_Words | _Medium]:
    """The media, which stand first, as one; white space around the text was there for their marks."""
    media: list[Piece] = []
    for item in items:
        if isinstance(item, _Medium):
            media += [*([_fixed(image_joint)] if media and image_joint else []), *item.pieces]
    if not media:
        return list(items)
    texts = [_Words(_strip(item.segments)) for item in items if isinstance(item, _Words)]
    texts = [item for item in texts if item.segments]
    before, after, joint = block
    return [_Medium([_fixed(before), *media, _fixed(after + (joint if texts else ""))]), *texts]


def _strip_ends(items: Sequence[_Words | _Medium]) -> list[_Words | _Medium]:
    """Without white space where the turn begins and ends."""
    stripped = list(items)
    for end in (0, -1):
        if stripped and isinstance(edge := stripped[end], _Words):
            edge.segments = _strip(edge.segments, start=end == 0, end=end == -1)
            if not edge.segments:
                del stripped[end]
    return stripped


def _strip(segments: Sequence[Segment], *, start: bool = True, end: bool = True) -> list[Segment]:
    """Without white space at the ends, as templates that trim contents leave it."""
    stripped = list(segments)
    while start and stripped and not stripped[0].template and not stripped[0].text.strip():
        del stripped[0]
    while end and stripped and not stripped[-1].template and not stripped[-1].text.strip():
        del stripped[-1]
    if start and stripped and not stripped[0].template:
        stripped[0] = replace(stripped[0], text=stripped[0].text.lstrip())
    if end and stripped and not stripped[-1].template:
        stripped[-1] = replace(stripped[-1], text=stripped[-1].text.rstrip())
    return stripped


def _kept(segment: Segment, text: str) -> list[Segment]:
    return [replace(segment, text=text)] if text else []
