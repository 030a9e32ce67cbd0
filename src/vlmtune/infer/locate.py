"""From a path that a user gives to the weights that are meant: a model folder, an adapter, or a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlmtune.config.hub import HUB_ID
from vlmtune.config.schema import FORMAT_VERSION, MediaOptions
from vlmtune.errors import UsageError, WeightsError
from vlmtune.weights.fingerprint import fingerprint
from vlmtune.weights.foreign.recognise import ADAPTER, EXPORT_FIRST, WORDS, Kind, recognise
from vlmtune.weights.shards import read_header

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.yaml"
BEST_FILE = "best.json"
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
_OPENED_WITH_BASE = (
    " On InternLM-XComposer2, whose own layers have these names, it is opened as it is once its base is there: "
    "--base DIR (in Python: base=DIR)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where the weights are.

    path: the folder with them (the chosen checkpoint when a run folder was given).
    base: the model folder under an adapter; None when `path` is whole by itself.
    media: how pictures were read in training; the defaults for a folder that this program did not train.
    provenance: what training wrote about itself (base, run configuration, versions); empty likewise.
    foreign: the kind of a checkpoint that another trainer wrote, which only an export reads; None for all others.
    """

    path: Path
    base: Path | None = None
    media: MediaOptions = field(default_factory=MediaOptions)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    foreign: Kind | None = None

    @property
    def model_folder(self) -> Path:
        """The folder that holds config.json and the weights of the whole model."""
        return self.base or self.path


def locate(
    path: str | Path, *, base: str | Path | None = None, checkpoint: str = "best", foreign: bool = False
) -> Located:
    """Find the weights that `path` means.

    Args:
        path: a model folder, an adapter folder, or a run folder.
        base: the model folder under an adapter, when it is not where the adapter says.
        checkpoint: of a run folder: ``best`` (falls back to ``last`` when nothing was evaluated), ``last``, or a step.
        foreign: checkpoints of other trainers are welcome.

    Raises:
        UsageError: no such folder, or a run folder without the checkpoint asked for.
        WeightsError: an adapter whose base is gone, or a file that cannot be read.
    """
    kind = recognise(Path(path).expanduser().absolute())
    if kind is not None and not (kind == "peft" and _has_native_names(Path(path).expanduser().absolute(), base)):
        return _foreign(Path(path).expanduser().absolute(), kind, base, welcome=foreign)
    folder = _folder(path)
    if is_run_folder(folder):
        folder = _checkpoint(folder, checkpoint)
    provenance = _provenance(folder)
    media = _media_options(provenance, folder)
    found = None
    if (folder / ADAPTER_CONFIG).is_file():
        found = _base_of(folder, base or _official_base(provenance))
        _check_base(found, provenance, folder)
    elif not (folder / "config.json").is_file():
        raise UsageError(
            "neither config.json, adapter_config.json nor run.yaml", where=str(folder),
            expected="a model folder, an adapter, or a run folder",
        )  # fmt: skip
    elif base is not None:
        raise UsageError("--base was given, but this is a whole model, not an adapter", where=str(folder))
    return Located(path=folder, base=found, media=media, provenance=provenance)


def _foreign(path: Path, kind: Kind, base: str | Path | None, *, welcome: bool) -> Located:
    """A checkpoint of another trainer; what it names as its base is a path on the machine of its training."""
    if not welcome:
        opened = kind == "peft" and base is None
        raise UsageError(
            f"this is {WORDS[kind]}", where=str(path), expected="a model folder, an adapter, or a run folder",
            remedy=EXPORT_FIRST + (_OPENED_WITH_BASE if opened else ""),
        )  # fmt: skip
    if kind == "unmerged" and base is not None:
        raise UsageError("--base was given, but this checkpoint holds the whole model", where=str(path))
    if kind in ("pickle", "peft", "parts") and base is None:
        raise UsageError(
            f"this is {WORDS[kind]}, which does not hold the model that it was trained on", where=str(path),
            remedy="Point to that model's folder, as it was before the training: --base DIR.",
        )  # fmt: skip
    return Located(path=path, base=None if base is None else _given_base(base), foreign=kind)


def _has_native_names(adapter: Path, base: str | Path | None) -> bool:
    """Whether an adapter with the layer names of a bare language model belongs to a model that has just these names.

    Its base tells; this program writes adapters with native names only.
    """
    from vlmtune.models.load import read_folder
    from vlmtune.models.registry import detect

    if (adapter / PROVENANCE).is_file():
        return True
    named = str(base or _read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path"))
    if not any(os.path.isdir(os.path.join(place, os.path.expanduser(named))) for place in ("", adapter)):
        return False
    try:
        folder = read_folder(_base_of(adapter, base))
        blocks = detect(folder).components(folder).blocks.get("language", ())
    except WeightsError:  # whoever opens it says what is wrong with it
        return False
    prefixes = tuple(f"base_model.model.{block}." for block in blocks)
    return any(info.name.startswith(prefixes) for info in read_header(adapter / ADAPTER))


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser().absolute()
    if folder.is_dir():
        return folder
    # `models/x` has the form of a hub id too; where a folder `models` exists it is meant as a path.
    if HUB_ID.fullmatch(str(path)) and not folder.parent.is_dir():
        from vlmtune.models.load import read_folder

        return read_folder(str(path)).path
    raise UsageError("no such folder", where=str(path), expected="a model folder, an adapter, or a run folder")


def is_run_folder(folder: Path) -> bool:
    """Whether `folder` is what `vlmtune train` writes: it has run.yaml and is not itself a model or a checkpoint."""
    whole = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
    return (folder / RUN_FILE).is_file() and not whole


def checkpoints(run: Path) -> dict[int, Path]:
    """The whole checkpoints of a run folder by step, in order; one without a manifest was never finished."""
    found: dict[int, Path] = {}
    for child in run.glob("checkpoint-*"):
        step = child.name.removeprefix("checkpoint-")
        if step.isdecimal() and (child / MANIFEST).is_file():
            found[int(step)] = child
    return dict(sorted(found.items()))


def _checkpoint(run: Path, choice: str) -> Path:
    whole = checkpoints(run)
    if not whole:
        raise UsageError("no finished checkpoint in this run folder", where=str(run), remedy="Train first, or go on.")
    if choice == "best" and (run / BEST_FILE).is_file():
        best = run / str(_read_json(run / BEST_FILE).get("checkpoint"))
        if best not in whole.values():
            raise WeightsError(
                f"{BEST_FILE} names {best.name}, which is not there or not finished",
                where=str(run),
                remedy="Choose another one with --checkpoint last or --checkpoint N.",
            )
        return best
    if choice in ("best", "last"):
        return whole[max(whole)]
    if not choice.isdecimal() or int(choice) not in whole:
        steps = ", ".join(str(step) for step in whole)
        raise UsageError(f"no checkpoint {choice}", where=str(run), expected=f"best, last, or one of the steps {steps}")
    return whole[int(choice)]


def _base_of(folder: Path, given: str | Path | None) -> Path:
    named = given or _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise WeightsError("the adapter names no base model", where=str(folder), remedy="Point to it: --base DIR.")
    if HUB_ID.fullmatch(str(named)) and not any(Path(place, named).exists() for place in ("", folder)):
        return _folder(named)
    base = Path(os.path.expanduser(str(named)))  # unlike pathlib's, silent on a user or a name that cannot be
    if not base.is_absolute():
        # A relative path was written against a working folder that is not known any more; the adapter's own folder
        # is the only other place that it can mean.
        base = base.absolute() if os.path.isdir(base) else folder / base
    if given:
        return _given_base(base)
    if os.path.isfile(base / "config.json"):
        return base
    raise WeightsError(
        f"the base model of this adapter is not at {named}",
        where=str(folder),
        remedy="If it has moved, point to it: --base DIR (in Python: base=DIR).",
    )


def _official_base(provenance: Mapping[str, Any]) -> Path | None:
    """The folder of the training where the adapter names a native copy of it; None where it has gone or
    changed.

    An export goes back to the layout of this folder.
    """
    base = Path(provenance["base"]) if "native_base" in provenance else None
    if base is None or not (base / "config.json").is_file():
        return None
    return base if fingerprint(base) == provenance["base_sha256"] else None


def _check_base(base: Path, provenance: Mapping[str, Any], adapter: Path) -> None:
    """That the base is the model of the training: an adapter fits every model of the same shapes."""
    known = {provenance.get("base_sha256"), provenance.get("native_base_sha256")} - {None}
    if not known or fingerprint(base) in known:
        return
    raise WeightsError(
        f"the adapter was trained on another model than {base}: config.json, or the names and shapes of the weights, "
        "differ from those of the training",
        where=str(adapter),
        expected=f"{provenance.get('base')} as it was then",
        remedy="Point to an unchanged copy of it: --base DIR (in Python: base=DIR).",
    )


def _given_base(base: str | Path) -> Path:
    folder = Path(base).expanduser().absolute()
    if HUB_ID.fullmatch(str(base)) and not folder.exists():
        return _folder(base)
    if not (folder / "config.json").is_file():
        raise UsageError("no config.json in the folder given with --base", where=str(folder), expected="a model folder")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot be read ({error})", where=str(file), expected="JSON") from None
    if not isinstance(value, dict):
        raise WeightsError(f"holds a {type(value).__name__}", where=str(file), expected="a JSON object")
    return value


def _provenance(folder: Path) -> dict[str, Any]:
    file = folder / PROVENANCE
    if not file.is_file():
        return {}
    provenance = _read_json(file)
    version = provenance.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"the checkpoint has format {version}",
            where=str(folder),
            expected=f"format {FORMAT_VERSION}",
            remedy="Open it with the version of vlmtune that wrote it (its number is in provenance.json).",
        )
    return provenance


def _media_options(provenance: Mapping[str, Any], folder: Path) -> MediaOptions:
    config = provenance.get("config") or {}
    try:
        model, data = config.get("model") or {}, config.get("data") or {}
        given = {name: model.get(name) for name in ("image", "video", "boxes", "chat")}
        given |= {name: data.get(name) for name in ("max_image_pixels", "exif")}
        return MediaOptions(**{name: value for name, value in given.items() if value is not None})
    except (ValidationError, AttributeError, TypeError) as error:
        raise WeightsError(f"model.image cannot be read ({error})", where=str(folder / PROVENANCE)) from None
