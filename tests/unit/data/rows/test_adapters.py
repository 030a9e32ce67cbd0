"""Rows of every format as samples, and every way in which a row can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from vlmtune.config.schema import Read
from vlmtune.data.rows.adapters import to_sample, unread_keys
from vlmtune.data.sample import Image, MediaRef, Message, Part, PseudoText, Sample, Text
from vlmtune.errors import DataError


def read(row: object, **options: Any) -> Sample:
    def locate(name: str) -> MediaRef:
        return MediaRef(path=f"/root/{name}")

    return to_sample(row, origin="coco.jsonl:124", locate=locate, options=Read(**options))


def image(name: str) -> Image:
    return Image(MediaRef(path=f"/root/{name}"))


def reason(row: object) -> str:
    with pytest.raises(DataError) as caught:
        read(row)
    text = str(caught.value)
    assert text.startswith("coco.jsonl:124: ")
    return text.removeprefix("coco.jsonl:124: ")


def llava(*values: str, roles: tuple[str, ...] = ("human", "gpt"), **more: Any) -> dict[str, Any]:
    turns = [{"from": roles[i % len(roles)], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **more}


def openai(*contents: Any, roles: tuple[str, ...] = ("user", "assistant"), **more: Any) -> dict[str, Any]:
    turns = [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns, **more}


def test_llava_row_keeps_the_text_around_the_mark() -> None:
    sample = read(llava("<image>\nWhat is this?", "A cat.", id="7", image="a.jpg"))
    assert sample == Sample(
        messages=(
            Message("user", (image("a.jpg"), Text("\nWhat is this?"))),
            Message("assistant", (Text("A cat."),)),
        ),
        origin="coco.jsonl:124",
        id="7",
    )


def pseudo(name: str, key: str | None = None, run: int | None = None) -> PseudoText:
    return PseudoText(MediaRef(path=f"/root/{name}", key=key), run=run)


RESERVED = "[UNUSED_TOKEN_140]"


@pytest.mark.parametrize(
    ("question", "files", "parts"),
    [
        ("<image>\n<embedding> x", "a.pt", (image("i"), Text("\n"), pseudo("a.pt"), Text(" x"))),
        (f"<image>\n{RESERVED * 3} x", "a.pt", (image("i"), Text("\n"), pseudo("a.pt", run=3), Text(" x"))),
        (
            f"{RESERVED} {RESERVED * 2}<image>",
            ["a.pt", "b.pt"],
            (pseudo("a.pt", run=1), Text(" "), pseudo("b.pt", run=2), image("i")),
        ),
        (f"<image>{RESERVED}<embedding>", ["a", "b"], (image("i"), pseudo("a", run=1), pseudo("b"))),
        ("<embedding><image>", "s/all.safetensors#a#b/7", (pseudo("s/all.safetensors", "a#b/7"), image("i"))),
        ("<embedding><image>", "a#b.pt", (pseudo("a#b.pt"), image("i"))),
    ],
)
def test_pseudo_text_stands_where_its_mark_or_its_run_of_reserved_tokens_stood(
    question: str, files: str | list[str], parts: tuple[Part, ...]
) -> None:
    sample = read(llava(question, f"{RESERVED * 2} <embedding>", image="i", embedding=files))
    assert sample.messages[0].parts == parts
    assert sample.messages[1].parts == (Text(f"{RESERVED * 2} <embedding>"),), "in an answer both are text"


def test_the_reserved_token_is_text_without_embeddings_and_can_be_another() -> None:
    assert read(llava(RESERVED * 2, "x")).messages[0].parts == (Text(RESERVED * 2),)
    own = read(llava("@@@ x", "x", embedding="a.pt"), pseudo_text_token="@")
    assert own.messages[0].parts == (pseudo("a.pt", run=3), Text(" x"))
    none = read(llava(f"<embedding>{RESERVED}", "x", embeddings=["a.pt"]), pseudo_text_token=None)
    assert none.messages[0].parts == (pseudo("a.pt"), Text(RESERVED))
    with pytest.raises(DataError, match=r"0 <embedding> marks but 1 embedding\. Put <embedding> into a user turn"):
        read(llava(RESERVED, "x", embedding="a.pt"), pseudo_text_token=None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What?\n<image>", (Text("What?\n"), image("a"))),
        ("Compare <image> and\n<ImageHere>\nnow", None),
        ("<image><image>", (image("a"), image("b"))),
        ("<ImageHere> <ImageHere>Please", (image("a"), Text(" "), image("b"), Text("Please"))),
    ],
)
def test_marks_in_any_place(text: str, parts: tuple | None) -> None:
    paths = ["a", "b"][: text.lower().count("<image")]
    expected = parts or (Text("Compare "), image("a"), Text(" and\n"), image("b"), Text("\nnow"))
    assert read(llava(text, "ok", image=paths)).messages[0].parts == expected


def test_pictures_are_handed_out_over_turns_in_order() -> None:
    sample = read(llava("<image> one", "1", "<image> two <image>", "2", images=["a", "b", "c"]))
    assert [part.ref.path for part in sample.images] == ["/root/a", "/root/b", "/root/c"]
    assert [len(m.parts) for m in sample.messages] == [2, 1, 3, 1]


@pytest.mark.parametrize("more", [{}, {"image": None}, {"image": []}, {"images": []}, {"image": ""}])
def test_text_only(more: dict) -> None:
    assert read(llava("hi", "ho", **more)).images == ()


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("user", "bot")])
def test_names_of_roles(roles: tuple[str, str]) -> None:
    assert [m.role for m in read(llava("q", "a", "q", "a", roles=roles)).messages] == ["user", "assistant"] * 2


def test_system_as_a_turn_or_beside_the_turns() -> None:
    turn = llava("be kind", "q", "a", roles=("system", "human", "gpt"))
    assert read(turn).messages == read(llava("q", "a", system="be kind")).messages
    assert read(turn).messages[0] == Message("system", (Text("be kind"),))
    assert reason({**turn, "system": "twice"}).startswith("message 1 is a system turn; expected at most one")
    assert "`system` is a number; expected a string" in reason(llava("q", "a", system=3))


def test_a_mark_in_an_answer_or_system_text_is_text() -> None:
    sample = read(llava("q", "use the <image> tag", system="<image>"))
    assert sample.images == () and sample.messages[2].text == "use the <image> tag"
    text = reason(llava("q", "the <image> tag", image="a"))
    assert text.startswith("0 <image> marks but 1 image. Put <image>") and "1 in the answers count as text" in text


def test_media_without_marks_in_front_of_the_first_question() -> None:
    row = llava("one", "1", "two", "2", images=["a", "b"])
    assert "`unmarked_media: front`" in reason(row)
    first, _, second, _ = read(row, unmarked_media="front").messages
    assert first.parts == (image("a"), Text("\n"), image("b"), Text("\none")) and second.parts == (Text("two"),)
    marked = llava("<image> one", "1", "two", "2", image="a")
    assert read(marked, unmarked_media="front") == read(marked)
    with pytest.raises(DataError, match=r"1 <image> mark but 2 images"):
        read(llava("<image> one", "1", images=["a", "b"]), unmarked_media="front")


def test_ids_and_unknown_keys() -> None:
    assert read(llava("q", "a", id=7, rank=0, width=3, meta={"x": []})).id == "7"
    assert read(llava("q", "a", id=["odd"])).id is None
    assert read(llava("q", "a", id=True)).id is None


def test_keys_that_columns_reads_are_read() -> None:
    row = {"photo": "a.png", "meta": {"label": "cat"}, "rank": 3, "id": 1}
    assert unread_keys(row, Read(columns={"image": "photo", "answer": "meta.label"})) == ["rank"]
    assert sorted(unread_keys(row, Read())) == ["meta", "photo", "rank"]
    assert unread_keys([row], Read()) == []
    parts = [{"type": "image", "image": "a.png", "max_pixels": 100}, {"type": "text", "text": "What?", "fps": 2}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    assert unread_keys({"messages": turns}, Read()) == ["fps of a part", "max_pixels of a part"]


def test_openai_parts() -> None:
    content = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "b.png"},
        {"type": "image", "image": "c.png"},
        {"type": "image", "path": "d.png"},
        {"type": "text", "text": "\nwhat?"},
    ]
    sample = read(openai("be kind", content, [{"type": "text", "text": "ok"}], roles=("system", "user", "assistant")))
    assert sample.messages[1].parts == (
        Text("Look: "), image("a.png"), image("b.png"), image("c.png"), image("d.png"), Text("\nwhat?"),
    )  # fmt: skip
    assert sample.messages[2] == Message("assistant", (Text("ok"),))


def test_openai_with_pictures_listed_at_the_row() -> None:
    marks = read(openai("<image>which <image>?", "b", images=["a", "b"]))
    parts = [{"type": "image"}, {"type": "text", "text": "which "}, {"type": "image"}, {"type": "text", "text": "?"}]
    assert marks.messages == read(openai(parts, "b", images=["a", "b"])).messages
    assert len(marks.images) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "the row is a list; expected an object"),
        ("x", "the row is a string"),
        (None, "the row is null"),
        ({"id": 1, "text": "x"}, "the row has neither `conversations` nor `messages` (its keys: id, text)"),
        ({"conversations": [], "messages": []}, "the row has both `conversations` and `messages`"),
        ({"conversations": {}}, "`conversations` is an object; expected a list of turns"),
        ({"messages": []}, "`messages` is empty"),
        ({"conversations": ["hi"]}, "message 1 is a string; expected an object with `from`"),
        ({"conversations": [{"from": "human"}]}, 'message 1 has no "value".'),
        ({"conversations": [{"value": "x"}]}, 'message 1 has no "from".'),
        ({"conversations": [{"role": "user", "content": "x"}]}, "belong under `messages`"),
        ({"messages": [{"from": "human", "value": "x"}]}, "belong under `conversations`"),
        (llava("q", "a", roles=("human", "robot")), "message 2 has the unknown role 'robot'; expected one of system,"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "message 1 has the unknown role 3"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the text of message 1 is a number; expected a string"),
        ({"conversations": [{"from": "human", "value": None}]}, "the text of message 1 is null"),
        (llava("hello", roles=("gpt",)), "the first turn is the assistant's; expected a user turn first"),
        (llava("hi", "a", "b", roles=("human", "gpt", "gpt")), "messages 2 and 3 are both of the assistant"),
        (llava("hi", "a", "b", roles=("human", "human", "gpt")), "messages 1 and 2 are both of the user"),
        (llava("hi"), "there is no assistant turn"),
        (llava("be kind", roles=("system",)), "there is no assistant turn"),
        (llava("hi", "ho", "and?"), "the last turn is the user's; expected an answer after every question"),
        (llava("hi", " \n"), "the answer in message 2 is empty"),
        (llava("hi", "x", "sys", "b", roles=("human", "gpt", "system", "gpt")), "message 3 is a system turn"),
        (llava("<image><image>", "x", image="a"), "2 <image> marks but 1 image. Add the missing path, or remove a"),
        (llava("<image> <image> <image>", "x"), "3 <image> marks but 0 images. Add the missing paths, or"),
        (llava("what?", "x", image="a"), "0 <image> marks but 1 image. Put <image> into a user turn"),
        (llava("<image>", "x", image=["a", "b"]), "1 <image> mark but 2 images. Put <image>"),
        (llava("<ImageHere>", "x", image=["a", "b"]), "1 <ImageHere> mark but 2 images. Put <ImageHere>"),
        (llava("<ImageHere><image>", "x", image="a"), "2 <image> marks but 1 image. Add the missing path"),
        (llava("<image>", "x", image=3), "`image` is a number; expected a path, a list of paths, or null"),
        (llava("<image>", "x", image=["a", None]), "entry 2 of `image` is null"),
        (llava("<image>", "x", image={"bytes": "x"}), "`image` is an object"),
        (llava("<image>", "x", image="a", images=["a"]), "the row has both `image` and `images`"),
        (llava("<video>", "x"), "1 <video> mark but 0 videos. Add the missing path, or remove a mark."),
        (llava("x", "x", video="a.mp4"), "0 <image> marks but 1 video. Put <image> into a user turn where each video"),
        (llava("<video>", "x", videos=["a", "b"]), "1 <video> mark but 2 videos. Put <video> into"),
        (
            llava("<image>", "x", image="a", embedding="a.pt"),
            "the questions hold 0 places for pseudo-text, but the row lists 1 embedding; expected for each of them "
            "<embedding>, or [UNUSED_TOKEN_140] as often as its file has rows.",
        ),
        (llava("<embedding>", "x"), "1 <embedding> mark but 0 embeddings. Add the missing path"),
        (llava("q", "<embedding>", embedding="a.pt"), "the questions hold 0 places for pseudo-text"),
        (llava("<embedding>", "x", embedding=["a.pt", "b.pt"]), "the questions hold 1 place for pseudo-text, but the"),
        (llava("[UNUSED_TOKEN_140]" * 3, "x", embedding=["a.pt", "b.pt"]), "runs of the token that touch are one"),
        (llava("<embedding>", "x", embedding=[0.1, 0.2]), "entry 1 of `embedding` is a number; expected a path"),
        (llava("<embedding>", "x", embedding="folder/"), "/root/folder/ is a folder; expected a .pt or"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "message 2 has `tool_calls`, which is not supported yet",
        ),
        (openai([{"type": "audio", "audio": "a"}], "x"), "part 1 of message 1 has the type 'audio', which is not"),
        (openai([{"text": "x"}], "x"), "part 1 of message 1 has no `type`"),
        (openai(["x"], "x"), "part 1 of message 1 is a string"),
        (openai([{"type": "text"}], "x"), 'part 1 of message 1 has no "text"'),
        (openai([{"type": "image"}], "x"), "part 1 of message 1 names no picture"),
        (openai([{"type": "image_url", "image_url": {"uri": "a"}}], "x"), "part 1 of message 1 names no picture"),
        (openai("q", [{"type": "image", "image": "a"}]), "part 1 of message 2 is a picture in a turn of the assistant"),
        (openai("q", None), "the text of message 2 is null"),
        (openai("q", "a", roles=("user", "tool")), "message 2 has the unknown role 'tool'"),
        (openai("<image>", "x"), "1 <image> mark but 0 images."),
    ],
)  # fmt: skip
def test_wrong_rows(row: object, said: str) -> None:
    assert reason(row).startswith(said) or said in reason(row)


def test_errors_of_the_locator_get_the_origin() -> None:
    def nowhere(name: str) -> MediaRef:
        raise DataError(f"there is no file {name}")

    with pytest.raises(DataError, match=r"^x\.json:3: there is no file a\.jpg\.$"):
        to_sample(llava("<image>", "x", image="a.jpg"), origin="x.json:3", locate=nowhere)


def test_lone_turns_are_left_out_where_the_source_says_so() -> None:
    roles = ("gpt", "gpt", "human", "gpt", "human")
    row = llava("Hi", "Hi again", "<image>\nHow many?", "Two.", "Sure?", roles=roles, image="a", system="be kind")
    sample = read(row, lone_turns="drop")
    assert [(message.role, message.text) for message in sample.messages] == [
        ("system", "be kind"),
        ("user", "\nHow many?"),
        ("assistant", "Two."),
    ]
    assert "`lone_turns: drop` at the source leaves such turns out" in reason(llava("hi", "ho", "and?"))
    with pytest.raises(DataError, match="0 <image> marks but 1 image"):
        read(llava("hi", "ho", "<image>?", image="a"), lone_turns="drop")
    with pytest.raises(DataError, match="no assistant turn"):
        read(llava("hi"), lone_turns="drop")
