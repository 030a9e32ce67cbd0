"""Does the exported folder give the answers of the model that it came from? Logits on two fixed prompts.

All comparisons are made in float32 arithmetic, so that they measure the weights and not the rounding of a kernel.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from vlmtune.data.encode import encode_prompt
from vlmtune.data.sample import Encoded, Image, MediaRef, Message, Sample, Text
from vlmtune.errors import ExportError

if TYPE_CHECKING:
    from vlmtune.infer.session import Session
    from vlmtune.models.family import OpenedFolder

TOLERANCE = 2e-4
"""Largest absolute difference of a logit in float32 that is always allowed."""
RELATIVE = 1e-4
"""As a share of the largest logit: a merge in float32 that changes more than this does not only round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt: the largest absolute difference of any logit at any position, and what is allowed.

    one_cast: the difference that merging the weights, and casting them once to the exported dtype, makes by itself (0
        where neither is done).
    """

    prompt: str
    num_positions: int
    difference: float
    limit: float
    one_cast: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit  # also false for NaN

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def fixed_prompts() -> tuple[Sample, Sample]:
    """A text prompt and a picture prompt, the same on every machine."""
    text = Text("Count from one to five, then name a colour.")
    picture = Image(MediaRef(path="<test picture>", inline=_picture()))
    return (
        Sample(messages=(Message("user", (text,)),), origin="text prompt"),
        Sample(messages=(Message("user", (picture, Text("What is in this picture?"))),), origin="picture prompt"),
    )


def _picture() -> bytes:
    """A 96×96 PNG with a colour ramp and a disc: something in every channel and at every scale."""
    y, x = np.mgrid[0:96, 0:96]
    pixels = np.stack([2 * x, 2 * y, (x * y) // 36], axis=-1).astype(np.uint8)
    pixels[(x - 60) ** 2 + (y - 40) ** 2 < 400] = (250, 220, 30)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the export must reproduce: logits of the fixed prompts, and for 16 bits the unavoidable difference."""

    prompts: tuple[Encoded, ...]
    """As the trained model reads them: the export is asked the same ids and pixels."""
    logits: Sequence[torch.Tensor]
    one_cast: Sequence[float]


@torch.no_grad()
def expect(source: Session, dtype: torch.dtype) -> Expected:
    """Ask the trained model, loaded in float32. Its adapter is merged and its weights are cast on the way: `source`
    must not be used afterwards.
    """
    prompts = tuple(source.encode(prompt) for prompt in fixed_prompts())
    logits = source.logits(prompts)
    one_cast = [0.0] * len(prompts)
    adapted = source.located.base is not None
    if adapted or dtype != torch.float32:
        if adapted:
            merged: Any = source.model
            source.model = merged.merge_and_unload(safe_merge=True)
        for parameter in source.model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        one_cast = [rounding(a, b, dtype) for a, b in zip(logits, source.logits(prompts), strict=True)]
    return Expected(prompts=prompts, logits=logits, one_cast=one_cast)


def rounding(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> float:
    """What a merge and a cast to `dtype` change in the logits; 0 where a float32 merge changes more than it may."""
    found = difference(before, after)
    is_wrong = dtype == torch.float32 and not found <= RELATIVE * float(before.abs().max())
    return 0.0 if is_wrong else found


def compare(expected: Expected, logits: Sequence[torch.Tensor]) -> list[Comparison]:
    """`logits` are those of the written folder, freshly loaded in float32, on the expected prompts.

    The folder may know ids beyond the trained model's, where its layout asks for them; those are not compared.
    """
    found = []
    rows = zip(expected.prompts, expected.logits, logits, expected.one_cast, strict=True)
    for prompt, before, after, one_cast in rows:
        found.append(
            Comparison(
                prompt=prompt.origin,
                num_positions=len(before),
                difference=difference(before, after[:, : before.shape[1]]),
                limit=max(TOLERANCE, 2 * one_cast),
                one_cast=one_cast,
            )
        )
    return found


def reads_otherwise(trained: OpenedFolder, exported: OpenedFolder) -> list[str]:
    """The prompts that the exported folder, by its own files, makes other ids of than training did."""
    return [
        prompt.origin
        for prompt in fixed_prompts()
        if encode_prompt(prompt, trained).input_ids.tolist() != encode_prompt(prompt, exported).input_ids.tolist()
    ]


def check(comparisons: Sequence[Comparison], *, where: str) -> None:
    """Raises:
    ExportError: a comparison that does not hold.
    """
    for one in comparisons:
        if not one.holds:
            raise ExportError(
                f"the exported model is not the trained one: on the {one.prompt} a logit is {one.difference:.2e} off",
                where=where,
                expected=f"at most {one.limit:.2e}",
                remedy="Nothing was written. Please report this with the output of `vlmtune info`.",
            )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of any number; infinite where the shapes differ."""
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")
