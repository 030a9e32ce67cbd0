"""The tokenizers of official InternVL folders, without their Python files.

The official code opens its tokenizers as slow ones (`use_fast=False`). Where the folder holds a SentencePiece model
(InternLM2, Llama, Phi-3), a fast tokenizer is built from it that gives the same ids (`models.sentencepiece`); Qwen2's
files are read by transformers.

One difference is on purpose: the places of a SentencePiece model that the folder gives to special tokens
(`[UNUSED_TOKEN_146]` is `<|im_start|>`) no longer answer to their old names, so that no text can write a special token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from vlmtune.errors import WeightsError
from vlmtune.models import sentencepiece
from vlmtune.models.family import ChatFormat, ModelFolder
from vlmtune.models.jinja import jinja

CONTEXT_TOKEN = "<IMG_CONTEXT>"
START_TOKEN = "<img>"
END_TOKEN = "</img>"
# The processor wants a token for videos, which it replaces before anything is tokenised. One of the vocabulary that
# nobody writes is better than a new one, which may lie outside the embedding.
_VIDEO_TOKENS = ("<video>", "[UNUSED_TOKEN_139]", "<|placeholder6|>")

# What people write in questions and answers about places in pictures: these are read in any text.
_FREE = frozenset({"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})


def open_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerFast:
    """The tokenizer of an official folder; no code from the folder is run.

    Raises:
        WeightsError: the folder holds no tokenizer that this version reads.
    """
    path = folder.path
    settings = sentencepiece.read_settings(path)
    if (path / sentencepiece.FILE).is_file():
        tokenizer = sentencepiece.build(path, settings, free=_FREE)
    elif all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        tokenizer = _with_free_tokens(Qwen2Tokenizer.from_pretrained(path, trust_remote_code=False), settings)
    elif (path / "tokenizer.json").is_file():
        tokenizer = _with_free_tokens(PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False), settings)
    else:
        raise WeightsError(
            "the folder has no tokenizer",
            where=str(path),
            expected="tokenizer.model, or vocab.json and merges.txt, or tokenizer.json",
            remedy="Copy the missing files from the model's repository.",
        )
    return tokenizer


def context_token_id(tokenizer: PreTrainedTokenizerFast, *, where: str) -> int:
    """The id that stands for one picture feature.

    Raises:
        WeightsError: the vocabulary lacks one of the three tokens of pictures.
    """
    missing = [token for token in (CONTEXT_TOKEN, START_TOKEN, END_TOKEN) if _id(tokenizer, token) is None]
    if missing:
        raise WeightsError(
            f"the vocabulary lacks {', '.join(missing)}",
            where=where,
            expected=f"{START_TOKEN}, {END_TOKEN} and {CONTEXT_TOKEN} among the added tokens",
            remedy="This is the language model's own tokenizer. Copy the tokenizer files of the InternVL folder.",
        )
    found = _id(tokenizer, CONTEXT_TOKEN)
    assert found is not None
    return found


def check_fits(tokenizer: PreTrainedTokenizerFast, chat: ChatFormat, vocab_size: int, *, where: str) -> None:
    """That every id which a conversation can hold has a row in the embedding.

    Special tokens come from the chat format and from pictures only, so an unused special one may lie outside.

    Args:
        vocab_size: rows of the embedding.

    Raises:
        WeightsError: naming the tokens outside.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = (chat.opening, *(chat.system_opening or ()), chat.user_lead, chat.bridge, chat.answer_lead, chat.again)
    laid = "".join((*written, chat.close, *chat.image, *(chat.block or ()), CONTEXT_TOKEN))
    ids = {*chat.prefix_ids, *chat.stop_ids}
    outside = [
        token
        for token, number in sorted(vocabulary.items(), key=lambda item: item[1])
        if number >= vocab_size and (token not in special or token in laid or number in ids)
    ]
    if outside:
        named = ", ".join(f"{token!r} ({vocabulary[token]})" for token in outside[:3])
        raise WeightsError(
            f"the tokenizer is longer than the embedding: {named}{' and more' if len(outside) > 3 else ''} lie outside "
            f"its {vocab_size} rows",
            where=where,
            expected=f"ids below {vocab_size}",
            remedy="The tokenizer files belong to another model, or tokens were added to them afterwards.",
        )


def write_native(tokenizer: PreTrainedTokenizerFast, chat: ChatFormat, out: Path) -> None:
    """The tokenizer files of a native folder, as transformers' InternVLProcessor wants them, the chat template among
    them.

    Args:
        out: an existing folder.
    """
    video = next((token for token in _VIDEO_TOKENS if _id(tokenizer, token) is not None), _VIDEO_TOKENS[0])
    # Not the language model's own class: it would build its tokenizer anew, without what the SentencePiece model says.
    plain = sentencepiece.wrapped(
        tokenizer.backend_tokenizer,
        {
            name: str(value)
            for name in sentencepiece.NAMED
            if (value := tokenizer.special_tokens_map.get(name)) is not None
        },
        {
            "model_max_length": tokenizer.model_max_length,
            "extra_special_tokens": {
                "start_image_token": START_TOKEN,
                "end_image_token": END_TOKEN,
                "context_image_token": CONTEXT_TOKEN,
                "video_token": video,
            },
        },
    )
    plain.chat_template = jinja(chat, tokenizer, CONTEXT_TOKEN, video)
    plain.save_pretrained(out)


def lone_space(tokenizer: PreTrainedTokenizerFast, first: str) -> tuple[int, ...]:
    """The id of the space that Llama's slow tokenizer leaves in front of a text which begins with the token `first`.

    It puts a space before every text, and takes it back only in front of a token that the folder names as special; an
    added token that is not named so (Phi-3's role tokens) keeps it.
    """
    step = tokenizer.backend_tokenizer.pre_tokenizer
    described = json.loads(step.__getstate__()) if step is not None else {}
    steps = described.get("pretokenizers", [described])
    space = _id(tokenizer, sentencepiece.SPACE)
    if space is None or first in tokenizer.all_special_tokens:
        return ()
    return (space,) if any(part.get("prepend_scheme") == "first" for part in steps) else ()


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    found = tokenizer.backend_tokenizer.token_to_id(token)
    return None if found is None else int(found)


def _with_free_tokens(tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] &= token["content"] not in _FREE
    inner = Tokenizer.from_str(json.dumps(description))
    return sentencepiece.wrapped(inner, sentencepiece.named(settings), settings, free=_FREE)
