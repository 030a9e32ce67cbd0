"""Chat formats of official folders, beside what the golden records hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from official_models import official_folder
from tiny import make_tokenizer
from transformers import PreTrainedTokenizerFast

from vlmtune.config.schema import ChatStyle, MediaOptions
from vlmtune.data.lay import lay
from vlmtune.data.sample import Image, MediaRef, Message, Part, Text
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import ChatFormat, ModelFolder
from vlmtune.models.internvl.chat import native_chat, official_chat
from vlmtune.models.jinja import jinja
from vlmtune.models.load import open_folder
from vlmtune.models.native import refuse_style
from vlmtune.models.template import lay_text, probe
from vlmtune.models.text import TextEncoder

PICTURE = Image(MediaRef(path="x"))
IM = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(["<pad>", *(special or IM)], eos=(special or IM)[1], extra={})


def chat(template: str, style: ChatStyle = "official", special: tuple[str, ...] = ()) -> ChatFormat:
    return official_chat(ModelFolder(Path("somewhere"), {"template": template}), tokenizer(*special), style=style)


def laid(form: ChatFormat, *turns: tuple[Any, list[Part]], prompt: bool = False) -> str:
    """Text with the pictures as [number]."""
    messages = [Message(role, tuple(parts)) for role, parts in turns]
    pieces = lay(messages, form, prompt=prompt)
    return "".join(f"[{piece}]" if isinstance(piece, int) else piece.text for piece in pieces)


def test_internvl_2_5_ends_turns_with_a_newline() -> None:
    """Its strings as OpenGVLab's conversation.py has them; the newline behind an answer is not trained."""
    form = chat("internvl2_5")
    turns = [("user", ["Q"]), ("assistant", ["A"]), ("user", ["R"])]
    system = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    assert lay_text(form, turns, "", prompt=True) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )
    pieces = lay([Message("user", (Text("Q"),)), Message("assistant", (Text("A"),))], form, prompt=False)
    assert [piece.text for piece in pieces if not isinstance(piece, int) and piece.trained] == ["", "A", "<|im_end|>"]


def test_a_system_turn_takes_the_place_of_the_default() -> None:
    form = chat("Hermes-2")
    text = laid(form, ("system", [Text("Be brief.")]), ("user", [Text("Q")]), prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"


def test_xtuner_shows_all_pictures_of_a_turn_in_one_block() -> None:
    form = chat("internlm2-chat", "xtuner")
    question: list[Part] = [Text(" A: "), PICTURE, Text("\nB: "), PICTURE, Text("\n")]
    text = laid(form, ("user", question), ("assistant", [Text(" x ")]), ("user", [PICTURE]), prompt=True)
    assert text.removeprefix(form.opening) == (
        "<img>[0][1]</img>\nA: \nB:<|im_end|><|im_start|>assistant\nx<|im_end|><|im_start|>user\n<img>[2]</img>"
        "<|im_end|><|im_start|>assistant\n"
    )
    assert "InternLM (书生·浦语)." in form.opening


def test_ends_of_a_turn_are_trimmed_where_the_training_code_does() -> None:
    question: list[Part] = [Text("  "), PICTURE, Text("\n  x  ")]
    assert (
        laid(chat("internlm2-chat"), ("user", question), prompt=True).count("user\n<img>[0]</img>\n  x<|im_end|>") == 1
    )
    assert laid(chat("Hermes-2"), ("user", question), prompt=True).count("user\n  <img>[0]</img>\n  x  <|im_end|>") == 1


def test_generation_ends_at_the_separator_and_at_the_end_of_the_text() -> None:
    form, known = chat("Hermes-2"), tokenizer()
    assert form.stop_ids == (known.convert_tokens_to_ids("<|im_end|>"),)
    other = make_tokenizer(["<pad>", *IM, "</s>"], eos="</s>", extra={})
    both = official_chat(ModelFolder(Path("x"), {"template": "Hermes-2"}), other)
    assert both.stop_ids == tuple(other.convert_tokens_to_ids(["<|im_end|>", "</s>"]))


@pytest.mark.parametrize("template", ["nobody-knows", None])
def test_an_unknown_template_is_refused_with_the_known_ones(template: str | None) -> None:
    with pytest.raises(
        WeightsError, match=r"not known; expected `template` as one of internlm2-chat, Hermes-2"
    ) as found:
        official_chat(ModelFolder(Path("somewhere"), {"template": template}), tokenizer())
    assert found.value.where == "somewhere"


def test_a_template_of_another_language_model_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"no special token <\|system\|>"):
        chat("phi3-chat")


def test_xtuner_has_no_form_of_other_templates() -> None:
    with pytest.raises(ConfigError, match=r"model\.chat: is xtuner, but this model's chat template is Hermes-2"):
        chat("Hermes-2", "xtuner")


@pytest.mark.parametrize("template", ["internlm2-chat", "Hermes-2", "internvl2_5", "internvl_zh"])
def test_the_jinja_template_is_cut_into_the_same_pieces(template: str) -> None:
    special = (*IM, "</s>") if template == "internvl_zh" else IM
    known = tokenizer(*special)
    form = official_chat(ModelFolder(Path("x"), {"template": template}), known)
    again = native_chat(probe(known, jinja(form, known, IM[4], "<video>"), IM[4], TextEncoder(known), place="x"))
    kept = {"stop_ids": again.stop_ids, "frames": again.frames}
    assert again == replace(form, **kept)


def test_xtuners_form_is_exported_with_a_block_for_each_picture() -> None:
    known = tokenizer()
    form = chat("internlm2-chat", "xtuner")
    again = probe(known, jinja(form, known, IM[4], "<video>"), IM[4], TextEncoder(known), place="x")
    turns = [("user", [{"type": "image"}, "Q"])]
    assert lay_text(again, turns, IM[4], prompt=True) == form.opening + "<IMG_CONTEXT>\nQ" + form.bridge


def test_the_option_reaches_the_chat_format(tmp_path: Path) -> None:
    folder = official_folder("internlm2", tmp_path / "internlm2")
    assert open_folder(folder).chat.block is None
    assert open_folder(folder, MediaOptions(chat="xtuner")).chat.block == ("<img>", "</img>", "\n")
    with pytest.raises(ConfigError, match="template is Hermes-2"):
        open_folder(official_folder("qwen2", tmp_path / "qwen2"), MediaOptions(chat="xtuner"))


def test_folders_with_a_chat_template_know_no_other_style() -> None:
    refuse_style("official")
    for style, owner in (("xtuner", "InternVL in its official layout"), ("newline", "InternLM-XComposer2")):
        with pytest.raises(ConfigError, match=f"is {style}, but this folder brings its own.*is known for {owner}"):
            refuse_style(style)  # type: ignore[arg-type]


def test_a_form_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.chat: is newline, which InternLM-XComposer2 has"):
        chat("internlm2-chat", "newline")
