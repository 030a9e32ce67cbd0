"""The conversation: what the model is asked after some turns, and what does not end the loop."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
from rows import write_embedding
from videos import write_video

from vlmtune.config.schema import MediaOptions
from vlmtune.data.sample import Image, MediaRef, PseudoText, Sample, Text, Video
from vlmtune.infer.repl import Conversation, converse


class Parrot:
    """Answers with what it was asked, and keeps the samples."""

    located = SimpleNamespace(media=MediaOptions())
    opened = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8)))

    def __init__(self) -> None:
        self.asked: list[Sample] = []

    def stream(self, sample: Sample, max_new_tokens: int) -> Generator[str, None, None]:
        self.asked.append(sample)
        text = sample.messages[-1].text.lstrip("\n")
        if text == "interrupt":
            yield "half"
            raise KeyboardInterrupt
        yield from (text.upper(), "!")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a cat.png"
    PIL.Image.new("RGB", (8, 8)).save(file)
    return file


def talk(*lines: str) -> tuple[Parrot, str, list[str]]:
    parrot: Any = Parrot()
    inputs = iter(lines)
    written: list[str] = []
    complaints: list[str] = []
    converse(Conversation(parrot), lambda: next(inputs, None), written.append, complaints.append)
    return parrot, "".join(written), complaints


def roles_and_texts(sample: Sample) -> list[tuple[str, str, int]]:
    return [(m.role, m.text, len(m.parts)) for m in sample.messages]


def test_turns_build_on_each_other(picture: Path) -> None:
    parrot, written, complaints = talk("hello", f"/image {picture}", f"/image {picture}", "what is it?", "sure?")
    assert roles_and_texts(parrot.asked[-1]) == [
        ("user", "hello", 1),
        ("assistant", "HELLO!", 1),
        ("user", "\n\nwhat is it?", 4),  # each picture on a line of its own
        ("assistant", "WHAT IS IT?!", 1),
        ("user", "sure?", 1),
    ]
    assert "HELLO!\n" in written and not complaints


def test_a_missing_picture_is_one_paragraph_and_the_loop_goes_on(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    parrot, written, complaints = talk(f"/image {tmp_path}/gone.png", f"/image {tmp_path}/text.png", "hello")
    assert len(complaints) == 2
    assert "gone.png" in complaints[0] and "text.png" in complaints[1]
    assert all("\n" not in one for one in complaints)
    assert len(parrot.asked[0].images) == 0 and "HELLO!" in written


def test_reset_forgets_turns_and_pictures(picture: Path) -> None:
    parrot, _, _ = talk("hello", f"/image {picture}", "/reset", "again")
    assert roles_and_texts(parrot.asked[-1]) == [("user", "again", 1)]


def test_quit_leaves_and_unknown_commands_help() -> None:
    parrot, written, _ = talk("/dance", "", "/quit", "hello")
    assert not parrot.asked
    assert "there is no command /dance" in written


def test_an_interrupted_answer_is_no_part_of_the_conversation(picture: Path) -> None:
    parrot, written, _ = talk(f"/image {picture}", "interrupt", "hello")
    assert "stopped" in written
    assert roles_and_texts(parrot.asked[-1]) == [("user", "\nhello", 2)]  # the picture still waits


def test_several_quoted_paths(picture: Path) -> None:
    parrot, _, complaints = talk(f"/image '{picture}' '{picture}'", "hello")
    assert not complaints and len(parrot.asked[0].images) == 2


def test_videos_wait_beside_pictures(picture: Path, tmp_path: Path) -> None:
    film = write_video(tmp_path / "a film.mp4", codec="libx264", num_frames=10)
    frames = tmp_path / "frames"
    frames.mkdir()
    PIL.Image.new("RGB", (8, 8)).save(frames / "1.png")
    parrot, written, complaints = talk(
        f"/video {film}", f"/image {picture}", f"/video {frames}", "/video", f"/video {picture}", "what happens?"
    )
    assert [type(part) for part in parrot.asked[0].messages[0].parts] == [Video, Text, Image, Text, Video, Text]
    assert "1 video in your next turn" in written and "1 picture and 2 videos in your next turn" in written
    assert "usage: /video PATH" in written
    assert len(complaints) == 1 and "a cat.png is not a video" in complaints[0]


def test_embeddings_stand_at_their_marks_or_in_front(tmp_path: Path, picture: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "all.safetensors"
    write_embedding(one, 3, 8)
    write_embedding(two, 2, 8, key="page#2")
    first, second = f"/embedding {one}", f"/embedding {two}#page#2"
    parrot, written, complaints = talk(
        first, second, f"/image {picture}", "<embedding> and <embedding>?", "<embedding>"
    )
    a, b = (PseudoText(MediaRef(path=str(path), key=key)) for path, key in ((one, None), (two, "page#2")))
    shown = Image(MediaRef(path=str(picture)))
    assert not complaints and "1 picture and 2 embeddings in your next turn" in written
    assert parrot.asked[0].messages[0].parts == (shown, Text("\n"), a, Text(" and "), b, Text("?"))
    assert parrot.asked[1].messages[-1].parts == (Text("<embedding>"),), "none waits, so it is text"
    parrot, _, _ = talk(first, f"/image {picture}", "what?")
    assert parrot.asked[0].messages[0].parts == (a, Text("\n"), shown, Text("\nwhat?"))


def test_embeddings_that_are_refused(tmp_path: Path) -> None:
    write_embedding(tmp_path / "a.pt", 3, 8)
    (tmp_path / "b.pt").write_text("no tensor here")
    add = f"/embedding {tmp_path}/"
    write_embedding(tmp_path / "c.pt", 3, 9)
    parrot, _, complaints = talk(
        f"{add}gone.pt", f"{add}b.pt", f"{add}a.pt", "<embedding> <embedding>", "<embedding>", f"{add}c.pt"
    )
    assert len(complaints) == 4 and all("\n" not in one for one in complaints)
    assert "c.pt has rows of 9 numbers; expected 8, as the input of" in complaints[3]
    assert "gone.pt cannot be opened" in complaints[0] and "b.pt begins with b'no tensor'" in complaints[1]
    assert "the question says <embedding> 2 times, and 1 embedding would stand there; expected one" in complaints[2]
    assert [len(sample.messages[-1].parts) for sample in parrot.asked] == [1]


def test_pictures_stand_where_the_question_marks_them(tmp_path: Path, picture: Path) -> None:
    """Two names of one mark; a medium of another kind, which has none, stands in front."""
    other = tmp_path / "dog.png"
    PIL.Image.new("RGB", (8, 8)).save(other)
    write_embedding(tmp_path / "one.pt", 3, 8)
    parrot, _, complaints = talk(
        f"/image {picture}", f"/image {other}", f"/embedding {tmp_path / 'one.pt'}",
        "First: <ImageHere>, second: <image>. Which?", "what is <image>?",
    )  # fmt: skip
    first, second = Image(MediaRef(path=str(picture))), Image(MediaRef(path=str(other)))
    words = PseudoText(MediaRef(path=str(tmp_path / "one.pt")))
    assert not complaints
    assert parrot.asked[0].messages[0].parts == (
        words, Text("\nFirst: "), first, Text(", second: "), second, Text(". Which?"),
    )  # fmt: skip
    assert parrot.asked[1].messages[-1].parts == (Text("what is <image>?"),), "none waits, so it is text"


@pytest.mark.parametrize(("marks", "count"), [("<image>", 1), ("<image> <image> <image>", 3)])
def test_marks_and_pictures_that_differ_in_number(marks: str, count: int, picture: Path) -> None:
    parrot, _, complaints = talk(f"/image {picture}", f"/image {picture}", marks)
    assert not parrot.asked
    assert f"the question says <image> {count} times, and 2 pictures would stand there" in complaints[0]
