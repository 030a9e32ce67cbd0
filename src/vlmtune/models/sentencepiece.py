"""Fast tokenizers out of SentencePiece models, without the library of that name.

A model of byte pairs with a byte fallback (Llama, InternLM2, Phi-3) becomes a fast tokenizer that gives the ids of the
slow classes. What those do beside SentencePiece is taken from the published behaviour of transformers' LlamaTokenizer
(`legacy`, `add_prefix_space`) and of InternLM2's tokenizer (the model's own settings, and a bos token).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from vlmtune.errors import WeightsError

FILE = "tokenizer.model"
SPACE = "\u2581"
"""How SentencePiece writes a space."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_NOTHING: frozenset[str] = frozenset()
# sentencepiece_model.proto, SentencePiece.Type and TrainerSpec.ModelType
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2


def read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older folders keep in other files.

    Raises:
        WeightsError: a file that is no JSON object.
    """
    settings = _json(path / "tokenizer_config.json")
    for name, value in _json(path / "special_tokens_map.json").items():
        settings.setdefault(name, value)
    if "added_tokens_decoder" not in settings:
        special = {content(settings[name]) for name in NAMED if settings.get(name)}
        special.update(content(token) for token in settings.get("additional_special_tokens") or ())
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


def content(token: Any) -> str:
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


def build(path: Path, settings: Mapping[str, Any], *, free: frozenset[str] = _NOTHING) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a SentencePiece model.

    Args:
        settings: see `read_settings`.
        free: added tokens that are read in any text, whatever the folder says of them.

    Raises:
        WeightsError: a model of another kind, or none.
    """
    model = _read_pieces(path / FILE)
    prefix = _prefix(settings)
    if prefix == "model":
        prefix = "always" if model.adds_space else "never"
    added = {int(number): token for number, token in settings["added_tokens_decoder"].items()}
    tokenizer = _byte_pairs(model, {number: content(token) for number, token in added.items()})
    _set_spaces(tokenizer, prefix)
    symbols = [
        AddedToken(text, normalized=False, special=False)
        for number, (text, _, kind) in enumerate(model.pieces)
        if kind == _USER_DEFINED and number not in added
    ]
    tokenizer.add_tokens([*symbols, *(_added(token, free) for token in added.values())])
    _set_ends(tokenizer, settings, named(settings))
    return wrapped(tokenizer, named(settings), settings, free=free)


def named(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: content(settings[name]) for name in NAMED if settings.get(name)}


def wrapped(
    tokenizer: Tokenizer, named: Mapping[str, str], settings: Mapping[str, Any], *, free: frozenset[str] = _NOTHING
) -> PreTrainedTokenizerFast:
    """Without a chat template: the folder's own is the language model's."""
    others = [content(token) for token in settings.get("additional_special_tokens") or ()]
    special: Any = settings.get("extra_special_tokens") or [token for token in others if token not in free]
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
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix == "always" else spaces
    if prefix == "first":
        # Metaspace leaves a text alone that begins with its own sign, SentencePiece does not: so this one's sign is
        # a space, of which there are none left, and the next turns it into SentencePiece's.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            ]
        )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix != "never" else steps)


def _added(token: Any, free: frozenset[str]) -> AddedToken:
    flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")}
    flags["special"] &= token["content"] not in free
    return AddedToken(token["content"], normalized=False, **flags)


def _set_ends(tokenizer: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    wanted = {"bos_token": settings.get("add_bos_token", True), "eos_token": settings.get("add_eos_token", False)}
    front, back = ([named[name]] if wanted[name] and name in named else [] for name in ("bos_token", "eos_token"))
    if front or back:
        single = " ".join(f"{part}:0" for part in (*front, "$A", *back))
        pairs = [(token, tokenizer.token_to_id(token)) for token in (*front, *back)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
