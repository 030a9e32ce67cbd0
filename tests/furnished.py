"""Recorded InternVL weights as a folder that the program opens: with a tokenizer, of which the records hold the ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmtune.weights.layout import Link

_RECORDED = {
    "img": "<img>", "img_end": "</img>", "img_context": "<IMG_CONTEXT>", "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
}  # fmt: skip
"""Key of `special_token_ids` in meta.json -> token."""
_OF_TEMPLATES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # their ids are not recorded: Phi-3's roles


def furnish(case: Path, out: Path) -> Path:
    """`out` with the weights and config.json of a recorded case (linked), and a tokenizer of its vocabulary's size."""
    out.mkdir(parents=True)
    for file in case.iterdir():
        if file.name == "config.json" or file.name.startswith("model"):
            (out / file.name).symlink_to(file)
    return add_tokenizer(case, out)


def add_tokenizer(case: Path, out: Path) -> Path:
    """A word-level tokenizer in `out` with the recorded special tokens; all other ids are words of no language."""
    size = int(json.loads((case / "config.json").read_text(encoding="utf-8"))["llm_config"]["vocab_size"])
    ids = json.loads((case / "meta.json").read_text(encoding="utf-8"))["special_token_ids"]
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, **{token: ids[key] for key, token in _RECORDED.items()}}
    free = sorted(set(range(3, size)) - set(special.values()))
    special |= dict(zip(_OF_TEMPLATES, free, strict=False))
    words = {f"t{number}": number for number in free[len(_OF_TEMPLATES) :]}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token=max(words, key=lambda word: words[word])))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(sorted(special, key=lambda token: special[token]))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", bos_token="<s>"
    )
    fast.save_pretrained(out)
    return out


def recorded_batch(case: Path, name: str) -> dict[str, Any]:
    """A recorded batch as arguments of transformers' class, which takes the tiles that are shown and no flags."""
    io = load_file(case / "io.safetensors")
    shown = io[f"{name}.input.image_flags"].flatten().bool()
    given = {key: io[f"{name}.input.{key}"] for key in ("input_ids", "attention_mask", "labels")}
    return {**given, "pixel_values": io[f"{name}.input.pixel_values"][shown], "use_cache": False}


def official_grads(model: Any, links: list[Link]) -> dict[str, torch.Tensor]:
    """The gradients under official names, fused as the official tensors are."""
    parameters = dict(model.named_parameters())
    found = {}
    for link in links:
        grads = tuple(parameters[name].grad for name in link.parameters if name in parameters)
        if grads:
            whole = tuple(torch.zeros(1) if grad is None else grad for grad in grads)
            found[link.disk] = link.op.join(whole) if all(grad is not None for grad in grads) else torch.zeros(1)
    return found
