"""`vlmtune export`: merge, write beside, compare, rename. A folder under the final name is always a checked one."""

from __future__ import annotations

import errno
import gc
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlmtune.config.schema import ImageOptions
from vlmtune.errors import ExportError, UsageError
from vlmtune.export import card, files, gap, verify
from vlmtune.export.gap import Gap
from vlmtune.export.merge import NOTHING, Merge, NotStreamable, plan_merge
from vlmtune.files import free_bytes
from vlmtune.infer.locate import Located, locate
from vlmtune.infer.session import DtypeName, load_located, torch_dtype
from vlmtune.models.load import open_folder
from vlmtune.progress import track
from vlmtune.versions import versions
from vlmtune.weights import shards
from vlmtune.weights.shards import FLOATING, Shards, TensorInfo

FORMAT_VERSION = 1
RECORD = "export.json"
Verify = Literal["full", "none"]


@dataclass(slots=True, kw_only=True)
class ExportResult:
    """What an export did.

    counts: tensors that are bit-identical to the base (``unchanged``), had an update folded in (``merged``), were
        trained in full (``replaced``) or only changed their dtype (``cast``).
    whole_model: why the adapter could not be merged tensor by tensor; None when it was (or there is none).
    gap: of a QLoRA run, how far the 4-bit model that was trained is from this one; None for other runs.
    """

    out: Path
    source: Path
    base: Path | None
    layout: str
    dtype: str
    counts: dict[str, int] = field(default_factory=dict)
    comparisons: list[verify.Comparison] = field(default_factory=list)
    whole_model: str | None = None
    gap: Gap | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "source": str(self.source),
            "base": str(self.base) if self.base else None,
            "layout": self.layout,
            "dtype": self.dtype,
            "tensors": self.counts,
            "merged_as_a_whole_because": self.whole_model,
            "compared": [one.as_dict() for one in self.comparisons] or "not compared",
            "gap_to_the_4bit_model": self.gap.as_dict() if self.gap else None,
            "versions": versions(),
        }


def export(
    path: str | Path,
    out: str | Path,
    *,
    layout: str = "native",
    checkpoint: str = "best",
    dtype: DtypeName | None = None,
    base: str | Path | None = None,
    verify: Verify = "full",
    overwrite: bool = False,
    device: str | None = None,
) -> ExportResult:
    """Write a plain transformers folder of a trained model.

    Args:
        path: a run folder, a checkpoint, an adapter, or a model folder.
        out: must not exist or be empty; its parent is where the folder is written first.
        layout: naming scheme of the weights; ``native`` is that of the base folder.
        checkpoint: of a run folder: ``best``, ``last``, or a step.
        dtype: of the weights written; that of the base if left out (full tuning keeps its checkpoints in float32).
        base: the model folder under an adapter, when it is not where the adapter says.
        verify: ``full`` compares the logits of the written folder with the trained model's; ``none`` does not.
        overwrite: replace `out` if it is an earlier export.
        device: where the comparison runs; a GPU when there is one, if left out.

    Raises:
        UsageError: an output folder in use, an unknown layout.
        WeightsError: weights that are missing or do not fit.
        ExportError: the written model is not the trained one, or the disk is full; nothing is left behind.
    """
    if layout != "native":
        raise UsageError(f"no layout {layout!r}", where="--layout", expected="native")
    located = locate(path, base=base, checkpoint=checkpoint)
    target = _free_target(Path(out).expanduser().absolute(), located, overwrite=overwrite)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        draft.mkdir(parents=True)
        result = _write(located, draft, dtype)
        result.out = target
        if verify == "full":
            _compare(located, draft, result, device)
        elif gap.was_quantised(located):
            result.gap = gap.skip("--verify none")
        _finish(located, draft, result)
        _swap(draft, target)
    except OSError as error:
        raise _disk_error(error, target) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def _free_target(target: Path, located: Located, *, overwrite: bool) -> Path:
    for source in filter(None, (located.path, located.base)):
        if target == source or target in source.parents:
            raise UsageError("the model to be exported is in this folder", where=str(target), remedy="Choose another.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not overwrite:
        raise UsageError(
            "the output folder is not empty" if target.is_dir() else "is a file", where=str(target),
            remedy="Choose another folder, or give --overwrite to replace an earlier export.",
        )  # fmt: skip
    if not (target / RECORD).is_file():
        raise UsageError(
            f"--overwrite replaces earlier exports only, and this folder has no {RECORD}",
            where=str(target),
            remedy="Remove the folder yourself, or choose another.",
        )
    return target


def _write(located: Located, draft: Path, dtype: DtypeName | None) -> ExportResult:
    """Weights and files; no comparison yet."""
    opened = open_folder(located.model_folder, located.media)
    source = Shards(located.model_folder)
    kept = _main_dtype(source)
    # A fully tuned checkpoint holds float32 master weights; people expect what they brought.
    name: str = dtype or (located.base is None and located.provenance.get("base_dtype")) or kept
    result = ExportResult(out=draft, source=located.path, base=located.base, layout="native", dtype=name)
    _check_space(source, name, draft)
    merge = NOTHING
    if located.base is not None:
        try:
            merge = plan_merge(opened, located.path, source)
        except NotStreamable as reason:
            result.whole_model = str(reason)
    if result.whole_model is None:
        result.counts = _stream(source, merge, name if dtype or name != kept else None, draft)
    else:
        result.counts = _merge_whole(located, torch_dtype(name), draft)  # type: ignore[arg-type] # one of FLOATING
    files.copy_files([located.model_folder, located.path], draft)
    settings = opened.family.picture_settings(opened.folder, located.media.image)
    files.finish_files(draft, opened, name, settings)
    return result


def _stream(source: Shards, merge: Merge, dtype: str | None, draft: Path) -> dict[str, int]:
    """Copy the tensors of the base one by one, changing those that the plan names.

    dtype: for every floating tensor; None keeps each as it is in the base.
    """
    code = shards.dtype_code(dtype) if dtype else None
    plan = [replace(info, dtype=code) if code and info.dtype in FLOATING else info for info in source.infos.values()]
    written = {info.name: info.dtype for info in plan}
    counts = dict.fromkeys(("unchanged", "merged", "replaced", "cast"), 0)

    def tensor(name: str) -> torch.Tensor:
        found = source.read(name)
        wanted = written[name]
        if name in merge:
            counts["merged" if name in merge.merged else "replaced"] += 1
            found = merge.apply(name, found)
        else:
            counts["unchanged" if source.infos[name].dtype == wanted else "cast"] += 1
        return _cast(found, wanted, name)

    def advance(infos: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
        return track(infos, total=len(plan), label="writing tensors")

    shards.write_shards(draft, plan, tensor, advance=advance)
    return counts


def _cast(tensor: torch.Tensor, code: str, name: str) -> torch.Tensor:
    # Of these codes the names are those that `torch_dtype` takes, which mypy cannot see.
    dtype: torch.dtype = torch_dtype(shards.dtype_name(code)) if code in FLOATING - {"F64"} else tensor.dtype  # type: ignore[arg-type]
    cast = tensor.to(dtype)
    if cast.is_floating_point() and cast.dtype != tensor.dtype and not torch.isfinite(cast).all():
        raise ExportError(
            f"{name} has values that {shards.dtype_name(code)} cannot hold (largest {float(tensor.abs().max()):.3g})",
            remedy="Export with --dtype bfloat16 or float32.",
        )
    return cast


def _merge_whole(located: Located, dtype: torch.dtype, draft: Path) -> dict[str, int]:
    """The slow way, in memory: load in float32, let PEFT merge, cast once, let transformers save."""
    session = load_located(located, device="cpu", dtype="float32")
    wrapped: Any = session.model
    model = wrapped.merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(draft)
    return {"merged": len(Shards(draft))}


def _compare(located: Located, draft: Path, result: ExportResult, device: str | None) -> None:
    """Fills in the comparisons; one model is in memory at a time."""
    source = load_located(located, device=device, dtype="float32")
    expected = verify.expect(source, torch_dtype(result.dtype))  # type: ignore[arg-type] # one of FLOATING
    del source
    gc.collect()  # the two models need not be in memory together, and PEFT's refer to themselves in circles
    # Without the options of the run: the folder must cut pictures as training did by its own files.
    written = Located(path=draft, media=located.media.model_copy(update={"image": ImageOptions()}))
    result.comparisons = verify.compare(expected, load_located(written, device=device, dtype="float32"))
    verify.check(result.comparisons, where=str(result.out))
    if gap.was_quantised(located):
        result.gap = gap.measure(located, expected, device)


def _finish(located: Located, draft: Path, result: ExportResult) -> None:
    config = located.provenance.get("config") or {}
    facts = card.CardFacts(
        name=result.out.name,
        base=card.public_name(_base_name(located)),
        licence=card.licence_of(Path(_base_name(located))),
        architecture=_architecture(draft),
        dtype=result.dtype,
        config=config,
        versions=versions(("transformers", "peft", "torch")),
        comparisons=[one.as_dict() for one in result.comparisons],
    )
    (draft / "README.md").write_text(card.write_card(facts), encoding="utf-8")
    files.write_json(draft / RECORD, {**result.as_dict(), "provenance": dict(located.provenance)})


def _base_name(located: Located) -> str:
    return str(located.base or located.provenance.get("base") or located.path)


def _architecture(folder: Path) -> str:
    config = files.read_json(folder / "config.json")
    return str((config.get("architectures") or [config.get("model_type")])[0])


def _main_dtype(source: Shards) -> str:
    """The floating dtype that most numbers of the folder have."""
    sizes: dict[str, int] = {}
    for info in source.infos.values():
        if info.dtype in FLOATING:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_elements
    if not sizes:
        raise ExportError("no floating weights in this folder", where=str(source.folder))
    return shards.dtype_name(max(sizes, key=lambda code: sizes[code]))


def _check_space(source: Shards, dtype: str, draft: Path) -> None:
    code = shards.dtype_code(dtype)
    needed = sum(
        replace(info, dtype=code).num_bytes if info.dtype in FLOATING else info.num_bytes
        for info in source.infos.values()
    )
    free = free_bytes(draft)
    if needed > free:
        raise ExportError(
            f"the export needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            where=str(draft.parent),
            remedy="Free some space, or choose a folder on another disk.",
        )


def _swap(draft: Path, target: Path) -> None:
    """Put the finished folder in place; an earlier export goes only once the new one is there."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old") if target.exists() else None
    if old:
        target.rename(old)
    draft.rename(target)
    if old:
        shutil.rmtree(old)


def _disk_error(error: OSError, target: Path) -> ExportError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ExportError(
        f"the export could not be written ({error.strerror or error})",
        where=str(target),
        remedy="Nothing was left behind. " + ("Free some space." if full else "Choose another folder."),
    )
