"""Encoded rows -> tensors. Pixels are decoded here, in the loader's workers, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import PIL.Image
import torch

from vlmtune.data.encode import with_origin
from vlmtune.data.media import embedding
from vlmtune.data.media.video import open_pictures
from vlmtune.data.sample import IGNORED, Batch, Encoded, pseudo_texts_of, stacked
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder
from vlmtune.nn.pseudo_text import MASK, ROWS

Pixels = dict[str, torch.Tensor]


def collate(rows: Sequence[Sequence[Encoded]], opened: OpenedFolder, *, stand_in: bool) -> Batch:
    """One micro batch.

    `rows[b]` are the samples laid end to end in row b. A single row is the packed form (1, L): position_ids restart at
    0 in every sample and there is no attention mask, from which transformers builds the block-diagonal mask. Several
    rows hold one sample each and are padded on the right to (B, L).

    stand_in: give a batch without pictures one smallest picture for the tower (see `nn.stand_in`).
    """
    if len(rows) > 1 and any(len(row) != 1 for row in rows):
        raise ValueError("a padded batch holds one sample per row; packs come one at a time")
    pixels = [[picture for sample in row for picture in row_pixels(sample, opened)] for row in rows]
    lengths = [sum(sample.num_tokens for sample in row) for row in rows]
    ids, labels = _blank(rows, lengths, opened)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if len(rows) == 1:
        inputs["position_ids"] = torch.cat([torch.arange(sample.num_tokens) for sample in rows[0]])[None]
        inputs["pack_lengths"] = tuple(sample.num_tokens for sample in rows[0])  # see nn.attention
    else:
        inputs["attention_mask"] = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    inputs.update(opened.family.position_inputs(rows, pixels, opened.spec))
    flat = [picture for row in pixels for picture in row]
    inputs.update(opened.family.collate_pixels(flat, opened.spec))
    inputs.update(pseudo_text_inputs(rows))
    inputs["logits_to_keep"], targets = _targets(labels, rows)
    return Batch(
        inputs=inputs,
        targets=targets,
        stand_in=smallest_picture(opened) if stand_in and not flat else None,
        num_tokens=sum(lengths),
        num_images=len(flat),
        origins=tuple(sample.origin for row in rows for sample in row),
    )


def prompt_batch(prompts: Sequence[Encoded], opened: OpenedFolder) -> dict[str, Any]:
    """Prompts as arguments of `generate`, padded on the left to (B, L)."""
    width = max(prompt.num_tokens for prompt in prompts)
    ids = torch.full((len(prompts), width), _pad_id(opened), dtype=torch.long)
    mask = torch.zeros_like(ids)
    pixels: list[Pixels] = []
    for row, prompt in enumerate(prompts):
        start = width - prompt.num_tokens
        ids[row, start:] = torch.from_numpy(prompt.input_ids.astype(np.int64))
        mask[row, start:] = 1
        pixels += row_pixels(prompt, opened)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **opened.family.collate_pixels(pixels, opened.spec),
        **pseudo_text_inputs([[prompt] for prompt in prompts], left=True),
        **opened.family.prompt_inputs(prompts, opened.spec),
    }


def smallest_picture(opened: OpenedFolder) -> Pixels:
    """Pixel inputs of one small grey picture, taken as a frame of a video: frames are not cut into tiles."""
    (plan,) = opened.family.plan([(32, 32)], opened.spec, [0])
    picture = PIL.Image.new("RGB", (32, 32), (127, 127, 127))
    return opened.family.collate_pixels([opened.family.pixels(picture, plan, opened.spec)], opened.spec)


def pseudo_text_inputs(rows: Sequence[Sequence[Encoded]], *, left: bool = False) -> dict[str, torch.Tensor]:
    """The rows of pseudo-text of a micro batch and where they go (see `nn.pseudo_text`); {} without any.

    Args:
        rows: `rows[b]` are the samples laid end to end in row b, padded on the right, or on the `left`.

    Raises:
        DataError: with the row's origin: a file that cannot be read, is not what it was, or has NaN or infinity.
    """
    found = [part for row in rows for sample in row for part in _pseudo_text(sample)]
    if not found:
        return {}
    masks = [np.concatenate([sample.at_pseudo_text for sample in row]) for row in rows]
    return {ROWS: torch.cat(found), MASK: torch.from_numpy(stacked(masks, left=left))}


def _pseudo_text(sample: Encoded) -> list[torch.Tensor]:
    try:
        return [embedding.rows(ref, plan.size) for ref, plan in pseudo_texts_of(sample.media)]
    except DataError as error:
        raise with_origin(error, sample.origin) from error


def row_pixels(sample: Encoded, opened: OpenedFolder) -> list[Pixels]:
    """The model inputs of each picture of a row, decoded and cut.

    Raises:
        DataError: with the row's origin: a picture that cannot be read, or is not what it was when it was planned.
    """
    pixels = []
    try:
        shown = [(i, ref, plan) for i, (ref, plan) in enumerate(sample.media) if not plan.is_pseudo_text]
        with closing(open_pictures([ref for _, ref, _ in shown], opened.media)) as pictures:
            for picture, (number, ref, plan) in zip(pictures, shown, strict=True):
                if picture.size != plan.size:
                    raise DataError(
                        f"{ref.path} is {picture.width}×{picture.height} now, but its header said "
                        f"{plan.size[0]}×{plan.size[1]} when the row was planned",
                        remedy="Do not change the data during a run.",
                    )
                retouch = sample.retouch(number) if sample.retouch else None
                pixels.append(opened.family.pixels(picture, plan, sample.spec, retouch))
    except DataError as error:
        raise with_origin(error, sample.origin) from error
    return pixels


def _pad_id(opened: OpenedFolder) -> int:
    pad = opened.tokenizer.pad_token_id
    return int(pad) if pad is not None else 0  # masked out in any case


def _blank(
    rows: Sequence[Sequence[Encoded]], lengths: Sequence[int], opened: OpenedFolder
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, int64 (B, L), padded on the right."""
    ids = torch.full((len(rows), max(lengths)), _pad_id(opened), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        ids[number, : lengths[number]] = torch.from_numpy(np.concatenate([s.input_ids for s in row]).astype(np.int64))
        labels[number, : lengths[number]] = torch.from_numpy(np.concatenate([s.labels for s in row]).astype(np.int64))
    return ids, labels


def _targets(labels: torch.Tensor, rows: Sequence[Sequence[Encoded]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (B, L) of positions whose next token is trained, and those tokens (n,).

    The last position of a sample predicts nothing: what follows it in a pack is another sample.
    """
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    for number, row in enumerate(rows):
        ends = np.cumsum([sample.num_tokens for sample in row]) - 1
        following[number, torch.from_numpy(ends)] = IGNORED
    keep = following != IGNORED
    return keep, following[keep]
