"""Changes to pictures that make a model robust, chosen by the row and the step alone."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

_WORST, _BEST = 75, 100


def jpeg_quality(seed: int, row: int, step: int) -> int:
    """A quality from 75 to 100, each as likely: the same for the same three numbers, on any rank and after a restart.

    The official InternVL loader draws one for every tile from the process's own generator; here a row has one.
    """
    return int(np.random.default_rng((seed, row, step)).integers(_WORST, _BEST + 1))


def as_jpeg(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    """The RGB picture after it was saved as a JPEG of this quality, with Pillow's other defaults (4:2:0)."""
    saved = io.BytesIO()
    picture.save(saved, "JPEG", quality=quality)
    return PIL.Image.open(saved, formats=("JPEG",)).convert("RGB")
