"""A small SentencePiece model of byte pairs with a byte fallback, written without the library of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.convert_slow_tokenizer import import_protobuf

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


def pieces() -> list[tuple[str, float, int]]:
    """(text, score, type); the id is the place."""
    bytes_ = [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    # The ids do not follow the scores: "bc" is joined before "ab".
    words = [("▁", -9.0, _NORMAL), ("a", -9.1, _NORMAL), ("b", -9.2, _NORMAL), ("c", -9.3, _NORMAL)]
    words += [("ab", -2.0, _NORMAL), ("bc", -1.0, _NORMAL), ("▁a", -3.0, _NORMAL), ("[X]", 0.0, _USER)]
    named = [("<unk>", 0.0, _UNKNOWN), ("<s>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
    spare = [(f"[SPARE_{i}]", 0.0, _USER) for i in range(8)]
    return [*named, *bytes_, *words, *spare]


def write_model(into: Path, **spec: Any) -> None:
    """tokenizer.model.

    spec: fields of the normalizer.
    """
    model = import_protobuf().ModelProto()
    for text, score, kind in pieces():
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in spec.items():
        setattr(model.normalizer_spec, name, value)
    (into / "tokenizer.model").write_bytes(model.SerializeToString())
