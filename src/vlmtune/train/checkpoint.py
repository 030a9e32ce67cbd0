"""Checkpoints: what is in one, when it counts as whole, which are kept.

A checkpoint folder is written in place and sealed by `manifest.json`, its last file, which lists every other file with
size and hash. Without it, or if the files do not fit it, the folder is a leftover of a process that died.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vlmtune.config.load import dump_config
from vlmtune.config.schema import FORMAT_VERSION, RunConfig
from vlmtune.errors import RunFolderError, WeightsError
from vlmtune.files import sha256, write_atomic
from vlmtune.infer.locate import BEST_FILE, MANIFEST, PROVENANCE, RUN_FILE
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import read_folder
from vlmtune.train.best import Evaluated
from vlmtune.versions import PACKAGES, versions
from vlmtune.weights import names
from vlmtune.weights.fingerprint import fingerprint
from vlmtune.weights.shards import Shards

STATE_FILE = "trainer_state.json"
_PREFIX = "checkpoint-"

# Files of a model folder that go along with the weights: tokenizer, processor, chat template, generation config.
_COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NOT_COMPANIONS = {
    "config.json", "adapter_config.json", "best.json", "export.json", MANIFEST, PROVENANCE, STATE_FILE,
    "requirements.txt",
}  # fmt: skip


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / f"{_PREFIX}{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _all(run_dir: Path) -> list[Path]:
    found = [path for path in run_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and every file that it lists has its size."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in listed.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def whole(run_dir: Path) -> list[Path]:
    """The sealed checkpoints of a run, oldest first."""
    return [folder for folder in _all(run_dir) if is_whole(folder)]


def remove_leftovers(run_dir: Path) -> list[str]:
    """Removes checkpoints that were never sealed; returns their names."""
    leftovers = [folder for folder in _all(run_dir) if not is_whole(folder)]
    for folder in leftovers:
        remove(folder)
    return [folder.name for folder in leftovers]


def remove(folder: Path) -> None:
    """Removes a checkpoint, its seal first, so that a process killed half-way leaves nothing that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def add_companions(folder: Path, opened: OpenedFolder, config: RunConfig, provenance: Mapping[str, Any]) -> None:
    """Lays beside the weights all that is needed to load and use them: the base folder's small files, and our own.

    Beside an adapter that names a native base these are that base's, whose tokenizer plain transformers opens.
    """
    native = provenance.get("native_base")
    base = opened.folder if native is None else read_folder(native)
    for source in sorted(base.path.iterdir()):
        weights_index = source.name.endswith(".index.json")
        if (
            source.suffix in _COMPANION_SUFFIXES
            and source.is_file()
            and source.name not in _NOT_COMPANIONS
            and not weights_index
        ):
            shutil.copyfile(source, folder / source.name)
    for name, content in opened.family.companions(base).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_atomic(folder / RUN_FILE, dump_config(config))
    write_atomic(folder / PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False))


def seal(folder: Path, *, strategy: str, world: int) -> None:
    """Writes the manifest; the checkpoint counts from here on."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step_of(folder),
        "strategy": strategy,
        "world": world,
        "files": files,
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def check_resumable(folder: Path, *, strategy: str, world: int) -> None:
    """Refuses to go on from a checkpoint whose optimizer state another strategy wrote.

    Raises:
        RunFolderError: names both.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION:
        raise RunFolderError(
            f"has format {manifest['format_version']}", where=str(folder), expected=f"{FORMAT_VERSION}"
        )
    plain = {"single", "ddp"}
    there, processes = manifest["strategy"], manifest["world"]
    fits = there == strategy or {there, strategy} <= plain
    if strategy.startswith("zero"):
        fits = fits and processes == world  # each process reads back the part that it wrote
    if not fits:
        raise RunFolderError(
            f"was written by strategy {there} on {processes} processes; {strategy} on {world} cannot go on from it",
            where=str(folder),
            remedy="Start it as it was started, or set another train.output_dir.",
        )


def check_keys(folder: Path, model: PreTrainedModel) -> None:
    """Checks that plain transformers would find every weight of the model in a saved folder, and no other.

    Args:
        model: `weights.names.skeleton` of the base folder.

    Raises:
        WeightsError: names keys that no parameter takes, or parameters that no key fills.
    """
    saved = list(Shards(folder).infos)
    table = names.name_table(model, saved)
    unknown = sorted(set(saved) - set(table.links))
    held = table.filled | set(model.all_tied_weights_keys)
    missing = sorted(name for name, _ in model.named_parameters() if name not in held)
    if unknown or missing:
        raise WeightsError(
            f"keys that transformers does not know: {unknown[:5]}; parameters without a key: {missing[:5]}",
            where=str(folder),
            remedy="This is a defect of the saving code; please report it with the strategy that was used.",
        )


def write_best(run_dir: Path, best: Evaluated | None, latest: Path) -> None:
    """Records which checkpoint to use: the best evaluated one; the latest when nothing is evaluated."""
    chosen = folder_of(run_dir, best.step) if best else latest
    record = {"checkpoint": chosen.name, "eval_loss": best.loss if best else None}
    write_atomic(run_dir / BEST_FILE, json.dumps(record))


def rotate(run_dir: Path, *, keep: int, best_step: int | None) -> None:
    """Removes all whole checkpoints but the latest `keep` and the best."""
    for folder in whole(run_dir)[:-keep]:
        if step_of(folder) != best_step:
            remove(folder)


def provenance(
    config: RunConfig,
    opened: OpenedFolder,
    *,
    strategy: str,
    world: int,
    threads: int,
    native_base: Path | None = None,
) -> dict[str, Any]:
    """Where a checkpoint comes from: base, its fingerprint, the resolved configuration, versions, machine.

    Args:
        native_base: the same weights in the native layout, which the adapter names.
    """
    native = {}
    if native_base is not None:
        native = {"native_base": str(native_base), "native_base_sha256": fingerprint(native_base)}
    return {
        "format_version": FORMAT_VERSION,
        "base": str(opened.folder.path),
        "base_sha256": fingerprint(opened.folder.path),
        **native,
        "base_dtype": opened.folder.config.get("dtype") or opened.folder.config.get("torch_dtype"),
        "config": config.model_dump(mode="json"),
        "strategy": strategy,
        "world": world,
        "threads": threads,
        "versions": versions((*PACKAGES, "numpy", "bitsandbytes", "deepspeed")),
    }
