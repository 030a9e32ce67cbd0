"""Small random pictures on disk and samples about them, for the conformance suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from vlmtune.data.sample import Image, MediaRef, Message, Part, Sample, Size, Text


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
