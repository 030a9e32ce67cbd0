"""What a row says, as a `Sample`. Which format a row has is known by its keys: see `rows.formats`.

Text is kept exactly as it stands, the newline beside a mark included. A mark is a mark in user turns only; in an
answer it is text. Everything that cannot be trained as it stands is a `DataError`, never repaired.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from vlmtune.config.schema import Read
from vlmtune.data.rows.formats import FORMAT_KEYS, Row, Turn, dialogue_of, kind_of, named
from vlmtune.data.rows.marks import MEDIA_KEYS, PART_KEYS, Locate, Media, joined, openai_part
from vlmtune.data.sample import Message, Part, Sample
from vlmtune.errors import ConfigError, DataError

# Media and signals that other trainings use; a row that needs them would teach something else without them.
_UNSUPPORTED_KEYS = frozenset(
    {"audio", "audios", "tools", "chosen", "rejected", "kto_tag"}
    | {"rejected_response", "rejected_messages", "rejected_images"}
)
KNOWN_KEYS = frozenset({"id", "system", *FORMAT_KEYS, *MEDIA_KEYS, *_UNSUPPORTED_KEYS})
_PLAIN = Read()
_LEAVE_OUT = "`lone_turns: drop` at the source leaves such turns out."


def to_sample(row: object, *, origin: str, locate: Locate, options: Read = _PLAIN) -> Sample:
    """The sample that a row says.

    Args:
        options: of the row's source: `columns`, `prompt`, `unmarked_media`, `lone_turns` and `pseudo_text_token` are
            used.

    Raises:
        DataError: with `origin` as its place: missing keys, wrong types, unknown or misplaced roles, marks that do not
            match the media, an empty answer, media that are not supported or cannot be located.
    """
    try:
        if not isinstance(row, dict):
            raise DataError(f"the row is {kind_of(row)}", expected="an object, { … }")
        row = _with_known_names(row, options.columns) if options.columns else row
        _refuse_unsupported(row)
        dialogue = dialogue_of(row, options.prompt)
        turns = _paired(dialogue.turns) if options.lone_turns == "drop" else dialogue.turns
        in_front = dialogue.media_in_front or options.unmarked_media == "front"
        messages = _messages(turns, Media(row, locate, reserved=options.pseudo_text_token), in_front=in_front)
    except DataError as error:
        error.where = error.where or origin
        raise
    name = row.get("id")
    return Sample(
        messages=tuple(messages),
        origin=origin,
        id=str(name) if isinstance(name, str | int) and not isinstance(name, bool) else None,
    )


def unread_keys(row: object, options: Read) -> list[str]:
    """The keys of a row, and of the parts of its messages, that neither a format nor the source's `columns` reads."""
    if not isinstance(row, dict):
        return []
    inside = _unread_in_parts(row.get("messages"))
    if row.keys() <= KNOWN_KEYS:
        return inside
    own = {part for name in options.columns.values() for part in (name, name.partition(".")[0])}
    return [*(str(key) for key in row.keys() - KNOWN_KEYS - own), *inside]


def _unread_in_parts(turns: object) -> list[str]:
    """Options of single pictures and videos (Qwen's `max_pixels`, `fps`), for which the configuration has its own."""
    if not isinstance(turns, list):
        return []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return sorted({f"{key} of a part" for part in parts for key in part.keys() - PART_KEYS})


def check_columns(columns: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: a name on the left of `columns` that no format knows.
    """
    known = KNOWN_KEYS.difference(_UNSUPPORTED_KEYS)
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            raise ConfigError(
                f"{name!r} is no name that vlmtune knows",
                where="data.sources: columns",
                expected=f"{near[0]}, perhaps" if near else f"one of {', '.join(sorted(known))}",
                remedy="On the left stands vlmtune's name, on the right the rows' own: `{answer: label}`.",
            )


def _with_known_names(row: Row, columns: Mapping[str, str]) -> dict[str, object]:
    """The row under the names that the formats know."""
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    for known, own in columns.items():
        value: object = row
        for key in [own] if own in row else own.split("."):
            if not isinstance(value, dict) or key not in value:
                raise DataError(
                    f"the row has no `{own}`, which `columns` gives for `{known}` (its keys: {named(row) or 'none'})",
                    remedy="Correct `columns` of the source; a row without a value says null.",
                )
            value = value[key]
        renamed[known] = value
    return renamed


def _refuse_unsupported(row: Row) -> None:
    for key in sorted(_UNSUPPORTED_KEYS & row.keys()):
        if row.get(key) not in (None, "", []):
            raise DataError(
                f"the row has `{key}`, which is not supported yet",
                expected="rows with text, images, videos and embeddings",
                remedy="Take the row out, or remove the field if the row makes sense without it.",
            )


def _paired(turns: Sequence[Turn]) -> list[Turn]:
    """Without answers before the first question, and without questions behind the last answer."""
    roles = [turn.role for turn in turns]
    if "user" not in roles or "assistant" not in roles:
        return list(turns)
    first = roles.index("user")
    last = len(roles) - roles[::-1].index("assistant")
    return [turn for i, turn in enumerate(turns) if (i >= first or turn.role == "system") and i < last]


def _messages(turns: Sequence[Turn], media: Media, *, in_front: bool) -> list[Message]:
    """Text, media and boxes of each turn, in order. Media without marks are told by `all_placed`, after the turns."""
    user_texts = [text for turn in turns if turn.role == "user" for text in _texts(turn.content)]
    front = media.look_at(user_texts, in_front=in_front)
    messages = []
    for turn in turns:
        parts: list[Part] = []
        if isinstance(turn.content, list):
            for i, item in enumerate(turn.content):
                parts += openai_part(item, turn.role, f"part {i + 1} of {turn.place}", media)
        else:
            parts += media.split(str(turn.content), turn.role)
        if turn.role == "user":
            parts, front = [*front, *parts], []
        messages.append(Message(turn.role, tuple(joined(parts))))
    media.boxes_placed()
    _check_order(messages, [turn.place for turn in turns])
    media.all_placed()
    return messages


def _texts(content: object) -> list[str]:
    if isinstance(content, list):
        texts = [item.get("text") for item in content if isinstance(item, dict)]
        return [text for text in texts if isinstance(text, str)]
    return [str(content)]


def _check_order(messages: Sequence[Message], places: Sequence[str]) -> None:
    """system? (user assistant)+, and every answer says something."""
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        last = places[len(roles) - 1 - roles[::-1].index("system")]
        raise DataError(f"{last} is a system turn", expected="at most one, in front of all others")
    shift = 1 if roles[0] == "system" else 0
    dialogue = roles[shift:]
    if "assistant" not in dialogue:
        raise DataError("there is no assistant turn, so nothing can be learnt", remedy="Add an answer.")
    if dialogue[0] != "user":
        raise DataError("the first turn is the assistant's", expected="a user turn first", remedy=_LEAVE_OUT)
    for i in range(1 + shift, len(roles)):
        if roles[i] == roles[i - 1]:
            raise DataError(
                f"{places[i - 1].replace('message', 'messages')} and {places[i].removeprefix('message ')} are both of "
                f"the {roles[i]}",
                expected="user and assistant in turn",
                remedy="Join them into one, or put the missing turn between them.",
            )
    if dialogue[-1] != "assistant":
        raise DataError("the last turn is the user's", expected="an answer after every question", remedy=_LEAVE_OUT)
    for message, place in zip(messages, places, strict=True):
        if message.role == "assistant" and message.is_blank:
            answer = f"the answer in {place}" if place.startswith("message") else place
            raise DataError(f"{answer} is empty", remedy="Write it, or take the row out.")
