"""Milliseconds per core from the bytes of a 640×480 JPEG to seven normalised tiles of 448 (InternVL's arithmetic).

Three ways over the same picture, interleaved, with one thread each:

- the official arithmetic: Pillow decodes, resizes and crops; each tile then goes through the steps of torchvision's
  ToTensor and Normalize (which works on a copy), in torch;
- transformers' own image processor (its Pillow form);
- ours, as training runs it.

    python benchmarks/pictures.py
    python benchmarks/pictures.py --repeats 50
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from made import machine, write_pictures

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import pictures
from vlmtune.data.sample import MediaRef
from vlmtune.models.auto.pictures import AutoSpec, picture_pixels

TILE = 448
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as InternVL's image processors have them
GRID = (3, 2)  # columns and rows that a picture of 4:3 takes of at most six tiles


def image_processor() -> transformers.GotOcr2ImageProcessorPil:
    return transformers.GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=6,
        image_mean=MEAN,
        image_std=STD,
    )


def official(encoded: bytes) -> torch.Tensor:
    """Tiles of the resized picture, then the thumbnail; per tile ToTensor and Normalize."""
    picture = PIL.Image.open(io.BytesIO(encoded)).convert("RGB")
    columns, rows = GRID
    whole = picture.resize((columns * TILE, rows * TILE), PIL.Image.Resampling.BICUBIC)
    corners = [(column * TILE, row * TILE) for row in range(rows) for column in range(columns)]
    cut = [whole.crop((left, top, left + TILE, top + TILE)) for left, top in corners]
    cut.append(picture.resize((TILE, TILE), PIL.Image.Resampling.BICUBIC))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    normalised = []
    for tile in cut:
        values = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        normalised.append(values.clone().sub_(mean).div_(std))
    return torch.stack(normalised)


def through_transformers(encoded: bytes, processor: transformers.GotOcr2ImageProcessorPil) -> torch.Tensor:
    picture = PIL.Image.open(io.BytesIO(encoded)).convert("RGB")
    return processor([picture], return_tensors="pt")["pixel_values"]


def ours(encoded: bytes, spec: AutoSpec, options: MediaOptions) -> torch.Tensor:
    picture = pictures.open_image(MediaRef(path="picture", inline=encoded), options)
    return picture_pixels(picture, spec)["pixel_values"]


def compare(ways: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, run by turns so that a busy moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = image_processor()
    spec = AutoSpec(image_processor=processor, processor=None, placeholder_id=0, rope_config=None)
    with tempfile.TemporaryDirectory() as temporary:
        (name,) = write_pictures(Path(temporary), 1, (640, 480))
        encoded = (Path(temporary) / name).read_bytes()
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "official arithmetic": lambda: official(encoded),
        "transformers' processor": lambda: through_transformers(encoded, processor),
        "vlmtune": lambda: ours(encoded, spec, MediaOptions(exif="apply")),
    }
    results = {name: way() for name, way in ways.items()}
    seconds = compare(ways, options.repeats)
    base = statistics.median(seconds["official arithmetic"])
    print(machine())
    print(f"one 640×480 JPEG -> {len(results['vlmtune'])} tiles of {TILE}, one thread, {options.repeats} by turns")
    print(f"{'':<26}{'median':>9}{'least':>9}{'speed':>9}{'largest difference':>22}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        apart = (results[name] - results["official arithmetic"]).abs().max().item()
        print(f"{name:<26}{middle * 1e3:>6.1f} ms{min(times) * 1e3:>6.1f} ms{base / middle:>8.2f}×{apart:>22.1e}")


if __name__ == "__main__":
    main()
