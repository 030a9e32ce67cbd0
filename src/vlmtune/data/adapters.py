"""What a row says, as a `Sample`: one function per data format, chosen by the row's keys.

==================  =====================================================================================
`conversations`     LLaVA, ShareGPT, InternVL, XComposer: turns with `from` / `value`, pictures in `image`
                    or `images`, their places marked `<image>` or `<ImageHere>`
`messages`          OpenAI: turns with `role` / `content`; a content is a string or a list of parts
==================  =====================================================================================

Text is kept exactly as it stands, the newline beside a mark included. A mark is a mark in user turns only; in an
answer it is text. Everything that cannot be trained as it stands is a `DataError`, never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from vlmtune.data.sample import Image, MediaRef, Message, Part, Role, Sample, Text
from vlmtune.errors import DataError

Locate = Callable[[str], MediaRef]
"""A path or URI of a row -> where its bytes are; raises DataError."""

MARK = re.compile(r"<image>|<ImageHere>")
_UNSUPPORTED_KEYS = ("video", "videos", "embedding", "embeddings", "audio", "audios")
_UNSUPPORTED_IN_TURNS = ("tool_calls", "function_call", "audio")
KNOWN_KEYS = frozenset({"id", "system", "image", "images", "conversations", "messages", *_UNSUPPORTED_KEYS})
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_OPENAI_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def to_sample(row: object, *, origin: str, locate: Locate) -> Sample:
    """The sample that a row says.

    Raises:
        DataError: with `origin` as its place: missing keys, wrong types, unknown or misplaced roles, marks that do not
            match the pictures, an empty answer, media that are not supported or cannot be located.
    """
    try:
        if not isinstance(row, dict):
            raise DataError(f"the row is {_kind(row)}", expected="an object, { … }")
        _refuse_unsupported(row)
        turns, read = _format_of(row)
        pictures = _Pictures(_paths(row), locate)
        system = _system_of_row(row)
        messages = [*system, *(read(turn, i + 1, pictures) for i, turn in enumerate(turns))]
        _check_order(messages, first_number=1 - len(system))
        pictures.all_placed()
    except DataError as error:
        error.where = error.where or origin
        raise
    name = row.get("id")
    return Sample(
        messages=tuple(messages),
        origin=origin,
        id=str(name) if isinstance(name, str | int) and not isinstance(name, bool) else None,
    )


class _Pictures:
    """The pictures listed at the row's top level, handed out mark by mark."""

    def __init__(self, paths: Sequence[str], locate: Locate) -> None:
        self.paths = paths
        self.locate = locate
        self.num_marks = 0
        self.num_marks_in_answers = 0

    def split(self, text: str) -> list[Part]:
        """Text and pictures of a user turn, in order."""
        parts: list[Part] = []
        start = 0
        for mark in MARK.finditer(text):
            if mark.start() > start:
                parts.append(Text(text[start : mark.start()]))
            parts.extend(self.next())
            start = mark.end()
        if start < len(text):
            parts.append(Text(text[start:]))
        return parts

    def next(self) -> list[Part]:
        """The next picture; none when the list is exhausted, which `all_placed` reports with both counts."""
        self.num_marks += 1
        if self.num_marks > len(self.paths):
            return []
        return [Image(self.locate(self.paths[self.num_marks - 1]))]

    def all_placed(self) -> None:
        num_images = len(self.paths)
        if self.num_marks == num_images:
            return
        marks = f"{self.num_marks} <image> mark{'' if self.num_marks == 1 else 's'}"
        images = f"{num_images} image{'' if num_images == 1 else 's'}"
        if self.num_marks > num_images:
            remedy = f"Add the missing path{'s' if self.num_marks - num_images > 1 else ''}, or remove a mark."
        else:
            remedy = "Put <image> into a user turn where each picture belongs, or remove a path."
        if self.num_marks_in_answers:
            remedy += f" (The {self.num_marks_in_answers} in the answers count as text.)"
        raise DataError(f"{marks} but {images}", remedy=remedy)


_Read = Callable[[object, int, _Pictures], Message]


def _format_of(row: Mapping[str, object]) -> tuple[list[object], _Read]:
    """The turns and the function that reads one of them."""
    found = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(found) != 1:
        raise DataError(
            "the row has both `conversations` and `messages`"
            if found
            else f"the row has neither `conversations` nor `messages` (its keys: {', '.join(map(str, row)) or 'none'})",
            expected="one of them, with the turns of a dialogue",
        )
    turns = row[found[0]]
    if not isinstance(turns, list):
        raise DataError(f"`{found[0]}` is {_kind(turns)}", expected="a list of turns")
    if not turns:
        raise DataError(f"`{found[0]}` is empty", expected="a user turn and an assistant turn")
    return turns, _sharegpt_turn if found[0] == "conversations" else _openai_turn


def _sharegpt_turn(turn: object, number: int, pictures: _Pictures) -> Message:
    """``{"from": "human", "value": "<image>\\nWhat is this?"}``"""
    role = _role(turn, number, "from", _ROLES)
    return Message(role, tuple(_marked_text(_entry(turn, number, "value"), role, f"message {number}", pictures)))


def _openai_turn(turn: object, number: int, pictures: _Pictures) -> Message:
    """``{"role": "user", "content": "…" | [{"type": "text", "text": "…"}, {"type": "image_url", …}]}``"""
    role = _role(turn, number, "role", _OPENAI_ROLES)
    content = _entry(turn, number, "content")
    for key in _UNSUPPORTED_IN_TURNS:
        if isinstance(turn, dict) and turn.get(key):
            raise DataError(f"message {number} has `{key}`, which is not supported yet", expected="text and images")
    if not isinstance(content, list):
        return Message(role, tuple(_marked_text(content, role, f"message {number}", pictures)))
    parts: list[Part] = []
    for i, item in enumerate(content):
        parts.extend(_openai_part(item, role, f"part {i + 1} of message {number}", pictures))
    return Message(role, tuple(parts))


def _openai_part(item: object, role: Role, place: str, pictures: _Pictures) -> list[Part]:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str):
        raise DataError(
            f"{place} is {_kind(item)}" if not isinstance(item, dict) else f"{place} has no `type`",
            expected='an object with a `type`: "text", "image_url" or "image"',
        )
    if kind == "text":
        return _marked_text(_entry(item, place, "text"), role, place, pictures)
    if kind not in ("image_url", "image"):
        raise DataError(f"{place} has the type {kind!r}, which is not supported yet", expected="text or image_url")
    if role != "user":
        raise DataError(f"{place} is a picture in a turn of the {role}", expected="pictures in user turns")
    source = next((item[key] for key in ("image_url", "image", "url", "path") if item.get(key) is not None), None)
    if isinstance(source, dict):
        source = source.get("url")
    if source is None and kind == "image" and pictures.paths:
        return pictures.next()  # the picture stands in the row's `images`; this part only marks its place
    if not isinstance(source, str):
        raise DataError(f"{place} names no picture", expected='{"type": "image_url", "image_url": {"url": "path"}}')
    return [Image(pictures.locate(source))]


def _marked_text(text: object, role: Role, place: str, pictures: _Pictures) -> list[Part]:
    """The parts of a string; marks are places of pictures in user turns only."""
    if not isinstance(text, str):
        raise DataError(f"the text of {place} is {_kind(text)}", expected="a string")
    if role == "user":
        return pictures.split(text)
    if role == "assistant":
        pictures.num_marks_in_answers += len(MARK.findall(text))
    return [Text(text)] if text else []


def _role(turn: object, number: int, key: str, roles: Mapping[str, Role]) -> Role:
    if not isinstance(turn, dict):
        raise DataError(f"message {number} is {_kind(turn)}", expected=f"an object with `{key}`")
    name = _entry(turn, number, key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(roles)
        raise DataError(f"message {number} has the unknown role {name!r}", expected=f"one of {known}")
    return role


def _entry(item: object, place: int | str, key: str) -> object:
    where = f"message {place}" if isinstance(place, int) else place
    if not isinstance(item, dict) or key not in item:
        remedy = ""
        if isinstance(item, dict) and {"role", "content"} <= set(item) and key in ("from", "value"):
            remedy = "Turns with `role` and `content` belong under `messages`."
        elif isinstance(item, dict) and {"from", "value"} <= set(item) and key in ("role", "content"):
            remedy = "Turns with `from` and `value` belong under `conversations`."
        raise DataError(f'{where} has no "{key}"', remedy=remedy)
    return item[key]


def _paths(row: Mapping[str, object]) -> list[str]:
    """What stands in `image` or `images`: a string, a list of strings, or nothing."""
    given = [key for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(given) == 2:
        raise DataError("the row has both `image` and `images`", expected="one of them")
    if not given:
        return []
    value = row[given[0]]
    paths: list[str] = []
    for i, path in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(path, str):
            which = f"entry {i + 1} of `{given[0]}`" if isinstance(value, list) else f"`{given[0]}`"
            raise DataError(f"{which} is {_kind(path)}", expected="a path, a list of paths, or null")
        paths.append(path)
    return paths


def _system_of_row(row: Mapping[str, object]) -> list[Message]:
    """The system text that some tools put beside the turns instead of in front of them."""
    text = row.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise DataError(f"`system` is {_kind(text)}", expected="a string")
    return [Message("system", (Text(text),))]


def _refuse_unsupported(row: Mapping[str, object]) -> None:
    for key in _UNSUPPORTED_KEYS:
        if row.get(key) not in (None, "", []):
            raise DataError(
                f"the row has `{key}`, which is not supported yet",
                expected="rows with text and images",
                remedy="Take the row out, or remove the field if the row makes sense without it.",
            )


def _check_order(messages: Sequence[Message], *, first_number: int) -> None:
    """system? (user assistant)+, and every answer says something."""
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        number = len(roles) - 1 - roles[::-1].index("system") + first_number
        raise DataError(f"message {number} is a system turn", expected="at most one, in front of all others")
    shift = 1 if roles[0] == "system" else 0
    dialogue = roles[shift:]
    first_number += shift
    if "assistant" not in dialogue:
        raise DataError("there is no assistant turn, so nothing can be learnt", remedy="Add an answer.")
    if dialogue[0] != "user":
        raise DataError("the first turn is the assistant's", expected="a user turn first")
    for i in range(1, len(dialogue)):
        if dialogue[i] == dialogue[i - 1]:
            raise DataError(
                f"messages {i - 1 + first_number} and {i + first_number} are both of the {dialogue[i]}",
                expected="user and assistant in turn",
                remedy="Join them into one, or put the missing turn between them.",
            )
    if dialogue[-1] != "assistant":
        raise DataError("the last turn is the user's", expected="an answer after every question")
    for i, message in enumerate(messages[shift:]):
        if message.role == "assistant" and not message.text.strip():
            raise DataError(
                f"the answer in message {i + first_number} is empty", remedy="Write it, or take the row out."
            )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
