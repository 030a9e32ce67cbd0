"""Official InternVL folders as users have them, made of the recorded tokenizer files; no weights."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golden import tokenizer_folder

from vlmtune.models.family import ModelFolder

KINDS: Mapping[str, str] = {"internlm2": "tokenizer", "qwen2": "tokenizer_qwen2", "phi3": "tokenizer_phi3"}
"""Language model -> its tokenizer among the records."""
_ARCHITECTURES = {"internlm2": "InternLM2ForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM"}


def folder(language: str, template: str, out: Path) -> ModelFolder:
    """An official folder's config.json and tokenizer files in `out`."""
    source = tokenizer_folder(KINDS[language])
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copyfile(file, out / file.name)
        elif file.suffix == ".xz":
            (out / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
    if (out / "merges.txt").exists() and not (out / "vocab.json").exists():
        write_vocabulary(out)
    config: dict[str, Any] = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": template,
        "llm_config": {"architectures": [_ARCHITECTURES[language]]},
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelFolder(out, config)


def write_vocabulary(folder: Path) -> None:
    """Qwen2's vocab.json: the 256 byte symbols in GPT-2's order, then one id for each merge."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    pieces = [*symbols, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
