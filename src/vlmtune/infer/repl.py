"""A conversation with a model: turns, pictures, and the commands of the interactive loop. Prints nothing itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.config.schema import MediaOptions
from vlmtune.data.rows.marks import joined
from vlmtune.data.sample import Image, MediaRef, Message, Part, PseudoText, Sample, Text, Video
from vlmtune.errors import DataError, VlmtuneError

if TYPE_CHECKING:
    from vlmtune.infer.session import Session
    from vlmtune.models.family import OpenedFolder

HELP = (
    "/image PATH  add a picture to your next turn   /video PATH  add a video   /embedding PATH  add pseudo-text   "
    "/reset  start over   /quit  leave   /help  these commands"
)


Medium = Image | Video | PseudoText

_MARKS: dict[type[Medium], tuple[str, ...]] = {
    Image: ("<image>", "<ImageHere>"),
    Video: ("<video>",),
    PseudoText: ("<embedding>",),
}
"""Where a medium stands in a question; without one that waits for a place, they are text."""


@dataclass(slots=True)
class Conversation:
    """The turns so far and the pictures, videos and embeddings that wait for the next one."""

    session: Session
    max_new_tokens: int = 256
    messages: list[Message] = field(default_factory=list)
    pending: list[Medium] = field(default_factory=list)

    def add_image(self, path: str | Path) -> None:
        """Put a picture into the next turn.

        Raises:
            DataError: no such file, or not a picture that can be decoded; the conversation is as it was.
        """
        self.pending.append(open_picture(path, self.session.located.media))

    def add_video(self, path: str | Path) -> None:
        """Put a video file, or a folder of frames, into the next turn.

        Raises:
            DataError: no such file, or not a video; the conversation is as it was.
        """
        self.pending.append(open_video(path, self.session.located.media))

    def add_embedding(self, path: str | Path) -> None:
        """Put a file of pseudo-text (`page.pt`, `store.safetensors#page`) into the next turn.

        Raises:
            DataError: no such file, or not a tensor (n, d) for this model; the conversation is as it was.
        """
        self.pending.append(open_embedding(path, self.session.opened))

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer in pieces. The turn counts once the answer is complete; an interrupted one leaves no trace but
        keeps the pictures for another try.

        Raises:
            DataError: the prompt cannot be encoded; it has marks, but not one for each embedding.
        """
        turn = Message("user", tuple(joined(_content(self.pending, text))))
        sample = Sample(messages=(*self.messages, turn), origin="this conversation")
        answer = ""
        with closing(self.session.stream(sample, self.max_new_tokens)) as pieces:
            for piece in pieces:
                answer += piece
                yield piece
        self.messages += [turn, Message("assistant", (Text(answer),))]
        self.pending.clear()

    def reset(self) -> None:
        self.messages.clear()
        self.pending.clear()


def _content(media: Sequence[Medium], text: str) -> list[Part]:
    """The question with the media: where it marks them, else each on a line of its own in front, as rows have them."""
    waiting: dict[type[Medium], list[Medium]] = {kind: [] for kind in _MARKS}
    for medium in media:
        waiting[type(medium)].append(medium)
    marks = {mark: kind for kind, names in _MARKS.items() for mark in names if waiting[kind]}
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    for kind, names in _MARKS.items():
        _check_marks(waiting[kind], [piece for piece in pieces if piece in names and marks.get(piece)])
    marked = {marks[piece] for piece in pieces if piece in marks}
    # Templates with a newline of their own behind a medium take this one away.
    parts: list[Part] = [part for medium in media if type(medium) not in marked for part in (medium, Text("\n"))]
    return parts + [waiting[marks[piece]].pop(0) if piece in marks else Text(piece) for piece in pieces]


def _check_marks(media: Sequence[Medium], said: Sequence[str]) -> None:
    if said and len(said) != len(media):
        mark = said[0]
        raise DataError(
            f"the question says {mark} {len(said)} times, and {counted(media)} would stand there",
            expected=f"one {mark} for each, or none: then they stand in front of the question",
        )


def open_embedding(path: str | Path, opened: OpenedFolder) -> PseudoText:
    """A file of pseudo-text as a part of a message, read once to be sure that it can be, and is for this model.

    Raises:
        DataError: with the path as `where`.
    """
    from vlmtune.data.encode import pseudo_text_size
    from vlmtune.data.media import embedding

    file, key = embedding.split_name(str(path))

    def read(ref: MediaRef) -> None:
        named = replace(ref, key=key)
        embedding.rows(named, pseudo_text_size(named, opened))

    return PseudoText(replace(_tried(file, read), key=key))


def open_picture(path: str | Path, options: MediaOptions) -> Image:
    """A picture file as a part of a message, decoded once to be sure that it can be.

    Raises:
        DataError: with the path as `where`.
    """
    from vlmtune.data.media import pictures

    return Image(_tried(path, lambda ref: pictures.open_image(ref, options)))


def open_video(path: str | Path, options: MediaOptions) -> Video:
    """A video file, or a folder of frames, as a part of a message; the frames to be shown are decoded once.

    Raises:
        DataError: with the path as `where`.
    """
    from vlmtune.data.media import video

    return Video(_tried(path, lambda ref: video.decode(video.film(ref, options).frames, options)))


def _tried(path: str | Path, decode: Callable[[MediaRef], object]) -> MediaRef:
    ref = MediaRef(path=str(Path(path).expanduser().absolute()))
    try:
        decode(ref)
    except DataError as error:
        # The remedies of `media` speak of rows; here there is none.
        raise DataError(error.found, where=error.where or str(path), expected=error.expected) from None
    return ref


def converse(
    conversation: Conversation,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    complain: Callable[[str], None],
) -> None:
    """The interactive loop: until ``/quit`` or the end of the input.

    Args:
        read: the next line of the user, None at the end of the input. KeyboardInterrupt while an answer streams ends
            the answer; from `read` it ends the loop.
        write: takes pieces of answers and notes, with their line ends.
        complain: takes an error as one paragraph; the loop goes on.
    """
    write(HELP + "\n")
    while (line := read()) is not None:
        line = line.strip()
        if line == "/quit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                _command(line, conversation, write)
            else:
                _answer(line, conversation, write)
        except VlmtuneError as error:
            complain(str(error))


def _answer(text: str, conversation: Conversation, write: Callable[[str], None]) -> None:
    with closing(conversation.ask(text)) as pieces:
        try:
            for piece in pieces:
                write(piece)
            write("\n")
        except KeyboardInterrupt:
            write("\n(stopped; this turn is not part of the conversation)\n")


def _command(line: str, conversation: Conversation, write: Callable[[str], None]) -> None:
    name, _, rest = line.partition(" ")
    adding = {
        "/image": conversation.add_image,
        "/video": conversation.add_video,
        "/embedding": conversation.add_embedding,
    }
    if name in adding:
        for path in _paths(rest):
            adding[name](path)
        waiting = counted(conversation.pending)
        write(f"{waiting} in your next turn\n" if rest.strip() else f"usage: {name} PATH\n")
    elif name == "/reset":
        conversation.reset()
        write("a new conversation\n")
    elif name == "/help":
        write(HELP + "\n")
    else:
        write(f"there is no command {name}. {HELP}\n")


def counted(pending: Sequence[Medium]) -> str:
    """`2 pictures`, `1 picture and 1 video`."""
    kinds = {"picture": Image, "video": Video, "embedding": PseudoText}
    numbers = {what: sum(isinstance(part, kind) for part in pending) for what, kind in kinds.items()}
    found = [f"{number} {what}{'' if number == 1 else 's'}" for what, number in numbers.items() if number]
    return " and ".join(found)


def _paths(text: str) -> list[str]:
    """One path with spaces as it stands, or several in shell quoting."""
    text = text.strip()
    if not text or Path(text).expanduser().exists():
        return [text] if text else []
    try:
        return shlex.split(text)
    except ValueError:  # an open quote: it belongs to the name
        return [text]
