"""Pages of real handwritten digits with labelme JSON files, and how well a region encoder learns to read them.

The digits are scikit-learn's, as the quickstart has them: 1,797 scans of 8 × 8 pixels, each pasted once, so that no
digit of a held-out page has been seen. Regions hold one digit, or two that are read as one number; paper, size and
place vary.

    python benchmarks/embed_digits.py WORK            # pages, a tiny model with random weights, and the fitting
    python benchmarks/embed_digits.py WORK --pages    # pages and model alone, to type the commands of the guide
    python benchmarks/embed_digits.py WORK --model MODEL -- --epochs 20 --held-out-by region
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
from made import machine

from vlmtune.cli.main import main as vlmtune
from vlmtune.quickstart.data import load_digits, texts
from vlmtune.quickstart.model import write_model

ACROSS, DOWN, CELL = 5, 4, (96, 72)
"""Regions of a page, and the pixels that each lies in."""
SHARE_OF_PAIRS = 0.4
_SEED = 7


def write_pages(folder: Path) -> int:
    """Writes `NN.png` and `NN.json`, the same bytes every time; returns the number of pages."""
    pixels, digits = load_digits()
    rng = np.random.default_rng(_SEED)
    stack = list(rng.permutation(len(digits)))
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    while len(stack) >= 2 * ACROSS * DOWN:
        page = _paper(rng)
        shapes = []
        for place in range(ACROSS * DOWN):
            members = [stack.pop() for _ in range(2 if rng.random() < SHARE_OF_PAIRS else 1)]
            ink = np.concatenate([pixels[member] for member in members], axis=1)
            box = _paste(page, ink, place, rng)
            label = "".join(str(digits[member]) for member in members)
            shapes.append({"label": label, "points": [box[:2], box[2:]], "shape_type": "rectangle"})
        height, width = page.shape
        PIL.Image.fromarray(page.astype(np.uint8)).convert("RGB").save(folder / f"{count:02}.png")
        record = {"shapes": shapes, "imagePath": f"{count:02}.png", "imageWidth": width, "imageHeight": height}
        (folder / f"{count:02}.json").write_text(json.dumps(record), encoding="utf-8")
        count += 1
    return count


def _paper(rng: np.random.Generator) -> np.ndarray:
    """Grey values (H, W) of an empty page: its own brightness, a slope of the light, and noise."""
    height, width = DOWN * CELL[1], ACROSS * CELL[0]
    slope = np.linspace(0, rng.uniform(-20, 20), width)[None] + np.linspace(0, rng.uniform(-20, 20), height)[:, None]
    return np.clip(rng.uniform(190, 250) + slope + rng.normal(0, 3, (height, width)), 0, 255)


def _paste(page: np.ndarray, ink: np.ndarray, place: int, rng: np.random.Generator) -> list[int]:
    """Draws ink (8, 8 or 16; 0 … 16) somewhere in its cell; returns left, top, right, bottom in pixels."""
    scale = rng.uniform(3, 5)
    size = round(ink.shape[1] * scale), round(8 * scale)
    grey = PIL.Image.fromarray((ink * (255 / 16)).astype(np.uint8)).resize(size, PIL.Image.Resampling.BICUBIC)
    left = place % ACROSS * CELL[0] + int(rng.integers(4, CELL[0] - size[0] - 3))
    top = place // ACROSS * CELL[1] + int(rng.integers(4, CELL[1] - size[1] - 3))
    here = page[top : top + size[1], left : left + size[0]]
    here *= 1 - np.asarray(grey) / 255 * rng.uniform(0.7, 1.0)
    return [left - 2, top - 2, left + size[0] + 2, top + size[1] + 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pages", action="store_true", help="write pages and model, and fit nothing")
    parser.add_argument("--model", type=Path, help="another model than the tiny random one")
    parser.add_argument("fit", nargs="*", metavar="-- OPTION", help="options of `vlmtune embed fit`")
    options = parser.parse_args()
    pages, model = options.work / "pages", options.model or options.work / "tiny"
    print(f"{write_pages(pages)} pages in {pages}")
    if options.model is None:
        write_model(model, texts())
        print(f"an InternVL of random weights in {model}")
    if options.pages:
        return
    arguments = ["embed", "fit", str(pages), "--model", str(model), "-o", str(options.work / "encoder"), "--overwrite"]
    print("$ vlmtune " + " ".join([*arguments, *options.fit]), flush=True)
    start = time.perf_counter()
    code = vlmtune([*arguments, *options.fit])
    print(f"{machine()}; {time.perf_counter() - start:.0f} s")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
