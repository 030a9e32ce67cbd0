"""A conversation reads the same in every format; a malformed row is a DataError with an origin, never a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.config.schema import Read
from vlmtune.data.rows.adapters import to_sample
from vlmtune.data.rows.json_rows import parse_row
from vlmtune.data.rows.marks import joined
from vlmtune.data.sample import Box, Image, MediaRef, Message, Part, Sample, Text, Video
from vlmtune.errors import DataError

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ORIGIN = "rows.jsonl:7"

# Text without whole marks; broken ones, quotes, surrogate pairs and line ends included.
PIECES = st.sampled_from(
    ["a", " ", "\n", "<", ">", "image", '"', "\\", "你好", "🐈", "</s>", "{}", "\u2028", "<img>", "'", "\t"]
)
TEXTS = st.lists(PIECES, max_size=5).map("".join).filter(lambda text: "<image>" not in text)
ANSWERS = TEXTS.filter(str.strip)
NAMES = st.sampled_from(["a.jpg", "b c.png", "图/一.jpg"])


def locate(name: str) -> MediaRef:
    return MediaRef(path=f"/r/{name}")


@st.composite
def questions(draw: st.DrawFn) -> list[Part]:
    parts: list[Part] = [Text(draw(TEXTS))]
    for name in draw(st.lists(NAMES, max_size=3)):
        parts += [Image(locate(name)), Text(draw(TEXTS))]
    return joined(parts)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    system = draw(st.none() | ANSWERS)
    messages = [Message("system", (Text(system),))] if system else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", tuple(draw(questions()))))
        messages.append(Message("assistant", (Text(draw(ANSWERS)),)))
    return messages


def paths(messages: list[Message]) -> list[str]:
    return [
        part.ref.path.removeprefix("/r/") for message in messages for part in message.parts if isinstance(part, Image)
    ]


def marked(message: Message, mark: str = "<image>") -> str:
    return "".join(part.text if isinstance(part, Text) else mark for part in message.parts)


def split(messages: list[Message]) -> tuple[str | None, list[tuple[str, str]]]:
    system = messages[0].text if messages[0].role == "system" else None
    turns = [message for message in messages if message.role != "system"]
    return system, [(marked(turns[i]), marked(turns[i + 1])) for i in range(0, len(turns), 2)]


def as_llava(messages: list[Message]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message.role], "value": marked(message)} for message in messages]
    return {"id": "x", "image": paths(messages), "conversations": turns}


def as_xcomposer(messages: list[Message]) -> dict[str, Any]:
    turns = [{"from": message.role, "value": marked(message, "<ImageHere>")} for message in messages]
    return {"image": paths(messages), "conversations": turns}


def as_messages_with_marks(messages: list[Message]) -> dict[str, Any]:
    turns = [{"role": message.role, "content": marked(message)} for message in messages]
    return {"messages": turns, "images": [{"bytes": None, "path": path} for path in paths(messages)]}


def as_openai(messages: list[Message]) -> dict[str, Any]:
    def part(part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        assert isinstance(part, Image)
        return {"type": "image_url", "image_url": {"url": part.ref.path.removeprefix("/r/")}}

    return {"messages": [{"role": one.role, "content": list(map(part, one.parts))} for one in messages]}


def as_query(messages: list[Message]) -> dict[str, Any]:
    system, pairs = split(messages)
    query, response = pairs[-1]
    history = [list(pair) for pair in pairs[:-1]]
    return {"query": query, "response": response, "history": history, "system": system, "images": paths(messages)}


def as_alpaca(messages: list[Message]) -> dict[str, Any]:
    row = as_query(messages)
    row["instruction"], row["output"] = row.pop("query"), row.pop("response")
    return {**row, "input": ""}


def as_cauldron(messages: list[Message]) -> dict[str, Any]:
    system, pairs = split(messages)
    return {"images": paths(messages), "system": system, "texts": [{"user": q, "assistant": a} for q, a in pairs]}


FORMATS: list[Callable[[list[Message]], dict[str, Any]]] = [
    as_llava, as_xcomposer, as_messages_with_marks, as_openai, as_query, as_alpaca, as_cauldron,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS)
@QUICK
@given(messages=dialogues())
def test_a_conversation_reads_the_same_in_every_format(
    write: Callable[[list[Message]], dict[str, Any]], messages: list[Message]
) -> None:
    row = json.loads(json.dumps(write(messages)))
    assert list(to_sample(row, origin=ORIGIN, locate=locate).messages) == messages


@QUICK
@given(messages=dialogues(), names=st.permutations(["conversations", "id", "image"]))
def test_columns_give_rows_their_names_back(messages: list[Message], names: list[str]) -> None:
    row = as_llava(messages)
    columns = dict(zip(["conversations", "id", "image"], names, strict=True))
    renamed = {own: row[known] for known, own in columns.items()}
    sample = to_sample(renamed, origin=ORIGIN, locate=locate, options=Read(columns=columns))
    assert sample == to_sample(row, origin=ORIGIN, locate=locate)


@QUICK
@given(
    boxes=st.lists(st.tuples(*[st.floats(0, 1)] * 4).map(lambda c: (*sorted(c[:2]), *sorted(c[2:]))), max_size=4),
    unit=st.sampled_from([("real", "pixels"), ("norm1", "unit"), ("norm1000", "thousand")]),
)
def test_boxes_come_back_as_they_were(boxes: list[tuple[float, ...]], unit: tuple[str, Any]) -> None:
    written = [[x1, y1, x2, y2] for x1, x2, y1, y2 in boxes]
    row = {
        "query": "<image>",
        "response": "at " + "<bbox>" * len(boxes),
        "image": "a",
        "objects": {"bbox": written, "bbox_type": unit[0]},
    }
    answer = to_sample(row, origin=ORIGIN, locate=locate).messages[1]
    assert list(answer.parts[1:]) == [Box(tuple(box), unit=unit[1]) for box in written]  # type: ignore[arg-type]


# Malformed rows

_PLAIN_TURNS = [{"role": "user", "content": "<video> and <image>"}, {"role": "assistant", "content": "It is <bbox>."}]
GOOD: list[dict[str, Any]] = [
    as_llava([Message("user", (Image(locate("a")), Text("\nq"))), Message("assistant", (Text("a"),))]),
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "video", "video": "v.mp4"},
                    {"type": "text", "text": "q"},
                ],
            },
            {"role": "assistant", "content": "a"},
        ]
    },
    {
        "messages": _PLAIN_TURNS,
        "images": ["a"],
        "videos": ["v"],
        "objects": {"ref": [], "bbox": [[1, 2, 3, 4]], "image_id": [0], "bbox_type": "real"},
    },
    {"texts": [{"user": "q", "assistant": "a"}], "images": [MediaRef(path="cell", inline=b"x")]},
    {"query": "q", "response": "a", "history": [["q", "a"]], "system": "s", "images": ["a"]},
    {"instruction": "q", "input": "i", "output": "a", "history": [], "images": [{"path": "a", "bytes": None}]},
    {"question": "q", "answer": "a", "image": {"bytes": b"x", "path": None}},
    {"caption": "c", "image": "a"},
    {
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
        "video": "v.mp4",
        "id": 1,
    },
]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\ud800", "x" * 5000, "\0", ".."),
    *("<image>", "<video><bbox>", "data:image/png;base64,!", "http://a/b", "gpt", "system", b"bytes"),
    *([], {}, [[]], [{}], [None], {"": None}, {"type": "text"}, {"type": []}, {"url": 3}, {"bytes": "x"}, {1: 2}),
    *({"path": None, "bytes": b""}, {"from": "human"}, {"role": "user", "content": None}, [1, 2, 3, 4]),
    *(MediaRef(path="/f/"), _nested(3000)),
]


def _spots(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """Every place in a row that is not nested too deeply: its container, and its key or index there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        if depth < 6:
            _spots(value[key], found, depth + 1)
    return found


def _mutate(row: dict[str, Any], rng: random.Random) -> object:
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        spots = _spots(row, [])
        if not spots:
            break
        where, key = rng.choice(spots)
        other, name = rng.choice(spots)
        kind = rng.randrange(5)
        if kind == 0:
            del where[key]
        elif kind == 1:
            where[key] = copy.copy(rng.choice(STRANGE))
        elif kind == 2:
            where[key] = other[name]
        elif kind == 3 and isinstance(where, dict):
            where[rng.choice([*GOOD[rng.randrange(len(GOOD))], "loss", "tools", "type"])] = copy.copy(
                rng.choice(STRANGE)
            )
        else:
            where[key] = [where[key]] if rng.random() < 0.5 else {"url": where[key]}
    return row if rng.random() < 0.98 else rng.choice(STRANGE)


def _judge(read: Callable[[], Sample]) -> bool:
    """Whether the row was refused; whatever is no DataError with the origin and one line fails."""
    try:
        sample = read()
    except DataError as error:
        assert error.where == ORIGIN and "\n" not in str(error) and len(str(error)) < 1500, str(error)
        return True
    media = [part for message in sample.messages for part in message.parts if isinstance(part, Image | Video)]
    assert sample.messages[-1].role == "assistant" and all(isinstance(part.ref, MediaRef) for part in media)
    return False


def test_mutated_rows_are_refused_with_their_origin() -> None:
    rng = random.Random(5)
    options = [Read(), Read(prompt="What <image>?"), Read(columns={"image": "images", "answer": "caption.x"})]
    refused = 0
    for i in range(4000):
        row, chosen = _mutate(GOOD[i % len(GOOD)], rng), options[0 if rng.random() < 0.8 else rng.randrange(3)]
        refused += _judge(lambda row=row, chosen=chosen: to_sample(row, origin=ORIGIN, locate=locate, options=chosen))
    assert 2000 < refused < 4000, "most mutations break a row, some do not"


def test_rows_with_broken_bytes_are_refused_with_their_origin() -> None:
    rng = random.Random(7)
    written = [
        json.dumps(row, ensure_ascii=False).encode()
        for row in GOOD
        if "MediaRef" not in str(row) and "b'" not in str(row)
    ]
    refused = 0
    for i in range(2500):
        raw = bytearray(written[i % len(written)])
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(raw) + 1)
            kind = rng.randrange(5)
            if kind == 0:
                raw = raw[:at] or bytearray(b" ")
            elif kind == 1:
                raw[at:at] = rng.choice(
                    [b"\xff", b"\xe4\xbd", b"\x00", b"\\ud83d", b'"', b"}", b"[" * 20_000, b"9" * 5000, b","]
                )
            elif kind == 2 and at < len(raw):
                raw[at] = rng.randrange(256)
            else:
                del raw[at : at + rng.randrange(4)]
        refused += _judge(
            lambda raw=bytes(raw): to_sample(parse_row(raw, ORIGIN), origin=ORIGIN, locate=locate, options=Read())
        )
    assert refused > 1200
