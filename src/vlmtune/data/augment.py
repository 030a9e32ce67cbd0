"""Changes to pictures that make a model robust, chosen by the row and the step alone."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import PIL.Image

from vlmtune.data.sample import Retouch

_WORST, _BEST = 75, 100


@dataclass(frozen=True, slots=True)
class JpegNoise:
    """Saves pictures as JPEGs of a quality from 75 to 100, each as likely (InternVL's official training transform).

    There, each tile draws from the process's own generator. Here the draws for medium i of a row are a function of the
    run's seed, the row, the step and i: the same on any rank and after a restart. A family that cuts tiles asks once
    per tile, in their order; any other once per picture.
    """

    seed: int
    row: int
    step: int

    def __call__(self, medium: int) -> Retouch:
        random = np.random.default_rng((self.seed, self.row, self.step, medium))
        return lambda picture: as_jpeg(picture, int(random.integers(_WORST, _BEST + 1)))


def as_jpeg(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    """The RGB picture after it was saved as a JPEG of this quality, with Pillow's other defaults (4:2:0)."""
    saved = io.BytesIO()
    picture.save(saved, "JPEG", quality=quality)
    return PIL.Image.open(saved, formats=("JPEG",)).convert("RGB")
