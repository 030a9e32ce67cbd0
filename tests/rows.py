"""Small random pictures on disk and samples about them, for the conformance suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file

from vlmtune.data.sample import Image, MediaRef, Message, Part, PseudoText, Sample, Size, Text


def write_picture(folder: Path, size: Size, seed: int = 0) -> MediaRef:
    """A PNG of smooth noise, `size` = (width, height)."""
    path = folder / f"{size[0]}x{size[1]}-{seed}.png"
    if not path.exists():
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC).save(path)
    return MediaRef(path=str(path))


def conversation(*turns: tuple[str, Sequence[str | MediaRef]], origin: str = "made.jsonl:1") -> Sample:
    """`conversation(("user", [ref, "What?"]), ("assistant", ["A cat."]))`."""

    def part(content: str | MediaRef) -> Part:
        return Text(content) if isinstance(content, str) else Image(content)

    messages = tuple(Message(role, tuple(part(content) for content in contents)) for role, contents in turns)
    return Sample(messages=messages, origin=origin)


def varied_samples(folder: Path) -> list[Sample]:
    """One of each sort of row: a picture, two turns, two pictures interleaved, a system turn, text only."""
    wide, tall, square = (
        write_picture(folder, (100, 40), 1),
        write_picture(folder, (37, 90), 2),
        write_picture(folder, (64, 64), 3),
    )
    return [
        conversation(
            ("user", [wide, "\nWhat is in this picture?"]), ("assistant", ["A cat on a red mat."]), origin="a:1"
        ),
        conversation(
            ("user", [square, "Which digit is this?"]),
            ("assistant", ["It is a seven."]),
            ("user", ["And the menu?"]),
            ("assistant", ["At the top left."]),
            origin="a:2",
        ),
        conversation(
            ("user", ["Left ", tall, " or right ", square, " which is larger?"]), ("assistant", ["first"]), origin="a:3"
        ),
        conversation(
            ("system", ["You are brief."]),
            ("user", [tall, "How many people?"]),
            ("assistant", ["Three."]),
            origin="a:4",
        ),
        conversation(("user", ["2 + 2?"]), ("assistant", ["4, no more."]), origin="a:5"),
    ]


def write_embedding(path: Path, rows: int, length: int, *, seed: int = 0, key: str = "rows") -> MediaRef:
    """A safetensors file with one (rows, length) tensor of noise in float32, or the same as torch.save writes it."""
    tensor = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    if path.suffix == ".safetensors":
        save_file({key: tensor}, path)
    else:
        torch.save(tensor, path)
    return MediaRef(path=str(path))


def embedded_samples(folder: Path, length: int) -> list[Sample]:
    """Pseudo-text with a picture, before and behind it, and alone."""
    page = PseudoText(write_embedding(folder / "page.pt", 3, length))
    line = PseudoText(write_embedding(folder / "line.safetensors", 2, length, seed=1))
    picture = Image(write_picture(folder, (100, 40), 1))

    def about(*parts: Part) -> Sample:
        messages = (Message("user", parts), Message("assistant", (Text("It is a seven."),)))
        return Sample(messages=messages, origin="e:1")

    return [
        about(picture, Text("\n"), page, Text(" and "), line, Text("\nWhat does the screen say?")),
        about(line, Text("\n"), picture, Text("\nWhich menu?")),
        about(Text("Describe "), page),
    ]
