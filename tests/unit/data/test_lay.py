"""A conversation as pieces: what boxes, frames and white space become beside text."""

from __future__ import annotations

import pytest

from vlmtune.data.lay import lay
from vlmtune.data.media.video import Film
from vlmtune.data.sample import Box, Image, MediaRef, Message, Part, PseudoText, Text, Video
from vlmtune.errors import DataError
from vlmtune.models.family import ChatFormat, FrameFormat

REF = MediaRef(path="x")
PICTURE, VIDEO, BOX, PSEUDO = Image(REF), Video(REF), Box((0, 0, 1, 1)), PseudoText(REF)
FILM = Film((REF, REF, REF), ((1, 1),) * 3, (0.0, 61.5, 3605.0), 3700.0)
NUMBERED = FrameFormat(before="F{number}: ", joint=", ", close=";")


def chat(**more: object) -> ChatFormat:
    base = {"opening": "(", "bridge": "|", "stop": "!", "again": "!(", "close": "!)", "image": ("<", ">")}
    return ChatFormat(**{**base, **more})


def shown(parts: list[Part], form: ChatFormat, films: tuple[Film, ...] = (FILM,)) -> str:
    """The user's content, media as [number], boxes as {}."""
    messages = [Message("user", tuple(parts)), Message("assistant", (Text("a"),))]
    pieces = lay(messages, form, prompt=False, films=films, write_box=lambda box: "{}")
    text = "".join(f"[{piece}]" if isinstance(piece, int) else piece.text for piece in pieces)
    return text.removeprefix("(").removesuffix("|a!)")


def test_frames_with_and_without_words_around_them() -> None:
    parts = [Text("look "), VIDEO, Text("\nwhy?")]
    assert shown(parts, chat()) == "look <[0]><[1]><[2]>why?"
    assert shown(parts, chat(frames=NUMBERED)) == "look F1: [0], F2: [1], F3: [2];why?"
    assert shown(parts, chat(frames=NUMBERED, fold_newlines=False)) == "look F1: [0], F2: [1], F3: [2];\nwhy?"
    timed = FrameFormat(opening="{count} in {duration}", before=" {time}", count_in_words=True)
    assert shown(parts, chat(frames=timed)) == "look three in 1:01:40 00:00[0] 01:01[1] 60:05[2]why?"


def test_media_are_numbered_in_their_order() -> None:
    two = (FILM, Film((REF,), ((1, 1),), (0.0,), 1.0))
    parts = [PICTURE, VIDEO, PICTURE, Text("x"), VIDEO]
    assert shown(parts, chat(), two) == "<[0]><[1]><[2]><[3]><[4]>x<[5]>"
    assert shown(parts, chat(images_first=True), two) == "<[0]><[1]><[2]><[3]><[4]><[5]>x"


def test_the_lead_of_a_turn_stands_before_text_only() -> None:
    form = chat(user_lead=" ")
    assert shown([Text("x"), PICTURE], form) == " x<[0]>"
    assert shown([PICTURE, Text("x")], form) == "<[0]>x"
    assert shown([VIDEO], form) == "<[0]><[1]><[2]>"
    assert shown([VIDEO], chat(user_lead=" ", frames=NUMBERED)) == " F1: [0], F2: [1], F3: [2];"
    assert shown([BOX, Text("x")], form) == " {}x"


def test_a_box_sticks_to_the_words_beside_it() -> None:
    form = chat(images_first=True, text_joint=" ")
    assert shown([Text("is"), BOX, Text("red"), PICTURE, Text("or"), Text("blue")], form) == "<[0]>is{}red or blue"
    assert shown([PICTURE, BOX, Text("\nx")], form) == "<[0]>{}\nx"


def test_trimming_stops_at_a_box() -> None:
    form = chat(strips=True, fold_newlines=False)
    assert shown([Text("  is "), BOX, Text(" ")], form) == "is {}"
    assert shown([Text("  "), BOX, Text("  x  "), PICTURE, Text(" \n")], form) == "{}  x<[0]>"


def test_trimming_the_ends_of_a_turn_keeps_the_text_beside_pictures() -> None:
    form = chat(strips_ends=True, fold_newlines=False)
    assert shown([Text("  "), PICTURE, Text(" x "), PICTURE, Text("\n y \n")], form) == "<[0]> x <[1]>\n y"
    assert shown([Text(" x "), PICTURE, Text(" \n")], form) == "x <[0]>"


def test_all_pictures_of_a_turn_in_one_block() -> None:
    form = chat(image=("", ""), images_first=True, block=("{", "}", "\n"), strips_ends=True, fold_newlines=False)
    assert shown([Text("a "), PICTURE, Text("\nb "), PICTURE], form) == "{[0][1]}\na \nb"
    assert shown([PICTURE, VIDEO], form) == "{[0][1][2][3]}"
    assert shown([Text(" no picture ")], form) == "no picture"


def test_special_tokens_of_a_box_are_the_templates_and_its_training_is_the_turns() -> None:
    messages = [Message("user", (Text("q"), BOX)), Message("assistant", (Text("a "), BOX, Text(" b")))]
    pieces = lay(messages, chat(), prompt=False, write_box=lambda box: "{}")
    found = [(p.text, p.trained, p.template) for p in pieces if not isinstance(p, int) and p.text]
    assert found == [
        ("(", False, True),
        ("q", False, False),
        ("{}", False, True),
        ("|", False, True),
        ("a ", True, False),
        ("{}", True, True),
        (" b", True, False),
        ("!", True, True),
        (")", False, True),
    ]


def test_pseudo_text_stands_among_words_whatever_is_done_with_pictures() -> None:
    parts = [Text(" a "), PSEUDO, Text("\n"), PICTURE, Text("\nb "), PSEUDO]
    assert shown(parts, chat()) == " a [0]\n<[1]>b [2]"
    assert shown(parts, chat(images_first=True, text_joint="+")) == "<[1]> a [0]\n+b [2]"
    block = chat(images_first=True, block=("{", "}", ": "))
    assert shown([PSEUDO, Text(" a "), PICTURE], block) == "{<[1]>}: [0] a"
    assert shown([PICTURE, PSEUDO, Text("\nx ")], chat(strips=True)) == "<[0]>[1]\nx"
    assert shown([Text("\n"), PSEUDO, PICTURE], chat(strips_ends=True)) == "[0]<[1]>"
    assert shown([PSEUDO], chat(user_lead=" ")) == " [0]"
    assert shown([PSEUDO, PICTURE], chat(user_lead=" ")) == " [0]<[1]>"


def test_what_has_no_place() -> None:
    with pytest.raises(DataError, match="a turn of the assistant holds a picture"):
        lay([Message("assistant", (PICTURE,))], chat(), prompt=False)
    with pytest.raises(DataError, match="a turn of the assistant holds pseudo-text"):
        lay([Message("assistant", (Text("a"), PSEUDO))], chat(), prompt=False)
    with pytest.raises(DataError, match="no place for one"):
        lay([Message("system", (Text("x"),))], chat(), prompt=False)
    folder = Film((REF,), ((1, 1),), None, None)
    with pytest.raises(DataError, match="when each frame is shown"):
        shown([VIDEO], chat(frames=FrameFormat(before="{time}")), (folder,))
    assert shown([VIDEO], chat(frames=NUMBERED), (folder,)) == "F1: [0];"
