"""The conversations of InternLM-XComposer2, and its tokenizer: InternLM2's SentencePiece model under its own names.

Turns stand between `[UNUSED_TOKEN_146]` and `[UNUSED_TOKEN_145]`, which the official code takes from any text; here
they are special tokens, so that no question can write them. The forms are those of the official fine-tuning scripts
(`data_mix.py`) and of the official `chat`; both are compared with records of that code
(tests/families/test_golden_xcomposer2_data.py).
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from vlmtune.config.schema import ChatStyle
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import ChatFormat, ModelFolder
from vlmtune.models.internvl import tokenizer as internlm
from vlmtune.models.jinja import jinja

IMAGE_MARK = "<ImageHere>"
"""Stands for a picture in the text of official rows and prompts; it is no token."""

_START, _END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
_UNUSED = re.compile(r"\[UNUSED_TOKEN_\d+\]")
_USER = f"{_START}user\n"
_ANSWER = f"{_START}assistant\n"
_SYSTEM = f"{_START}system\n"
# `meta_instruction` of the official `chat`, when it is left out.
_INTRODUCTION = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文.\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on the "
    "provided image."
)


def open_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerFast:
    """The tokenizer of an official folder (`tokenizer.model`) or of a native one (`tokenizer.json`).

    Its ids are those of the official slow tokenizer, but for the tokens that a text must not write.

    Raises:
        WeightsError: no tokenizer, or one without the tokens of the chat format.
    """
    tokenizer = internlm.open_tokenizer(folder)
    unused = sorted(token for token in tokenizer.get_added_vocab() if _UNUSED.fullmatch(token))
    missing = [token for token in (_START, _END) if token not in unused]
    missing += [name for name in ("bos_token", "eos_token") if name not in tokenizer.special_tokens_map]
    if missing:
        raise WeightsError(
            f"the tokenizer has no {', '.join(missing)}, which begin and end what this model reads",
            where=str(folder.path),
            expected="the tokenizer files of an InternLM-XComposer2 folder",
            remedy="Copy them from the model's repository.",
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in unused], special_tokens=True)
    return tokenizer


def chat_format(tokenizer: PreTrainedTokenizerFast, style: ChatStyle | None) -> ChatFormat:
    """
    Args:
        style: None: as the official fine-tuning scripts lay rows down with the transformers that they name (4.33),
            whose slow tokenizer strips the newline before `</s>`. newline: with 4.34 or later, which keep and train
            it. official: as the official `chat` asks: its system turn unless the conversation has one, texts left
            untrimmed, a bos before each stretch of text, and two before a conversation without pictures.

    Raises:
        ConfigError: a style of another family.
    """
    if style == "xtuner":
        raise ConfigError(
            "is xtuner, which has no form for InternLM-XComposer2",
            where="model.chat",
            expected="newline, official, or nothing for the form of the official fine-tuning scripts",
        )
    eos, bos = str(tokenizer.eos_token), int(tokenizer.bos_token_id)
    chat = ChatFormat(
        opening=_USER,
        prefix_ids=(bos,),
        system_opening=(_SYSTEM, f"{_END}\n{_USER}"),
        bare_opening=_USER,
        bridge=f"{_END}\n{_ANSWER}",
        stop=_END,
        again=f"{_END}\n{_USER}",
        close=_END + ("\n" if style == "newline" else "") + eos,
        trains_close=True,
        image=("", ""),
        strips_ends=True,
        fold_newlines=False,
        stop_ids=(tokenizer.get_vocab()[_END], int(tokenizer.eos_token_id)),
    )
    if style != "official":
        return chat
    return replace(
        chat,
        opening=f"{_SYSTEM}{_INTRODUCTION}{_END}\n{_USER}",
        text_prefix_ids=(bos, bos),
        repeats_prefix=True,
        strips_ends=False,
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, chat: ChatFormat, out: Path) -> None:
    """The tokenizer files of a native folder, its chat template among them.

    The template writes `<ImageHere>` where a picture stands. As the vocabulary has no such token, the text between two
    marks is tokenised by itself, and the visual tokens go between.

    Args:
        out: an existing folder.
    """
    template = jinja(chat, tokenizer, IMAGE_MARK, IMAGE_MARK)
    if chat.repeats_prefix:
        template = _with_prefixes(template, chat, tokenizer)
    plain = deepcopy(tokenizer)
    plain.chat_template = template
    plain.save_pretrained(out)


def _with_prefixes(template: str, chat: ChatFormat, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template with `prefix_ids` before every text behind a picture, and `text_prefix_ids` where there is none."""
    before = "".join(tokenizer.convert_ids_to_tokens(list(chat.prefix_ids)))
    alone = "".join(tokenizer.convert_ids_to_tokens(list(chat.text_prefix_ids or chat.prefix_ids)))
    mark = IMAGE_MARK
    return (
        "{%- set laid -%}\n" + template + "{%- endset -%}\n"
        f"{{%- if '{mark}' in laid -%}}{{{{ laid | replace('{mark}', '{mark}{before}')"
        f" | replace('{before}{mark}', '{mark}') }}}}\n"
        f"{{%- else -%}}{{{{ laid | replace('{before}', '{alone}', 1) }}}}{{%- endif -%}}\n"
    )
