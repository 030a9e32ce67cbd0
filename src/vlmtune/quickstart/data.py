"""Real handwritten digits as PNG files, with conversations in LLaVA JSON: two small tasks to train on.

Every picture belongs to one of three splits, and rows of a split show pictures of that split only: `train`, `val`
(watched during training, decides which checkpoint is best) and `test` (looked at only to report figures).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import PIL.Image

from vlmtune.files import write_atomic

SIDE = 32
"""Width and height of the PNG files, in pixels."""
NUM_DIGITS = 1797
SPLITS = {"train": 1317, "val": 120, "test": 360}
"""Pictures per split."""
NUM_PAIRS = {"train": 4000, "val": 200, "test": 360}
"""Two-picture rows per split."""
QUESTION = "<image>\nWhich digit is this?"
PAIR_QUESTION = "<image>\n<image>\nWhich digit is larger, the first or the second?"
_SEED = 20


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (1797, 8, 8) with ink 0 … 16, and the digits int64 (1797,)."""
    packed = resources.files("vlmtune.quickstart").joinpath("digits.csv.gz").read_bytes()
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.int64)
    return table[:, :64].astype(np.uint8).reshape(-1, 8, 8), table[:, 64]


def draw(pixels: np.ndarray) -> bytes:
    """A PNG of `SIDE` × `SIDE` pixels, black on white, from ink values uint8 (8, 8)."""
    grey = 255 - np.round(pixels * (255 / 16)).astype(np.uint8)
    picture = PIL.Image.fromarray(grey).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_data(folder: Path) -> None:
    """Writes `images/*.png`, and `digits.*.json` and `pairs.*.json` for each split; the same bytes every time."""
    pixels, digits = load_digits()
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    names = [f"images/{index:04d}.png" for index in range(len(digits))]
    for name, picture in zip(names, pixels, strict=True):
        (folder / name).write_bytes(draw(picture))
    rng = np.random.default_rng(_SEED)
    shuffled = rng.permutation(len(digits))
    bounds = np.cumsum([0, *SPLITS.values()])
    for number, split in enumerate(SPLITS):
        members = shuffled[bounds[number] : bounds[number + 1]]
        singles = [digit_row(names[index], int(digits[index])) for index in members]
        pairs = [
            pair_row(f"pair-{split}-{count}", [names[first], names[second]], int(digits[first]), int(digits[second]))
            for count, (first, second) in enumerate(_pairs(members, digits, NUM_PAIRS[split], rng))
        ]
        write_rows(folder / f"digits.{split}.json", singles)
        write_rows(folder / f"pairs.{split}.json", pairs)
    licence = resources.files("vlmtune.quickstart").joinpath("digits.LICENSE.md").read_bytes()
    write_atomic(folder / "LICENSE.md", licence)


def _pairs(members: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` pairs of picture indices, of two different digits each, all pairs of digits equally likely."""
    of = [members[digits[members] == digit] for digit in range(10)]
    wanted = [rng.choice(10, size=2, replace=False) for _ in range(count)]
    return [(int(rng.choice(of[first])), int(rng.choice(of[second]))) for first, second in wanted]


def digit_row(image: str, digit: int) -> dict[str, object]:
    """One LLaVA row about one picture."""
    return {"id": Path(image).stem, "image": image, "conversations": _turns(QUESTION, str(digit))}


def pair_row(name: str, images: Sequence[str], first: int, second: int) -> dict[str, object]:
    """One LLaVA row about two pictures."""
    return {"id": name, "image": list(images), "conversations": _turns(PAIR_QUESTION, compare(first, second))}


def compare(first: int, second: int) -> str:
    """The answer to `PAIR_QUESTION` for two different digits: both of them, then the verdict."""
    return f"{first} and {second}: the {'first' if first > second else 'second'} is larger."


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """A JSON list, one row per line, so that row n stands in line n + 1."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomic(path, f"[\n{lines}\n]\n")


def texts() -> list[str]:
    """What the tokenizer of the tiny model is trained on: every sentence of both tasks, no picture marks."""
    questions = [question.replace("<image>\n", "") for question in (QUESTION, PAIR_QUESTION)]
    answers = [compare(first, second) for first in range(10) for second in range(10) if first != second]
    return [*questions * 100, *answers, "user", "assistant", "system"]
