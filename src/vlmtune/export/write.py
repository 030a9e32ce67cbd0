"""`vlmtune export`: merge, write beside, compare, rename. A folder under the final name is always a checked one."""

from __future__ import annotations

import errno
import gc
import secrets
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlmtune.config.schema import ImageOptions
from vlmtune.errors import ExportError, UsageError
from vlmtune.export import card, files, gap, layers, verify
from vlmtune.export.foreign import Laid, laid_out
from vlmtune.export.gap import Gap
from vlmtune.export.layers import Meter, Mode
from vlmtune.export.merge import NOTHING, NotStreamable, plan_merge
from vlmtune.export.stream import Stream, plan_route
from vlmtune.files import free_bytes, read_json, write_json
from vlmtune.infer.locate import Located, locate
from vlmtune.infer.session import DtypeName, load_located, torch_dtype
from vlmtune.models.family import NATIVE
from vlmtune.models.load import open_folder
from vlmtune.versions import versions
from vlmtune.weights import shards
from vlmtune.weights.fingerprint import fingerprint
from vlmtune.weights.shards import FLOATING, Shards

FORMAT_VERSION = 1
RECORD = "export.json"
ASSEMBLED = "assembled"
"""Key of a provenance: the folder was made of these parts, and nothing is trained yet."""


@dataclass(slots=True, kw_only=True)
class ExportResult:
    """What an export did.

    source_sha256: of a model folder, what it is recognised by (see `weights.fingerprint`); None for other sources.
    counts: tensors that are bit-identical to the base (``unchanged``), had an update folded in (``merged``), were
        trained in full (``replaced``) or only changed their dtype (``cast``).
    whole_model: why the adapter could not be merged tensor by tensor; None when it was (or there is none).
    gap: of a QLoRA run, how far the 4-bit model that was trained is from this one; None for other runs.
    notes: in what way others will use the folder differently from how it was trained.
    verify: how it was compared with the trained model.
    weights_in_memory: of a comparison layer by layer, the most bytes of streamed weights there were at once.
    """

    out: Path
    source: Path
    base: Path | None
    layout: str
    dtype: str
    source_sha256: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    comparisons: list[verify.Comparison] = field(default_factory=list)
    whole_model: str | None = None
    gap: Gap | None = None
    notes: list[str] = field(default_factory=list)
    verify: Mode = "none"
    weights_in_memory: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "source": str(self.source),
            "source_sha256": self.source_sha256,
            "base": str(self.base) if self.base else None,
            "layout": self.layout,
            "dtype": self.dtype,
            "tensors": self.counts,
            "merged_as_a_whole_because": self.whole_model,
            "verify": self.verify,
            "weights_in_memory": self.weights_in_memory,
            "compared": [one.as_dict() for one in self.comparisons] or "not compared",
            "notes": self.notes,
            "gap_to_the_4bit_model": self.gap.as_dict() if self.gap else None,
            "versions": versions(),
        }


def export(
    path: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    checkpoint: str = "best",
    dtype: DtypeName | None = None,
    base: str | Path | None = None,
    verify: Mode | None = None,
    overwrite: bool = False,
    device: str | None = None,
    lora_alpha: float | None = None,
    second_adapter: str | Path | None = None,
) -> ExportResult:
    """Write a plain transformers folder of a trained model.

    Args:
        path: a run folder, a checkpoint, an adapter, or a model folder; or what another trainer wrote, see
            `weights.foreign`.
        out: must not exist or be empty; its parent is where the folder is written first.
        layout: how the weights are named and packed: ``native`` is transformers' own, ``official`` the model's
            publisher's; that of the base folder if left out.
        checkpoint: of a run folder: ``best``, ``last``, or a step.
        dtype: of the weights written; that of the base if left out (full tuning keeps its checkpoints in float32).
        base: the model folder under an adapter, when it is not where the adapter says.
        verify: ``full`` compares the logits of the written folder with the trained model's, one model in memory at a
            time; ``layers`` does so with the weights of one module in memory at a time; ``none`` does not. If left out,
            ``full`` where the model fits into memory in float32, else ``layers``.
        overwrite: replace `out` if it is an earlier export.
        device: where the comparison runs; a GPU when there is one, if left out.
        lora_alpha: of another trainer's LoRA, where its checkpoint does not hold it.
        second_adapter: the other one of two adapters that the official code saved apart (language and vision).

    Raises:
        UsageError: an output folder in use, an unknown layout.
        WeightsError: weights that are missing or do not fit.
        ExportError: the written model is not the trained one, the disk is full, or the model does not fit into memory
            for the comparison asked for; nothing is left behind.
    """
    located = locate(path, base=base, checkpoint=checkpoint, foreign=True)
    second = None if second_adapter is None else Path(second_adapter).expanduser().absolute()
    options: dict[str, Any] = {"overwrite": overwrite, "alpha": lora_alpha, "second": second}
    return export_located(located, out, layout=layout, dtype=dtype, verify=verify, device=device, **options)


def export_located(
    located: Located,
    out: str | Path,
    *,
    layout: str | None = None,
    dtype: DtypeName | None = None,
    verify: Mode | None = None,
    device: str | None = None,
    overwrite: bool = False,
    alpha: float | None = None,
    second: Path | None = None,
) -> ExportResult:
    """`export` of weights that were already found."""
    target = _free_target(Path(out).expanduser().absolute(), located, overwrite=overwrite)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with laid_out(located, target, alpha=alpha, second=second) as laid:
            mode = layers.choose(verify, Shards(laid.located.model_folder), device)
            draft.mkdir(parents=True)
            result = _write(laid, draft, layout, dtype)
            result.out, result.source, result.base = target, located.path, located.base
            # What was merged as a whole was in memory as a whole.
            result.verify = "full" if result.whole_model and mode == "layers" else mode
            _compare(laid.located, draft, result, device)
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


def _write(laid: Laid, draft: Path, layout: str | None, dtype: DtypeName | None) -> ExportResult:
    """Weights and files; no comparison yet."""
    located = laid.located
    opened = open_folder(located.model_folder, located.media)
    layout = layout or laid.layout or opened.family.home_layout(opened.folder)
    known = tuple(dict.fromkeys((NATIVE, *opened.layouts)))
    if layout not in known:
        raise UsageError(
            f"no layout {layout!r} for {opened.family.name}", where="--layout", expected=" or ".join(known)
        )
    source = Shards(located.model_folder)
    kept = shards.main_dtype(source)
    # A fully tuned checkpoint holds float32 master weights; people expect what they brought.
    name: str = dtype or laid.dtype or (located.base is None and located.provenance.get("base_dtype")) or kept
    result = ExportResult(out=draft, source=located.path, base=located.base, layout=layout, dtype=name)
    if located.base is None and located.foreign is None:
        result.source_sha256 = fingerprint(located.path)
    _check_space(source, name, draft)
    merge = NOTHING
    if located.base is not None:
        try:
            merge = plan_merge(opened, located.path, source)
        except NotStreamable as reason:
            result.whole_model = _whole_or_refused(reason, layout, opened.layout)
    if result.whole_model is None:
        wanted = name if dtype or laid.dtype or name != kept else None
        stream = Stream(source, plan_route(opened, source, layout), merge, wanted, laid.in_full)
        stream.write(draft)
        result.counts = stream.counts
    else:
        result.counts = _merge_whole(located, torch_dtype(name), draft)  # type: ignore[arg-type] # one of FLOATING
    result.notes = [*laid.notes, *opened.family.write_files(opened, layout, draft)]
    files.finish_files(draft, opened, name, legacy=layout != NATIVE)
    return result


def _whole_or_refused(reason: NotStreamable, layout: str, base_layout: str) -> str:
    """Why the model is merged as a whole: transformers then saves it, and knows its own layout only."""
    if layout != NATIVE or base_layout != NATIVE:
        raise ExportError(
            f"the adapter cannot be merged tensor by tensor ({reason}), and so into the native layout of a native base "
            "only",
            where="--layout",
            remedy="Train with `method: lora`, `rslora` or `dora`.",
        )
    return str(reason)


def _merge_whole(located: Located, dtype: torch.dtype, draft: Path) -> dict[str, int]:
    """The slow way, in memory: load in float32, let PEFT merge, cast once, let transformers save."""
    session = load_located(located, device="cpu", dtype="float32")
    wrapped: Any = session.model
    model = wrapped.merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(draft)
    return {"merged": len(Shards(draft))}


def _compare(located: Located, draft: Path, result: ExportResult, device: str | None) -> None:
    """Fills in the comparisons asked for; of the two models, one is in memory at a time, in full or layer by layer."""
    if result.verify == "none":
        result.gap = gap.skip("--verify none") if gap.was_quantised(located) else None
        return
    dtype = torch_dtype(result.dtype)  # type: ignore[arg-type] # one of FLOATING
    # Without the options of the run: the folder must cut pictures as training did by its own files.
    written = Located(path=draft, media=located.media.model_copy(update={"image": ImageOptions()}))
    if result.verify == "layers":
        meter = Meter()
        expected = layers.expect(located, dtype, device, meter)
        result.comparisons = layers.compare(expected, written, device, meter)
        result.weights_in_memory = meter.peak
    else:
        source = load_located(located, device=device, dtype="float32")
        expected = verify.expect(source, dtype)
        del source
        gc.collect()  # the two models need not be in memory together, and PEFT's refer to themselves in circles
        logits = load_located(written, device=device, dtype="float32").logits(expected.prompts)
        result.comparisons = verify.compare(expected, logits)
    verify.check(result.comparisons, where=str(result.out))
    trained = open_folder(located.model_folder, located.media)
    # Whoever loads the folder knows nothing of a prompt that the run chose beside it.
    plain = open_folder(draft, written.media.model_copy(update={"chat": None}))
    if others := verify.reads_otherwise(trained, plain):
        result.notes.append(
            f"the {' and the '.join(others)} become other ids by the folder's own files than in training: its readers "
            "have another chat template for this model; give them the system text and template of training"
        )
    if gap.was_quantised(located) and result.verify == "full":
        result.gap = gap.measure(located, expected, device)
    elif gap.was_quantised(located):
        result.gap = gap.skip(f"--verify {result.verify}")


def _finish(located: Located, draft: Path, result: ExportResult) -> None:
    config = located.provenance.get("config") or {}
    made, parts = _origin(located)
    facts = card.CardFacts(
        name=result.out.name,
        made=made,
        parts=parts,
        architecture=_architecture(draft),
        layout=result.layout,
        dtype=result.dtype,
        config=config,
        versions=versions(("transformers", "peft", "torch")),
        comparisons=[one.as_dict() for one in result.comparisons],
    )
    (draft / "README.md").write_text(card.write_card(facts), encoding="utf-8")
    record = {**result.as_dict(), "provenance": dict(located.provenance)}
    if ASSEMBLED in located.provenance:  # from a folder that was there for the time of the export
        record["source"] = None
    write_json(draft / RECORD, record)


def _origin(located: Located) -> tuple[str, list[card.Part]]:
    """What was done, in words for the card, and to which models."""
    assembled = located.provenance.get(ASSEMBLED)
    if assembled:
        made = f"assembled with vlmtune: its projector is fresh (random numbers of seed {assembled['seed']}), untrained"
        roles = (("Language model", "language"), ("Vision tower", "tower"))
        return made, [
            card.Part(role, card.public_name(assembled[key]["name"]), assembled[key]["licence"]) for role, key in roles
        ]
    name = _base_name(located)
    if located.provenance:
        made = "fine-tuned with vlmtune"
    elif located.base is not None or located.foreign is not None:
        made = "trained with another program and put together with vlmtune"
    else:
        made = "converted with vlmtune: the weights are those of the model below"
    return made, [card.Part("Base model", card.public_name(name), card.licence_of(Path(name)))]


def _base_name(located: Located) -> str:
    return str(located.base or located.provenance.get("base") or located.path)


def _architecture(folder: Path) -> str:
    config = read_json(folder / "config.json")
    return str((config.get("architectures") or [config.get("model_type")])[0])


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
