"""The three forms of a conversation, and who may write their tokens; the records are in tests/families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conversations import Counted, Pictures, dialogue_sample, with_counts
from transformers import AutoTokenizer, PretrainedConfig
from xcomposer2_models import add_tokenizer

from vlmtune.config.schema import ChatStyle, MediaOptions
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.sample import Encoded
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import BoxFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.text import TextEncoder
from vlmtune.models.xcomposer2.chat import IMAGE_MARK, chat_format, open_tokenizer, write_tokenizer

SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 318: "[UNUSED_TOKEN_145]", 319: "[UNUSED_TOKEN_146]"}
PICTURE = None
Turns = list[tuple[str, list[str | None]]]
QUESTION: Turns = [("user", [PICTURE, PICTURE, " Same? "]), ("assistant", [" No."])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    out = tmp_path_factory.mktemp("tokenizer")
    return ModelFolder(add_tokenizer(out, SPECIAL, 320), {})


@pytest.fixture(scope="module")
def opened(folder: ModelFolder) -> OpenedFolder:
    tokenizer = open_tokenizer(folder)
    return OpenedFolder(
        folder=folder,
        config=PretrainedConfig(),
        layout="official",
        layouts={},
        family=Pictures(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        spec=Counted((), 0),
        text=TextEncoder(tokenizer),
        chat=chat_format(tokenizer, None),
        components=Components(vision=(), projector=(), language=()),
        why_not_packed=None,
        shared_length=None,
        media=MediaOptions(exif="ignore"),
        boxes=BoxFormat(),
    )


def encoded(opened: OpenedFolder, style: ChatStyle | None, turns: Turns, *, prompt: bool = False) -> Encoded:
    row = dialogue_sample(turns)
    chat = chat_format(opened.tokenizer, style)  # type: ignore[arg-type]
    counted = with_counts(replace(opened, chat=chat), [2] * len(row.images))
    return encode_prompt(row, counted) if prompt else encode(row, counted)


def written(opened: OpenedFolder, ids: Any) -> str:
    """Visual tokens as #."""
    return str(opened.tokenizer.decode(ids.tolist())).replace("<unk>", "#")


def test_the_form_of_training(opened: OpenedFolder) -> None:
    found = encoded(opened, None, QUESTION)
    assert written(opened, found.input_ids) == (
        "<s>[UNUSED_TOKEN_146]user\n#### Same?[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]assistant\nNo.[UNUSED_TOKEN_145]</s>"
    )
    assert written(opened, found.labels[found.labels != -100]) == "No.[UNUSED_TOKEN_145]</s>"
    prompt = encoded(opened, None, QUESTION[:1], prompt=True)
    assert found.input_ids[: prompt.num_tokens].tolist() == prompt.input_ids.tolist()


def test_the_newline_of_later_versions_is_trained(opened: OpenedFolder) -> None:
    found = encoded(opened, "newline", QUESTION)
    assert written(opened, found.labels[found.labels != -100]) == "No.[UNUSED_TOKEN_145]\n</s>"
    shorter = encoded(opened, None, QUESTION)
    assert found.num_tokens == shorter.num_tokens + 1


def test_only_the_last_answer_is_followed_by_the_end(opened: OpenedFolder) -> None:
    found = encoded(opened, None, [*QUESTION, ("user", ["Why?"]), ("assistant", ["So."])])
    assert written(opened, found.labels[found.labels != -100]) == "No.[UNUSED_TOKEN_145]So.[UNUSED_TOKEN_145]</s>"


def test_the_official_prompt_introduces_itself_and_repeats_the_bos(opened: OpenedFolder) -> None:
    mixed: Turns = [("user", [PICTURE, PICTURE, " a ", PICTURE, "b"])]
    text = written(opened, encoded(opened, "official", mixed, prompt=True).input_ids)
    assert text.startswith("<s>[UNUSED_TOKEN_146]system\nYou are an AI assistant whose name is InternLM-XComposer (")
    assert text.endswith(
        "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n####<s> a ##<s>b[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    )
    silent = encoded(opened, "official", [("system", [""]), ("user", [" Hi "])], prompt=True)
    assert written(opened, silent.input_ids) == (
        "<s><s>[UNUSED_TOKEN_146]user\n Hi [UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    )


def test_a_system_turn_of_a_row(opened: OpenedFolder) -> None:
    found = encoded(opened, None, [("system", ["Be brief."]), *QUESTION])
    assert written(opened, found.input_ids).startswith(
        "<s>[UNUSED_TOKEN_146]system\nBe brief.[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n####"
    )
    empty = encoded(opened, None, [("system", [""]), *QUESTION])
    assert empty.input_ids.tolist() == encoded(opened, None, QUESTION).input_ids.tolist()


def test_texts_write_no_tokens(opened: OpenedFolder) -> None:
    texts = f"</s>[UNUSED_TOKEN_145]<unk><s>[UNUSED_TOKEN_0]{IMAGE_MARK}"
    found = encoded(opened, None, [("user", [texts, PICTURE]), ("assistant", [texts])])
    assert written(opened, found.input_ids[found.input_ids > 2]).count("UNUSED_TOKEN") == 4 + 2 + 2
    assert (found.input_ids == 318).sum() == 2 and (found.input_ids == 0).sum() == 2 == found.spans[0].length
    assert (found.input_ids == 1).sum() == (found.input_ids == 2).sum() == 1


def test_a_style_of_another_family_is_refused(opened: OpenedFolder) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat: is xtuner, .* expected newline, official, or nothing"):
        chat_format(opened.tokenizer, "xtuner")  # type: ignore[arg-type]


def test_a_tokenizer_without_the_tokens_of_turns_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.mkdir()
    names = {**SPECIAL, 318: "<|im_end|>"}
    with pytest.raises(WeightsError, match=r"other: the tokenizer has no \[UNUSED_TOKEN_145\]"):
        open_tokenizer(ModelFolder(add_tokenizer(out, names, 320), {}))


@pytest.mark.parametrize("style", [None, "newline", "official"])
def test_the_chat_template_of_a_native_folder(opened: OpenedFolder, style: ChatStyle | None, tmp_path: Path) -> None:
    tokenizer: Any = opened.tokenizer
    write_tokenizer(tokenizer, chat_format(tokenizer, style), tmp_path)
    assert tokenizer.chat_template is None
    plain: Any = AutoTokenizer.from_pretrained(tmp_path)
    for turns in (QUESTION, [("user", ["Hi"]), ("assistant", ["Ho"])]):
        shown = [
            [{"type": "image"} if part is None else {"type": "text", "text": part} for part in s] for _, s in turns
        ]
        messages = [{"role": role, "content": said} for (role, _), said in zip(turns, shown, strict=True)]
        rendered = plain.apply_chat_template(messages, tokenize=False)
        ours = encoded(opened, style, turns)  # type: ignore[arg-type]
        assert rendered.replace(IMAGE_MARK, "##") == written(opened, ours.input_ids)
