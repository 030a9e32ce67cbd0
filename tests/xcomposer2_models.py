"""Recorded InternLM-XComposer2 weights as a folder that the program opens: with a tokenizer for the recorded ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def furnish(case: Path, out: Path) -> Path:
    """`out` with the weights and settings of a recorded model (linked), and a tokenizer of its vocabulary's size."""
    out.mkdir(parents=True)
    for file in case.iterdir():
        if file.name in ("config.json", "vision_tower_config.json") or file.name.startswith("model"):
            (out / file.name).symlink_to(file.absolute())
    constants = json.loads((case / "constants.json").read_text(encoding="utf-8"))
    places = {constants["end_token_id"]: "[UNUSED_TOKEN_145]", constants["start_token_id"]: "[UNUSED_TOKEN_146]"}
    return add_tokenizer(out, {0: "<unk>", 1: "<s>", 2: "</s>", **places}, constants["vocab_size"])


def add_tokenizer(out: Path, special: dict[int, str], size: int) -> Path:
    """A tokenizer of bytes in `out`, with special tokens at their ids; what is left of the `size` ids nobody writes."""
    free = [number for number in range(size) if number not in special]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(symbols) <= len(free), "too small a vocabulary for all bytes"
    names = [*symbols, *(f"[UNUSED_TOKEN_{i}]" for i in range(len(free) - len(symbols)))]
    vocabulary = {name: number for number, name in zip(free, names, strict=True)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, **{name: number for number, name in special.items()}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special.values(), *names[len(symbols) :]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(out)
    return out
