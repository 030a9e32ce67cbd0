"""The tiny models of `tiny.py`, made so wide that 4-bit blocks of 64 numbers fit their rows."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tiny import KINDS

WIDTH, INNER = 64, 128


def save_wide(kind: str, folder: Path) -> Path:
    """Writes the model of `kind` with all widths of tower and language model multiples of 64; a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = KINDS[kind](folder)
    generation = (folder / "generation_config.json").read_text()
    text, vision = config.text_config, config.vision_config
    for part in (text, vision):
        part.hidden_size, part.intermediate_size = WIDTH, INNER
    if kind.startswith("qwen"):
        vision.out_hidden_size = WIDTH
        text.rope_parameters["mrope_section"] = [2, 3, 3]
    text.head_dim = WIDTH // text.num_attention_heads
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    return folder
