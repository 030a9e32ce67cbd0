"""The turns of a row, one function per data format, chosen by the row's keys. Pure; text is not looked into here.

=========================  =========================================================================================
`conversations`            LLaVA, ShareGPT, InternVL, XComposer, LLaMA-Factory: turns with `from` / `value`
`messages`                 OpenAI, ms-swift, LLaMA-Factory: turns with `role` / `content`
`texts`                    the_cauldron: pairs with `user` / `assistant`
`conversation`             ms-swift: pairs with `human` / `assistant`
`query`, `response`        ms-swift, with `history` and `system`
`instruction`, `output`    alpaca (LLaMA-Factory), with `input`, `history` and `system`
`question`, `answer`       flat rows; the source's `prompt` stands in for a `question` that is left out
`caption`                  a picture and its caption; the source's `prompt` is the question
=========================  =========================================================================================

In the forms from `texts` on, media that no mark places stand in front of the first question, each on a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vlmtune.data.sample import MediaRef, Role
from vlmtune.errors import DataError

Row = Mapping[str, object]

FORMAT_KEYS = (
    *(
        "conversations",
        "messages",
        "texts",
        "conversation",
        "query",
        "response",
        "instruction",
        "output",
        "input",
        "history",
    ),
    *("question", "answer", "caption"),
)
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
_FORMS: tuple[tuple[str, ...], ...] = (
    ("texts",),
    ("conversation",),
    ("query", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("caption",),
)
_PAIRS = {"texts": "user", "conversation": "human"}  # key of the list, and of the question in its pairs
_UNSUPPORTED_IN_TURNS = ("tool_calls", "function_call", "audio")


_UNDER_THE_OTHER = (
    "Turns with `{0}` and `{1}` belong under `{2}`: rename the key, or say `columns: {{{2}: {3}}}` at the source."
)


class Turn(NamedTuple):
    role: Role
    content: object
    """A string, or for OpenAI messages a list of parts."""
    place: str
    """What messages call it: `message 3`, ``the `answer` ``."""


class Dialogue(NamedTuple):
    turns: list[Turn]
    media_in_front: bool
    """Media without marks stand in front of the first question."""


def dialogue_of(row: Row, prompt: str | None) -> Dialogue:
    """The turns of a row, the system text beside them included.

    Args:
        prompt: the source's `prompt`.

    Raises:
        DataError: no known format or several, a turn that is none, an unknown role.
    """
    listed = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(listed) > 1:
        raise _neither("the row has both `conversations` and `messages`")
    system = _system_of(row)
    if listed:
        read = _sharegpt_turn if listed[0] == "conversations" else _openai_turn
        return Dialogue([*system, *_listed_turns(row, listed[0], read)], media_in_front=False)
    whole = [form for form in _FORMS if all(row.get(key) is not None for key in form)]
    if prompt and not whole and row.get("answer") is not None:
        whole = [("question", "answer")]
    if len(whole) > 1 and whole[-1] == ("caption",):
        whole.pop()  # a caption beside a question and its answer is a note
    if len(whole) > 1:
        raise _neither(f"the row has both `{'` / `'.join(whole[0])}` and `{'` / `'.join(whole[1])}`")
    if whole:
        form = whole[0]
        asker = _PAIRS.get(form[0])
        turns = _pairs(row, form[0], asker) if asker else _flat(row, form[0], form[-1], prompt)
        return Dialogue([*system, *turns], media_in_front=True)
    for first, second in (("query", "response"), ("instruction", "output"), ("question", "answer")):
        for has, lacks in ((first, second), (second, first)):
            if row.get(has) is not None:
                raise DataError(f"the row has `{has}` but no `{lacks}`", expected="a question and its answer")
    raise _neither(f"the row has neither `conversations` nor `messages` (its keys: {named(row) or 'none'})")


def _neither(found: str) -> DataError:
    return DataError(
        found,
        expected="one of them, with the turns of a dialogue, or `question` and `answer`",
        remedy="Where the rows use other names, give them under `columns` of the source.",
    )


def named(row: Row) -> str:
    """The row's keys for a message."""
    keys = [cut(str(key), 30) for key in list(row)[:20]]
    return ", ".join([*keys, "…"] if len(row) > 20 else keys)


def _system_of(row: Row) -> list[Turn]:
    """The system text that some tools put beside the turns instead of in front of them."""
    text = row.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise DataError(f"`system` is {kind_of(text)}", expected="a string")
    return [Turn("system", text, "`system`")]


def _listed_turns(row: Row, key: str, read: Callable[[object, str], Turn]) -> list[Turn]:
    turns = row[key]
    if not isinstance(turns, list):
        raise DataError(f"`{key}` is {kind_of(turns)}", expected="a list of turns")
    if not turns:
        raise DataError(f"`{key}` is empty", expected="a user turn and an assistant turn")
    return [read(turn, f"message {i + 1}") for i, turn in enumerate(turns)]


def _sharegpt_turn(turn: object, place: str) -> Turn:
    """``{"from": "human", "value": "<image>\\nWhat is this?"}``"""
    role = _role(turn, place, "from", _ROLES)
    _refuse_untrained(turn, place)
    return Turn(role, _text(entry(turn, place, "value"), f"the text of {place}"), place)


def _openai_turn(turn: object, place: str) -> Turn:
    """``{"role": "user", "content": "…" | [{"type": "text", "text": "…"}, {"type": "image_url", …}]}``"""
    role = _role(turn, place, "role", _OPENAI_ROLES)
    _refuse_untrained(turn, place)
    content = entry(turn, place, "content")
    return Turn(role, content if isinstance(content, list) else _text(content, f"the text of {place}"), place)


def _refuse_untrained(turn: object, place: str) -> None:
    """What a turn says beside its text and vlmtune would not do is refused, not dropped."""
    if not isinstance(turn, dict):
        return
    for key in _UNSUPPORTED_IN_TURNS:
        if turn.get(key):
            raise DataError(f"{place} has `{key}`, which is not supported yet", expected="text and media")
    for key in ("loss", "weight"):
        value = turn.get(key)
        if value is not None and value != 1 and isinstance(value, int | float):
            raise DataError(
                f"{place} says `{key}`: {str(value).lower()}, but every answer is trained alike",
                remedy="Take the row out, or remove the key.",
            )


def _pairs(row: Row, key: str, asker: str) -> list[Turn]:
    """``[{"user": "…", "assistant": "…"}, …]``"""
    pairs = row[key]
    if not isinstance(pairs, list) or not pairs:
        found = "empty" if pairs == [] else kind_of(pairs)
        raise DataError(f"`{key}` is {found}", expected=f"a list of {{{asker}: …, assistant: …}}")
    turns = []
    for i, pair in enumerate(pairs):
        place = f"pair {i + 1} of `{key}`"
        if not isinstance(pair, dict):
            raise DataError(f"{place} is {kind_of(pair)}", expected=f"an object with `{asker}` and `assistant`")
        turns += _pair(entry(pair, place, asker), entry(pair, place, "assistant"), f"`{asker}` of {place}", place)
    return turns


def _flat(row: Row, first: str, second: str, prompt: str | None) -> list[Turn]:
    """A question and an answer as two texts of the row, after the pairs of its `history`."""
    question = None if first == "caption" else row.get(first)
    if question is None:
        if prompt is None:
            raise DataError(
                f"the row has a `{second}` and no question",
                remedy="Set `prompt` of the source to the question that all of its rows answer.",
            )
        question = prompt
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"`history` is {kind_of(history)}", expected="a list of [question, answer]")
    turns = []
    for i, pair in enumerate(history):
        place = f"pair {i + 1} of `history`"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{place} is {kind_of(pair)}", expected="[question, answer]")
        turns += _pair(pair[0], pair[1], f"the question of {place}", place)
    more = row.get("input") if first == "instruction" else None
    if more not in (None, ""):
        question = "\n".join(filter(None, (_text(question, f"`{first}`"), _text(more, "`input`"))))
    return turns + _pair(question, row[second], f"`{first}`", f"`{second}`")


def _pair(question: object, answer: object, question_place: str, answer_place: str) -> list[Turn]:
    return [
        Turn("user", _text(question, question_place), question_place),
        Turn("assistant", _text(answer, answer_place), answer_place),
    ]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} is {kind_of(value)}", expected="a string")
    return value


def _role(turn: object, place: str, key: str, roles: Mapping[str, Role]) -> Role:
    if not isinstance(turn, dict):
        raise DataError(f"{place} is {kind_of(turn)}", expected=f"an object with `{key}`")
    name = entry(turn, place, key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{place} has the unknown role {shown(name)}", expected=f"one of {', '.join(roles)}")
    return role


def entry(item: object, place: str, key: str) -> object:
    """``item[key]``.

    Raises:
        DataError: `item` is no object or lacks the key.
    """
    if not isinstance(item, dict) or key not in item:
        keys = set(item) if isinstance(item, dict) else set()
        remedy = ""
        if {"role", "content"} <= keys and key in ("from", "value"):
            remedy = _UNDER_THE_OTHER.format("role", "content", "messages", "conversations")
        elif {"from", "value"} <= keys and key in ("role", "content"):
            remedy = _UNDER_THE_OTHER.format("from", "value", "conversations", "messages")
        raise DataError(f'{place} has no "{key}"', remedy=remedy)
    return item[key]


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    names |= {bytes: "bytes", MediaRef: "a picture"}
    return names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A JSON value for a message: what it is when it is long or nested."""
    if isinstance(value, str):
        return repr(cut(value, 40))
    return str(value) if isinstance(value, int) and 0 <= value < 1000 and value is not True else kind_of(value)


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
