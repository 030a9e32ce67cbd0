"""The folder of a fitted encoder: made beside its place and renamed, so that it is whole or not there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vlmtune.embed.fit import FitSettings, Fitted, Measured, accuracies, chance, unseen
from vlmtune.embed.folder import CONFIG, KIND, EncoderConfig, write_encoder
from vlmtune.embed.labels import Target
from vlmtune.embed.parts import Parts
from vlmtune.errors import UsageError
from vlmtune.files import write_atomic
from vlmtune.models.family import OpenedFolder
from vlmtune.weights.fingerprint import fingerprint

METRICS, HELD_OUT = "metrics.jsonl", "held_out.jsonl"


def refuse_taken(out: Path, *, overwrite: bool) -> None:
    """
    Raises:
        UsageError: something is there that is not to be replaced: an encoder without `overwrite`, or anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_encoder(out):
        raise UsageError("is there and no region encoder", where=str(out), remedy="Choose another folder with -o.")
    if not overwrite:
        raise UsageError("there is an encoder already", where=str(out), remedy="Choose another folder, or --overwrite.")


def save_fitted(
    out: Path,
    fitted: Fitted,
    parts: Parts,
    settings: FitSettings,
    targets: Sequence[Target],
    held: Sequence[bool],
    opened: OpenedFolder,
    *,
    given: str,
) -> None:
    """Writes the encoder, what each epoch gave, and how each held-out region was read.

    Args:
        given: the model as the user named it; a relative path is noted as relative to `out`.

    Raises:
        UsageError: see `refuse_taken`; what is there has changed meanwhile.
    """
    refuse_taken(out, overwrite=True)
    config = EncoderConfig(
        model=_model(given, out, opened),
        model_sha256=fingerprint(opened.folder.path),
        regions=parts.features.rule,
        heads=fitted.resampler.shape.heads,
        padding_id=parts.padding_id,
        fit=_about(fitted, settings, targets, held),
    )
    draft = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        mu_sigma = torch.stack([parts.codebook.mu, parts.codebook.sigma], 1)
        write_encoder(draft, config, fitted.resampler, mu_sigma)
        write_atomic(draft / METRICS, _lines(fitted.history))
        if fitted.held_out is not None:
            write_atomic(draft / HELD_OUT, _lines(_readings(fitted.held_out, opened.tokenizer)))
        _put(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, out: Path) -> None:
    """Renames `draft` to `out`; the encoder that is there comes back if that is interrupted."""
    old = draft.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(draft, out)
    finally:
        if not out.exists():
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)


def _is_encoder(folder: Path) -> bool:
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("kind") == KIND


def _model(given: str, out: Path, opened: OpenedFolder) -> str:
    folder = Path(given).expanduser()
    if not folder.is_dir():  # a hub id
        return str(opened.folder.path.absolute())
    return str(folder) if folder.is_absolute() else os.path.relpath(folder, out)


def _about(fitted: Fitted, settings: FitSettings, targets: Sequence[Target], held: Sequence[bool]) -> Mapping[str, Any]:
    about: dict[str, Any] = {"settings": asdict(settings), "learned": accuracies(fitted.learned)}
    if fitted.held_out is not None:
        about["held_out"] = {
            **accuracies(fitted.held_out),
            "commonest_label": chance(targets, held),
            "regions_with_unseen_tokens": unseen(targets, held),
        }
    return about


def _readings(found: Measured, tokenizer: PreTrainedTokenizerBase) -> Iterable[dict[str, Any]]:
    for reading in found.readings:
        yield {
            "json": str(reading.target.page.json),
            "box": reading.target.region.box,
            "label": reading.target.region.label,
            "read": tokenizer.decode(list(reading.ids)),
            "right": reading.is_right,
            "cosine": round(reading.cosine, 4),
        }


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
