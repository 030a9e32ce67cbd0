"""Checkpoints of other trainers on their way to an export: laid out as a model folder and an adapter, for a while.

What the usual export then reads are ordinary folders beside the output: the base with the tensors that were trained in
full in their places (only where there are such), and an adapter of ours with the LoRA. They go when the export is done.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.errors import ExportError, UsageError
from vlmtune.files import free_bytes, read_json, write_json
from vlmtune.infer.locate import ADAPTER_CONFIG, Located
from vlmtune.models.family import OFFICIAL
from vlmtune.models.load import open_folder
from vlmtune.models.native import copy_files
from vlmtune.progress import track
from vlmtune.weights import shards
from vlmtune.weights.foreign import alpha as alphas
from vlmtune.weights.foreign import zero
from vlmtune.weights.foreign.adapter import write_adapter
from vlmtune.weights.foreign.alpha import Alpha
from vlmtune.weights.foreign.parts import PROJECTOR, Parts, Place, check_fit, sort
from vlmtune.weights.foreign.recognise import ADAPTER, WORDS, rank_folder, tower
from vlmtune.weights.foreign.tensors import of_file, read_pickle
from vlmtune.weights.shards import Shards, TensorInfo, main_dtype

_DTYPES = ("float32", "bfloat16", "float16")
_PROMPTS = (
    "XTuner trains with a prompt of its own (another system text, all pictures of a turn in front of it); others "
    "prompt this model as config.json's template says, and `model.chat: xtuner` goes on training as XTuner did"
)
_LORA_OPTIONS = ("use_llm_lora", "use_backbone_lora")


@dataclass(frozen=True, slots=True)
class Laid:
    """What the usual export goes on with.

    located: ordinary folders. in_full: tensors of the model folder that are the checkpoint's, not the base's. dtype:
    what the base's weights are kept in, where the checkpoint's are wider; None where they are alike. notes: in what way
    others will use the export differently from how it was trained.
    """

    located: Located
    in_full: frozenset[str] = frozenset()
    dtype: str | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def laid_out(located: Located, beside: Path, *, alpha: float | None, second: Path | None) -> Iterator[Laid]:
    """Lay out a foreign checkpoint for as long as the context lasts; anything else passes through.

    Args:
        beside: the folder of the export, which is not there yet; the temporary folders lie beside it.
        alpha: lora_alpha of the training, where the checkpoint does not hold it.
        second: the other adapter of a pair (language and vision) that the official code saved.

    Raises:
        UsageError: an option that is missing, or that this checkpoint has no use for.
        WeightsError: a checkpoint that cannot be read, or of another model.
        ExportError: no space on the disk.
    """
    if located.foreign is None:
        _refuse_options(alpha, second, "only checkpoints of other trainers need it")
        yield Laid(located)
        return
    parts, own, text = _read(located, alpha, second)
    notes = (_PROMPTS,) if "xtuner" in text else ()
    room = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.foreign")
    try:
        room.mkdir(parents=True)
        yield replace(_lay_out(located, parts, own, room), notes=notes)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _refuse_options(alpha: float | None, second: Path | None, why: str) -> None:
    for option, value in (("--lora-alpha", alpha), ("--second-adapter", second)):
        if value is not None:
            raise UsageError(f"was given, but {why}", where=option)


def _read(located: Located, alpha: float | None, second: Path | None) -> tuple[Parts, Path | None, str]:
    """The tensors by their official names, the folder of their own config.json (None: there is none), and the training
    configuration as text ("" where the checkpoint holds none).
    """
    path = located.path
    if located.foreign == "peft":
        _refuse_options(alpha, None, "adapter_config.json says it")
        parts = _adapter(path)
        return (parts.joined(_adapter(second)) if second else parts), None, ""
    _refuse_options(None, second, "this is no adapter that was saved apart")
    if located.foreign == "unmerged":
        _refuse_options(alpha, None, "config.json says it")
        return sort(Shards(path), alphas.of_official(read_json(path / "config.json"), where=str(path))), path, ""
    if located.foreign == "pickle":
        source, text = read_pickle(path)
        return sort(source, _alpha(alpha, text, None, path)), None, text
    folder = rank_folder(path)
    assert folder is not None  # or it would not be of this kind
    source, text = zero.read_zero(folder)
    own = next((place for place in (path, folder.parent) if (place / "config.json").is_file()), None)
    return sort(source, _alpha(alpha, text, own, path)), own, text


def _alpha(value: float | None, text: str, own: Path | None, path: Path) -> Alpha:
    if value is not None:
        return alphas.given(value)
    if own is not None and not text:
        return alphas.of_official(read_json(own / "config.json"), where=str(own))
    return alphas.of_text(text, where=str(path))


def _adapter(folder: Path) -> Parts:
    """An adapter folder that PEFT saved of one part of the official model."""
    file = folder / ADAPTER
    part = tower(file) if file.is_file() else None
    if part is None:
        raise UsageError("no adapter of the official language or vision model", where=str(folder))
    config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
    return sort(of_file(file), alphas.of_adapter(config, where=str(folder)), prefix=f"{part}.")


def _lay_out(located: Located, parts: Parts, own: Path | None, room: Path) -> Laid:
    if located.base is not None:
        return _on_base(replace(located, foreign=None), located.base, parts, room)
    if own is None:
        raise UsageError(
            f"this is {WORDS[located.foreign or 'pickle']}, which holds no config.json and no tokenizer",
            where=str(located.path), remedy="Point to the official folder that it was trained on: --base DIR.",
        )  # fmt: skip
    infos = {name: replace(place.info, name=name) for name, place in parts.whole.items()}
    check_fit(parts, infos, base_folder=own)
    model = _write_model(infos, parts, own, room)
    given = str(read_json(own / "config.json").get("torch_dtype"))
    # ZeRO's float32 masters are wider than the model is meant to be; a folder of weights is what it is.
    dtype = given if located.foreign == "deepspeed" and given in _DTYPES else None
    plain = replace(located, path=model, foreign=None)
    return Laid(_under_adapter(plain, replace(parts, whole={}), model, room) if parts.lora else plain, dtype=dtype)


def _on_base(located: Located, base: Path, parts: Parts, room: Path) -> Laid:
    """A checkpoint that goes with a base: only what it trained lies in it."""
    opened = open_folder(base, located.media)
    if opened.layout != OFFICIAL:
        raise UsageError(f"the base is of the layout {opened.layout}", where=str(base), expected="an official folder")
    under = Shards(base)
    check_fit(parts, under.infos, base_folder=base)
    projector = {name for name in under.infos if name.startswith(PROJECTOR)}
    in_adapter = projector if parts.lora and projector <= set(parts.whole) else set()
    whole = {name: place for name, place in parts.whole.items() if name not in in_adapter}
    infos = {name: replace(whole[name].info, name=name) if name in whole else under.infos[name] for name in under.infos}
    over = replace(parts, whole={**{name: Place(under, name) for name in under.infos}, **whole})
    model = _write_model(infos, over, base, room) if whole else base
    wider = any(infos[name].dtype != under.infos[name].dtype for name in whole)
    plain = replace(located, path=model, base=None)
    return Laid(
        _under_adapter(plain, replace(parts, whole={n: parts.whole[n] for n in in_adapter}), model, room)
        if parts.lora
        else plain,
        in_full=frozenset(whole),
        dtype=main_dtype(under) if wider else None,
    )


def _under_adapter(plain: Located, parts: Parts, model: Path, room: Path) -> Located:
    """The model under an adapter of ours with the LoRA of `parts`, and what else of it fits there."""
    adapter = room / "adapter"
    adapter.mkdir()
    write_adapter(parts, open_folder(model, plain.media).layouts[OFFICIAL], model, adapter)
    return replace(plain, path=adapter, base=model)


def _write_model(infos: Mapping[str, TensorInfo], parts: Parts, files: Path, room: Path) -> Path:
    """An official folder with the tensors of `parts.whole`; configuration and tokenizer are those of `files`."""
    needed, free = sum(info.num_bytes for info in infos.values()), free_bytes(room)
    if needed > free:
        raise ExportError(
            f"laying the checkpoint out as a model folder takes {needed / 1e9:.1f} GB for the time of the export, and "
            f"{free / 1e9:.1f} GB are free",
            where=str(room.parent),
            remedy="Free some space (the export itself needs about as much again), or choose a folder on another disk.",
        )
    model = room / "model"
    model.mkdir()

    def advance(steps: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
        return track(steps, total=len(infos), label="laying out tensors")

    shards.write_shards(model, list(infos.values()), lambda name: parts.whole[name].read(), advance=advance)
    copy_files(files, model, more=("*.py",))
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, **{name: 0 for name in _LORA_OPTIONS if name in config}})
    return model
