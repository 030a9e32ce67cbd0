"""The formats that people arrive with, the rows of the five pipelines' own pages among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.schema import Read, SourceConfig
from vlmtune.data.rows.adapters import check_columns, to_sample
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Box, Image, MediaRef, Message, Part, PseudoText, Sample, Text, Video
from vlmtune.errors import ConfigError, DataError

INLINE = MediaRef(path="cell", inline=b"png")


def read(row: object, **options: Any) -> Sample:
    return to_sample(
        row, origin="a.jsonl:1", locate=lambda name: MediaRef(path=f"/r/{name}"), options=Read.model_validate(options)
    )


def reason(row: object, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(row, **options)
    text = str(caught.value)
    assert text.startswith("a.jsonl:1: ") and "\n" not in text
    return text.removeprefix("a.jsonl:1: ")


def image(name: str) -> Image:
    return Image(MediaRef(path=f"/r/{name}"))


def video(name: str) -> Video:
    return Video(MediaRef(path=f"/r/{name}"))


def user(*parts: Part | str) -> Message:
    return Message("user", _parts(parts))


def assistant(*parts: Part | str) -> Message:
    return Message("assistant", _parts(parts))


def system(text: str) -> Message:
    return Message("system", (Text(text),))


def _parts(parts: tuple[Part | str, ...]) -> tuple[Part, ...]:
    return tuple(Text(part) if isinstance(part, str) else part for part in parts)


# LLaMA-Factory


def test_alpaca_rows_of_llama_factory() -> None:
    row = {
        "instruction": "<image>Sum up.",
        "input": "One. Two.",
        "output": "Three.",
        "system": "Be brief.",
        "history": [["Hi", "Ho"], ["He", "Ha"]],
        "images": ["a.jpg"],
    }
    assert read(row).messages == (
        system("Be brief."),
        user("Hi"),
        assistant("Ho"),
        user("He"),
        assistant("Ha"),
        user(image("a.jpg"), "Sum up.\nOne. Two."),
        assistant("Three."),
    )
    assert read({"instruction": "Q", "input": "", "output": "A"}).messages == (user("Q"), assistant("A"))
    assert read({"instruction": "", "input": "Q", "output": "A"}).messages == (user("Q"), assistant("A"))


def test_sharegpt_rows_of_llama_factory_with_videos() -> None:
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "A cat."}]
    assert read({"conversations": turns, "videos": ["a.mp4"], "images": [], "system": "", "tools": ""}).messages == (
        user(video("a.mp4"), "What?"),
        assistant("A cat."),
    )
    assert "has `tools`, which is not supported" in reason({"conversations": turns, "tools": "[{}]"})
    assert "the unknown role 'function_call'" in reason({"conversations": [{"from": "function_call", "value": "x"}]})
    assert "has `rejected`" in reason({"conversations": turns, "rejected": {"from": "gpt", "value": "x"}})


# ms-swift


def test_query_and_response_of_ms_swift() -> None:
    row = {"query": "<image>Q2", "response": "A2", "history": [["Q1", "A1"]], "images": ["a.jpg"], "system": None}
    assert read(row).messages == (user("Q1"), assistant("A1"), user(image("a.jpg"), "Q2"), assistant("A2"))
    in_front = read({"query": "Q2", "response": "A2", "history": [["Q1", "A1"]], "images": ["a.jpg", "b.jpg"]})
    assert in_front.messages[0] == user(image("a.jpg"), "\n", image("b.jpg"), "\nQ1")


def test_pairs_of_ms_swift() -> None:
    pairs = [{"human": "<image>Q1", "assistant": "A1"}, {"human": "Q2", "assistant": "A2"}]
    assert read({"system": "S", "conversation": pairs, "images": ["a"]}).messages == (
        system("S"),
        user(image("a"), "Q1"),
        assistant("A1"),
        user("Q2"),
        assistant("A2"),
    )
    assert 'pair 1 of `conversation` has no "human"' in reason({"conversation": [{"user": "x", "assistant": "y"}]})


def test_turns_under_the_other_name_say_how_to_read_them() -> None:
    row = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert "say `columns: {messages: conversations}` at the source." in reason(row)
    assert read(row, columns={"messages": "conversations"}).messages == (user("q"), assistant("a"))


def test_messages_of_ms_swift_with_boxes() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>Find the <ref-object>."},
            {"role": "assistant", "content": "[<bbox><bbox>], no other <ref-object>"},
        ],
        "images": ["a.jpg"],
        "objects": {"ref": ["sheep", "goat"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]},
    }
    assert read(row).messages == (
        user(image("a.jpg"), "Find the sheep."),
        assistant("[", Box((90.9, 160.8, 135, 212.8)), Box((360.9, 480.8, 495, 532.8)), "], no other goat"),
    )
    row["objects"] |= {"bbox_type": "norm1", "bbox": [[0, 0, 1, 0.5], [0.25, 0.5, 0.5, 1]]}  # type: ignore[operator]
    assert [box.unit for box in read(row).messages[1].parts if isinstance(box, Box)] == ["unit", "unit"]
    only_boxes = {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "<bbox><bbox><ref-object>"}]}  # type: ignore[index]
    assert len(read(only_boxes).messages[1].parts) == 3


def test_boxes_on_one_of_several_pictures() -> None:
    row = {
        "query": "<image><image> Where?",
        "response": "<bbox>",
        "images": ["a", "b"],
        "objects": {"ref": [], "bbox": [[1, 2, 300, 400]], "bbox_type": "norm1000", "image_id": [1]},
    }
    assert read(row).messages[1] == assistant(Box((1, 2, 300, 400), picture=1, unit="thousand"))


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (None, "1 <bbox> mark but 0 in `bbox` of `objects`"),
        ("[]", "`objects` is a string"),
        ([{"bbox": [1, 2, 3, 4]}], "`objects` is a list; expected {"),
        ({"bbox": [1, 2, 3, 4]}, "box 1 is a number; expected four numbers, [left, top, right, bottom]"),
        ({"bbox": [[1, 2]]}, "box 1 has 2 numbers"),
        ({"bbox": [[1, 2, 3, "4"]]}, "box 1 has 3 numbers"),
        ({"bbox": [[1, 2, True, 4]]}, "box 1 has 3 numbers"),
        ({"bbox": [[30, 2, 3, 4]]}, "box 1 is [30, 2, 3, 4]; expected [left, top, right, bottom], from 0, with left ≤"),
        ({"bbox": [[-1, 2, 3, 4]]}, "box 1 is [-1, 2, 3, 4]"),
        ({"bbox": [[0, 0, 1, float("inf")]]}, "box 1 is [0, 0, 1, inf]"),
        ({"bbox": [[0, 0, 1, float("nan")]]}, "box 1 is [0, 0, 1, nan]"),
        ({"bbox": [[0, 0, 1, 10**400]]}, "box 1 has a number that is too large"),
        ({"bbox": [[0, 0, 1, 2]], "bbox_type": "norm1"}, "at most 1, with left ≤ right and top ≤ bottom. Look whether"),
        ({"bbox": [[0, 0, 1, 2]], "bbox_type": "pixel"}, "`bbox_type` is 'pixel'; expected one of real, norm1000, n"),
        ({"bbox": [[0, 0, 1, 2], [0, 0, 1, 2]]}, "1 <bbox> mark but 2 in `bbox` of `objects`"),
        ({"bbox": [[0, 0, 1, 2]], "ref": ["x"]}, "0 <ref-object> marks but 1 in `ref` of `objects`"),
        ({"bbox": [[0, 0, 1, 2]], "image_id": [1]}, "box 1 is on picture 1 (counted from 0), but the row has 1"),
        ({"bbox": [[0, 0, 1, 2]], "image_id": []}, ""),
        ({"bbox": [[0, 0, 1, 2]], "image_id": [0, 0]}, "`image_id` has 2 entries, but `bbox` has 1"),
        ({"bbox": [[0, 0, 1, 2]], "image_id": ["0"]}, "entry 1 of `image_id` is a string"),
        ({"bbox": {}}, "`bbox` of `objects` is an object"),
    ],
)  # fmt: skip
def test_boxes_that_are_none(objects: object, said: str) -> None:
    row = {"query": "<image> Where?", "response": "<bbox>", "images": ["a"], "objects": objects}
    if not said:
        assert read(row)
        return
    assert said in reason(row)
    assert reason({**row, "query": "Where?", "images": []})


@pytest.mark.parametrize(("key", "value"), [("loss", False), ("loss", 0.5), ("weight", 0)])
def test_answers_that_are_not_to_be_trained_are_refused(key: str, value: object) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: value}]
    assert f"message 2 says `{key}`: " in reason({"messages": turns})
    turns[1][key] = 1
    assert read({"messages": turns})


# the_cauldron, flat rows, captions


def test_rows_of_the_cauldron() -> None:
    row = {
        "images": [INLINE, {"bytes": b"jpg", "path": "x.jpg"}],
        "texts": [
            {"user": "Which?", "assistant": "B", "source": "AI2D"},
            {"user": "Why?", "assistant": "So.", "source": "AI2D"},
        ],
    }
    second = Image(MediaRef(path="x.jpg", inline=b"jpg"))
    assert read(row).messages == (
        user(Image(INLINE), "\n", second, "\nWhich?"),
        assistant("B"),
        user("Why?"),
        assistant("So."),
    )
    assert "`texts` is empty" in reason({"images": [INLINE], "texts": []})
    assert 'pair 1 of `texts` has no "assistant"' in reason({"texts": [{"user": "x"}]})
    assert "pair 1 of `texts` is a string" in reason({"texts": ["x"]})


def test_flat_rows() -> None:
    assert read({"question": "What?", "answer": "A", "image": INLINE}).messages == (
        user(Image(INLINE), "\nWhat?"),
        assistant("A"),
    )
    marked = read({"question": "See <image>?", "answer": "A", "image": "a", "caption": "noted"})
    assert marked.messages[0] == user("See ", image("a"), "?")
    assert read({"question": "What?", "answer": "A"}).messages == (user("What?"), assistant("A"))
    assert read({"question": "What?", "answer": "A", "video": "a.mp4"}).messages[0] == user(video("a.mp4"), "\nWhat?")
    assert "has `question` but no `answer`" in reason({"question": "x"})
    assert "has `output` but no `instruction`" in reason({"output": "x"})
    assert "`answer` is a list; expected a string" in reason({"question": "x", "answer": ["a", "b"]})
    assert "`answer` is empty" in reason({"question": "x", "answer": " "})
    assert "has both `instruction` / `output` and `question` / `answer`" in reason(
        {"instruction": "a", "output": "b", "question": "c", "answer": "d"}
    )
    assert "pair 2 of `history` is a string" in reason({"query": "a", "response": "b", "history": [["a", "b"], "c"]})


def test_captions_and_the_prompt_of_the_source() -> None:
    row = {"image": "a.jpg", "caption": "A cat."}
    assert "has a `caption` and no question. Set `prompt`" in reason(row)
    expected = (user(image("a.jpg"), "\nDescribe it."), assistant("A cat."))
    assert read(row, prompt="Describe it.").messages == expected
    assert read({"image": "a.jpg", "answer": "A cat."}, prompt="Describe it.").messages == expected
    behind = read(row, prompt="Describe <image> now.").messages
    assert behind[0] == user("Describe ", image("a.jpg"), " now.")
    assert read({**row, "answer": "Own", "question": "Q"}, prompt="Describe it.").messages[1] == assistant("Own")


def test_columns() -> None:
    row = {"photo": "a.jpg", "label": 3, "meta": {"text": "A cat."}, "answer": "of another time", "a.b": "Q"}
    columns = {"image": "photo", "answer": "meta.text", "question": "a.b"}
    assert read(row, columns=columns).messages == (user(image("a.jpg"), "\nQ"), assistant("A cat."))
    said = reason(row, columns={"answer": "lable"})
    assert "the row has no `lable`, which `columns` gives for `answer` (its keys: photo, label, meta" in said
    swapped = {"question": "A", "answer": "Q"}
    assert read(swapped, columns={"question": "answer", "answer": "question"}).messages == (user("Q"), assistant("A"))
    check_columns(["image", "answer"])
    with pytest.raises(ConfigError, match=r"columns: 'anwser' is no name that vlmtune knows; expected answer, perhaps"):
        check_columns(["anwser"])


# media


def test_videos() -> None:
    parts = [
        {"type": "video_url", "video_url": {"url": "file:///a.mp4"}},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "What?"},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    assert read({"messages": turns}).messages[0] == user(video("file:///a.mp4"), video("b.mp4"), "What?")
    both = {"conversations": [{"from": "human", "value": "<image><video><image>"}, {"from": "gpt", "value": "A"}]}
    assert read({**both, "image": ["a", "b"], "video": "v"}).messages[0] == user(image("a"), video("v"), image("b"))
    assert "1 <video> mark but 0 videos" in reason({**both, "image": ["a", "b"]})
    assert "2 <image> marks but 0 images" in reason({**both, "video": "v"}), "with a <video>, <image> is a picture"
    llava = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]}
    assert read({**llava, "video": "v.mp4"}).messages[0] == user(video("v.mp4"), "\nWhat?")
    assert "lists frames; expected the path of a video" in reason(
        {"messages": [{"role": "user", "content": [{"type": "video", "video": ["1.jpg", "2.jpg"]}]}, turns[1]]}
    )


def test_pictures_in_the_row_itself_and_folders() -> None:
    row = {"question": "Q", "answer": "A"}
    path_only = {"bytes": None, "path": "a.jpg"}
    assert read({**row, "images": [INLINE, path_only]}).images == (Image(INLINE), image("a.jpg"))
    assert "`image` is an object" in reason({**row, "image": {"bytes": None, "path": None}})
    assert "`image` is bytes" in reason({**row, "image": b"png"})
    assert "/r/frames/ is a folder; expected a picture" in reason({**row, "image": "frames/"})
    assert read({**row, "video": "frames/"}).messages[0].parts[0] == video("frames/")


# the pages of the five pipelines

XCOMPOSER = """[ { "id": "0", "image": ["path/to/image_0.jpg", "path/to/image_1.jpg"],
  "conversations": [
    {"from": "user", "value": "<ImageHere> <ImageHere>Please describe these two images in detail."},
    {"from": "assistant", "value": "The first image......"} ] },
  { "id": "1", "image": ["path/to/image_1.jpg"],
  "conversations": [ {"from": "user", "value": "<ImageHere> what is the color of the dog"},
    {"from": "assistant", "value": "it is ...."} ] } ]"""
XCOMPOSER_TEXT = """[ { "id": "0", "conversations": [ {"from": "user", "value": "你好"},
  {"from": "assistant", "value": "你好，我是浦语·灵笔，一个支持图文创作的多模态大模型。"} ] } ]"""


def test_the_rows_on_the_pages_of_the_pipelines(tmp_path: Path) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    for i in range(2):
        (tmp_path / f"path/to/image_{i}.jpg").touch()
    (tmp_path / "path/to/vl_data.json").write_text(XCOMPOSER)
    (tmp_path / "path/to/text_data.json").write_text(XCOMPOSER_TEXT)
    (tmp_path / "data.txt").write_text("path/to/vl_data.json 10\npath/to/text_data.json 5\n")
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "data.txt"))])
    first, second, third = (corpus.sample(i) for i in range(3))
    path = f"{tmp_path}/path/to/image_"
    one, two = Image(MediaRef(path=f"{path}0.jpg")), Image(MediaRef(path=f"{path}1.jpg"))
    assert first.messages[0] == user(one, " ", two, "Please describe these two images in detail.")
    assert second.messages[0] == user(two, " what is the color of the dog") and not third.images
    assert [source.options.choose for source in corpus.sources] == [10_000, 5_000]


RUN = "[UNUSED_TOKEN_140]" * 4


def test_the_row_of_the_e_it_page(tmp_path: Path) -> None:
    row = {
        "id": 3,
        "embedding": "xxx.pt",
        "image": "/data/luoyx/finetuned_data/929_data/train_img/2137.jpg",
        "conversations": [{"from": "human", "value": "<image>" + RUN}, {"from": "gpt", "value": "xxx"}],
        "rank": 0,
    }
    (tmp_path / "train_img").mkdir()
    (tmp_path / "train_img/2137.jpg").touch()
    path = tmp_path / "samples.json"
    (tmp_path / "xxx.pt").touch()
    path.write_text(json.dumps([row]))
    source = SourceConfig(path=str(path))
    with pytest.raises(DataError, match=r"samples.json:1: the absolute path .* `replace_prefix: ") as caught:
        open_corpus([source]).sample(0)
    prefix = "/data/luoyx/finetuned_data/929_data/"
    assert f"{{{prefix}: {tmp_path}/}}" in str(caught.value)
    mapped = source.model_copy(update={"replace_prefix": {prefix: f"{tmp_path}/"}})
    picture, embedding = (MediaRef(path=f"{tmp_path}/{name}") for name in ("train_img/2137.jpg", "xxx.pt"))
    assert open_corpus([mapped]).sample(0).messages[0].parts == (Image(picture), PseudoText(embedding, run=4))


def test_pictures_named_inside_the_text_are_refused() -> None:
    """Qwen-VL's first notation: the picture would be trained as words."""
    turns = [
        {"from": "user", "value": "Picture 1: <img>a/b.JPG</img>\nWhat?"},
        {"from": "assistant", "value": "A cat."},
    ]
    assert reason({"conversations": turns}).startswith("a turn names its picture inside the text, as <img>path</img>")
    turns[0]["value"] = "What does <img>text</img> mean in XML?"
    assert read({"conversations": turns}).messages[0] == user("What does <img>text</img> mean in XML?")
