"""The tokenizers of official InternVL folders, without their Python files.

The official code opens its tokenizers as slow ones (`use_fast=False`). Where the folder holds a SentencePiece model
(InternLM2, Llama, Phi-3), a fast tokenizer is built from it that gives the same ids; Qwen2's files are read by
transformers. What the slow classes do beside SentencePiece is taken from the published behaviour of transformers'
LlamaTokenizer (`legacy`, `add_prefix_space`) and of InternLM2's tokenizer (the model's own settings, and a bos token).

One difference is on purpose: the places of a SentencePiece model that the folder gives to special tokens
(`[UNUSED_TOKEN_146]` is `<|im_start|>`) no longer answer to their old names, so that no text can write a special token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from vlmtune.errors import WeightsError
from vlmtune.models.family import ChatFormat, ModelFolder
from vlmtune.models.internvl.jinja import jinja

CONTEXT_TOKEN = "<IMG_CONTEXT>"
START_TOKEN = "<img>"
END_TOKEN = "</img>"
# The processor wants a token for videos, which it replaces before anything is tokenised. One of the vocabulary that
# nobody writes is better than a new one, which may lie outside the embedding.
_VIDEO_TOKENS = ("<video>", "[UNUSED_TOKEN_139]", "<|placeholder6|>")

_SPACE = "\u2581"  # how SentencePiece writes a space
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# sentencepiece_model.proto, SentencePiece.Type and TrainerSpec.ModelType
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2

# What people write in questions and answers about places in pictures: these are read in any text.
_FREE = frozenset({"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})


def open_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerFast:
    """The tokenizer of an official folder; no code from the folder is run.

    Raises:
        WeightsError: the folder holds no tokenizer that this version reads.
    """
    path = folder.path
    settings = _settings(path)
    if (path / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(path, settings)
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
    plain = _wrapped(
        tokenizer.backend_tokenizer,
        {name: str(value) for name in _NAMED if (value := tokenizer.special_tokens_map.get(name)) is not None},
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
    space = _id(tokenizer, _SPACE)
    if space is None or first in tokenizer.all_special_tokens:
        return ()
    return (space,) if any(part.get("prepend_scheme") == "first" for part in steps) else ()


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    found = tokenizer.backend_tokenizer.token_to_id(token)
    return None if found is None else int(found)


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older folders keep in other files."""
    settings = _json(path / "tokenizer_config.json")
    for name, value in _json(path / "special_tokens_map.json").items():
        settings.setdefault(name, value)
    if "added_tokens_decoder" not in settings:
        special = {_content(settings[name]) for name in _NAMED if settings.get(name)}
        special.update(_content(token) for token in settings.get("additional_special_tokens") or ())
        settings["added_tokens_decoder"] = {
            str(number): {"content": token, "special": token in special}
            for token, number in _json(path / "added_tokens.json").items()
        }
    return settings


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"the file is not JSON: {error}", where=str(file)) from error
    if not isinstance(found, dict):
        raise WeightsError(f"the file holds a {type(found).__name__}", where=str(file), expected="an object")
    return found


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _prefix(settings: Mapping[str, Any]) -> str:
    """never: no space is put before a text; first: before the whole text; model: before every part of it, if the
    SentencePiece model says so (Llama's does, Yi's does not).
    """
    # Left out, `legacy` is true: transformers' LlamaTokenizer before `legacy` was introduced.
    legacy = settings.get("legacy", True) in (True, None)
    if legacy or str(settings.get("tokenizer_class")).startswith("InternLM"):
        return "model"
    return "never" if settings.get("add_prefix_space") is False else "first"


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A SentencePiece model. pieces: (text, score, type), the id being the place."""

    pieces: list[tuple[str, float, int]]
    unknown: str
    adds_space: bool


def _read_pieces(file: Path) -> _Pieces:
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise WeightsError(f"the file is no SentencePiece model: {error}", where=str(file)) from error
    rules, trained = model.normalizer_spec, model.trainer_spec
    if (
        trained.model_type != _BPE
        or not trained.byte_fallback
        or rules.precompiled_charsmap
        or rules.remove_extra_whitespaces
        or not rules.escape_whitespaces
        or trained.treat_whitespace_as_suffix
    ):
        raise WeightsError(
            "the SentencePiece model is of a kind that this version does not read",
            where=str(file),
            expected="byte pairs with a byte fallback, and text left as it stands, as InternLM2, Llama and Phi-3 have",
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    return _Pieces(pieces, trained.unk_piece, bool(rules.add_dummy_prefix))


def _from_sentencepiece(path: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    model = _read_pieces(path / "tokenizer.model")
    prefix = _prefix(settings)
    if prefix == "model":
        prefix = "always" if model.adds_space else "never"
    added = {int(number): token for number, token in settings["added_tokens_decoder"].items()}
    tokenizer = _byte_pairs(model, {number: _content(token) for number, token in added.items()})
    _set_spaces(tokenizer, prefix)
    symbols = [
        AddedToken(text, normalized=False, special=False)
        for number, (text, _, kind) in enumerate(model.pieces)
        if kind == _USER_DEFINED and number not in added
    ]
    tokenizer.add_tokens([*symbols, *(_added(token) for token in added.values())])
    _set_ends(tokenizer, settings, _named(settings))
    return _wrapped(tokenizer, _named(settings), settings)


def _named(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _content(settings[name]) for name in _NAMED if settings.get(name)}


def _with_free_tokens(tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] &= token["content"] not in _FREE
    return _wrapped(Tokenizer.from_str(json.dumps(description)), _named(settings), settings)


def _wrapped(tokenizer: Tokenizer, named: Mapping[str, str], settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Without a chat template: the folder's own is the language model's."""
    others = [_content(token) for token in settings.get("additional_special_tokens") or ()]
    special: Any = settings.get("extra_special_tokens") or [token for token in others if token not in _FREE]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        extra_special_tokens=special,
        model_max_length=int(settings.get("model_max_length") or 10**30),
        clean_up_tokenization_spaces=False,
    )


def _byte_pairs(model: _Pieces, added: Mapping[int, str]) -> Tokenizer:
    """SentencePiece joins the neighbours whose piece has the highest score; control and byte pieces never are."""
    joined = {
        text: number for number, (text, _, kind) in enumerate(model.pieces) if kind == _NORMAL and number not in added
    }
    scores = {text: model.pieces[number][1] for text, number in joined.items()}
    merges = generate_merges(joined, scores)
    vocabulary = {text: number for number, (text, _, _) in enumerate(model.pieces) if number not in added}
    vocabulary |= {text: number for number, text in added.items()}
    return Tokenizer(
        models.BPE(vocabulary, merges, unk_token=model.unknown, fuse_unk=True, byte_fallback=True, dropout=None)
    )


def _set_spaces(tokenizer: Tokenizer, prefix: str) -> None:
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix == "always" else spaces
    if prefix == "first":
        # Metaspace leaves a text alone that begins with its own sign, SentencePiece does not: so this one's sign is
        # a space, of which there are none left, and the next turns it into SentencePiece's.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
            ]
        )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix != "never" else steps)


def _added(token: Any) -> AddedToken:
    flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")}
    flags["special"] &= token["content"] not in _FREE
    return AddedToken(token["content"], normalized=False, **flags)


def _set_ends(tokenizer: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    wanted = {"bos_token": settings.get("add_bos_token", True), "eos_token": settings.get("add_eos_token", False)}
    front, back = ([named[name]] if wanted[name] and name in named else [] for name in ("bos_token", "eos_token"))
    if front or back:
        single = " ".join(f"{part}:0" for part in (*front, "$A", *back))
        pairs = [(token, tokenizer.token_to_id(token)) for token in (*front, *back)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
