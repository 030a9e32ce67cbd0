"""A native base for adapters that are trained on an official folder (`tuning.native_base`).

PEFT opens the base that an adapter names by itself. For a model whose class is this program's own that works with
folders in the native layout only, as an official config.json belongs to other classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.config.schema import FullTuning, RunConfig
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.export.write import RECORD, export_located
from vlmtune.files import read_json
from vlmtune.infer.locate import Located
from vlmtune.models.family import NATIVE, OpenedFolder
from vlmtune.models.load import open_folder
from vlmtune.tuning.adapters import is_our_own
from vlmtune.weights.fingerprint import fingerprint

_WHERE = "tuning.native_base"


def wanted(config: RunConfig, opened: OpenedFolder) -> Path | None:
    """The folder that the configuration asks for, or None.

    Raises:
        ConfigError: it would have no effect.
    """
    if isinstance(config.tuning, FullTuning) or config.tuning.native_base is None:
        return None
    why = ""
    if not is_our_own(opened.family.model_class(opened.folder)):
        why = "this model's class is transformers' own"
    elif opened.layout == NATIVE:
        why = f"{opened.folder.path} is in the native layout, so the adapter names a base that PEFT opens"
    if why:
        raise ConfigError(f"has no effect: {why}", where=_WHERE, remedy="Leave it out.")
    return Path(config.tuning.native_base)


def provide(folder: Path, opened: OpenedFolder) -> bool:
    """Makes the native base, unless it is there. A half-written one never has the folder's name.

    Returns:
        Whether it was made now.

    Raises:
        WeightsError: the folder holds something else.
        ExportError: the written weights are not those of the base, or the disk is full.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        export_located(Located(path=opened.folder.path, media=opened.media), folder, layout=NATIVE)
        return True
    found: dict[str, Any] = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    mine = fingerprint(opened.folder.path)
    if found.get("layout") != NATIVE or found.get("source_sha256") != mine:
        raise WeightsError(
            f"is no native export of {opened.folder.path}, as its {RECORD} would say" if found else "is in use",
            where=f"{_WHERE}: {folder}",
            expected=f"what `vlmtune export {opened.folder.path} -o DIR --layout native` writes, or no folder yet",
            remedy="Choose another folder; it is written when the run starts.",
        )
    try:
        open_folder(folder, opened.media)
    except ConfigError as error:
        raise WeightsError(
            f"was not made for this run's pictures ({error})",
            where=f"{_WHERE}: {folder}",
            remedy="Choose another folder; it is written when the run starts.",
        ) from error
    return False
