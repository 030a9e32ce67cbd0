"""Checkpoints of other trainers on their way to an export: laid out as a model folder and an adapter, for a while.

What the usual export then reads are ordinary folders beside the output: the base with the tensors that were trained in
full in their places (only where there are such), and an adapter of ours with the LoRA. They go when the export is done.
"""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmtune.errors import ExportError, UsageError
from vlmtune.files import free_bytes, read_json, write_json
from vlmtune.infer.locate import ADAPTER_CONFIG, Located
from vlmtune.models.load import open_folder
from vlmtune.models.native import copy_files
from vlmtune.progress import track
from vlmtune.weights import shards
from vlmtune.weights.foreign import alpha as alphas
from vlmtune.weights.foreign import zero
from vlmtune.weights.foreign.adapter import write_adapter
from vlmtune.weights.foreign.alpha import Alpha
from vlmtune.weights.foreign.parts import Naming, Parts, Place, check_fit, is_projector, naming, sort
from vlmtune.weights.foreign.recognise import ADAPTER, WORDS, rank_folder, tower
from vlmtune.weights.foreign.tensors import Tensors, of_file, of_folders, read_pickle
from vlmtune.weights.layout import WeightTable
from vlmtune.weights.names import name_table, skeleton
from vlmtune.weights.places import folders
from vlmtune.weights.shards import Shards, Source, TensorInfo, main_dtype

if TYPE_CHECKING:
    from vlmtune.models.family import OpenedFolder

OFFICIAL: Naming = "official"
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
    what the base's weights are kept in, where the checkpoint's are wider; None where they are alike. layout: in which
    the model is wanted back; None: that of the model folder. notes: what the user has to know of the way here.
    """

    located: Located
    in_full: frozenset[str] = frozenset()
    dtype: str | None = None
    layout: str | None = None
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
    parts, own, text, names = _read(located, alpha, second)
    notes = (_PROMPTS,) if "xtuner" in text and names == OFFICIAL else ()
    room = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.foreign")
    try:
        room.mkdir(parents=True)
        laid = _lay_out(located, parts, own, room, names)
        yield replace(laid, notes=(*laid.notes, *notes))
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _refuse_options(alpha: float | None, second: Path | None, why: str) -> None:
    for option, value in (("--lora-alpha", alpha), ("--second-adapter", second)):
        if value is not None:
            raise UsageError(f"was given, but {why}", where=option)


def _read(located: Located, alpha: float | None, second: Path | None) -> tuple[Parts, Path | None, str, Naming]:
    """The tensors by their official names, the folder of their own config.json (None: there is none), the training
    configuration as text ("" where the checkpoint holds none), and whose names they are.
    """
    path = located.path
    if located.foreign == "peft":
        _refuse_options(alpha, None, "adapter_config.json says it")
        parts = _adapter(path)
        return (parts.joined(_adapter(second)) if second else parts), None, "", OFFICIAL
    _refuse_options(None, second, "this is no adapter that was saved apart")
    if located.foreign == "unmerged":
        _refuse_options(alpha, None, "config.json says it")
        found = alphas.of_official(read_json(path / "config.json"), where=str(path))
        return sort(Shards(path), found), path, "", OFFICIAL
    if located.foreign == "parts":
        _refuse_options(alpha, None, "this checkpoint has no LoRA")
        source = of_folders({place.name: place for place in folders(path)[1:]}, path)
        return sort(source, _alpha(None, "", None, path)), None, "", naming(source)
    if located.foreign == "pickle":
        source, text = read_pickle(path)
        return sort(source, _alpha(alpha, text, None, path)), None, text, naming(source)
    folder = rank_folder(path)
    assert folder is not None  # or it would not be of this kind
    source, text = zero.read_zero(folder)
    own = next((place for place in (path, folder.parent) if (place / "config.json").is_file()), None)
    return sort(source, _alpha(alpha, text, own, path)), own, text, naming(source)


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


def _lay_out(located: Located, parts: Parts, own: Path | None, room: Path, names: Naming) -> Laid:
    if located.base is not None:
        return _on_base(replace(located, foreign=None), located.base, parts, room, names)
    if own is None:
        raise UsageError(
            f"this is {WORDS[located.foreign or 'pickle']}, which holds no config.json and no tokenizer",
            where=str(located.path), remedy="Point to the folder of the model that it was trained on: --base DIR.",
        )  # fmt: skip
    infos = {name: replace(place.info, name=name) for name, place in parts.whole.items()}
    check_fit(parts, infos, base_folder=own)
    model = _write_model(infos, parts, own, room)
    given = str(read_json(own / "config.json").get("torch_dtype"))
    # ZeRO's float32 masters are wider than the model is meant to be; a folder of weights is what it is.
    dtype = given if located.foreign == "deepspeed" and given in _DTYPES else None
    plain = replace(located, path=model, foreign=None)
    return Laid(_under_adapter(plain, replace(parts, whole={}), model, room) if parts.lora else plain, dtype=dtype)


def _on_base(located: Located, base: Path, parts: Parts, room: Path, names: Naming) -> Laid:
    """A checkpoint that goes with a base: only what it trained lies in it."""
    opened = open_folder(base, located.media)
    if names not in opened.layouts or (names == OFFICIAL and opened.layout != OFFICIAL):
        raise UsageError(
            f"the base is of the layout {opened.layout}", where=str(base),
            expected="an official folder" if names == OFFICIAL else "a LLaVA model",
        )  # fmt: skip
    under = Shards(base) if names == opened.layout else _under_names(opened, names)
    parts, notes = (parts, ()) if names == OFFICIAL else _with_added_rows(parts, under, opened)
    check_fit(parts, under.infos, base_folder=base)
    projector = {name for name in under.infos if is_projector(name)}
    in_adapter = projector if parts.lora and projector <= set(parts.whole) else set()
    whole = {name: place for name, place in parts.whole.items() if name not in in_adapter}
    infos = {name: replace(whole[name].info, name=name) if name in whole else under.infos[name] for name in under.infos}
    over = replace(parts, whole={**{name: Place(under, name) for name in under.infos}, **whole})
    model = _write_model(infos, over, base, room, opened if names != OFFICIAL else None) if whole else base
    wider = any(infos[name].dtype != under.infos[name].dtype for name in whole)
    plain = replace(located, path=model, base=None)
    return Laid(
        _under_adapter(plain, replace(parts, whole={n: parts.whole[n] for n in in_adapter}), model, room, names)
        if parts.lora
        else plain,
        in_full=frozenset(whole),
        dtype=main_dtype(under) if wider else None,
        layout=opened.family.home_layout(opened.folder),
        notes=() if names == OFFICIAL else (*_from_base(opened, set(under.infos) - set(parts.whole)), *notes),
    )


def _with_added_rows(parts: Parts, under: Source, opened: OpenedFolder) -> tuple[Parts, tuple[str, ...]]:
    """A native base has rows for `<image>` (and some more) right behind the vocabulary that XTuner trained: embedding
    and head get those of the base, and a note says so. Tables of any other size are left for `check_fit` to refuse."""
    made: Any = opened.config
    whole, grown = dict(parts.whole), []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        place, info = whole.get(name), under.infos.get(name)
        if not place or not info or place.info.shape == info.shape:
            continue
        (rows, *width), (all_rows, *wanted) = place.info.shape, info.shape
        if rows == made.image_token_id < all_rows and width == wanted:
            longer = {name: replace(place.info, name=name, shape=info.shape)}
            whole[name] = Place(Tensors(parts.where, longer, partial(_lengthened, place, under)), name)
            grown.append(f"rows {rows} to {all_rows - 1} of {name}")
    note = f"not in the checkpoint, and so taken from the base: {' and '.join(grown)}, for <image> and what follows it"
    return replace(parts, whole=whole), (note,) if grown else ()


def _lengthened(place: Place, under: Source, name: str) -> torch.Tensor:
    trained, rows = place.read(), under.read(name)
    return torch.cat([trained, rows[len(trained) :].to(trained.dtype)])


def _under_names(opened: OpenedFolder, names: Naming) -> Source:
    """The tensors of a folder by their names in another layout, which packs none of them."""
    source = Shards(opened.folder.path)
    links = name_table(skeleton(opened), source.infos, opened.table).links
    places = {
        link.disk: disk
        for disk, found in links.items()
        for parameter in found.parameters
        if (link := opened.layouts[names].link_of(parameter))
    }
    infos = {name: replace(source.infos[disk], name=name) for name, disk in places.items()}
    return Tensors(source.folder, infos, lambda name: source.read(places[name]))


def _from_base(opened: OpenedFolder, names: Collection[str]) -> tuple[str, ...]:
    """What of the base stayed as it was, by component."""
    table = opened.layouts["xtuner"]
    links = [link for name in names if (link := table.link(name))]
    counts = Counter(opened.components.of(link.parameters[0]) for link in links)
    found = ", ".join(f"{count} tensors of the {name} component" for name, count in counts.items())
    return (f"not in the checkpoint, and so taken from the base: {found}",) if found else ()


def _under_adapter(plain: Located, parts: Parts, model: Path, room: Path, names: Naming = OFFICIAL) -> Located:
    """The model under an adapter of ours with the LoRA of `parts`, and what else of it fits there."""
    adapter = room / "adapter"
    adapter.mkdir()
    write_adapter(parts, open_folder(model, plain.media).layouts[names], model, adapter)
    return replace(plain, path=adapter, base=model)


def _write_model(
    infos: Mapping[str, TensorInfo], parts: Parts, files: Path, room: Path, opened: OpenedFolder | None = None
) -> Path:
    """An official folder with the tensors of `parts.whole`; configuration and tokenizer are those of `files`.

    opened: `files`, to write a folder of XTuner's instead.
    """
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

    def read(name: str) -> torch.Tensor:
        return parts.whole[name].read()

    if opened is not None:
        _write_parts(model, infos, read, opened.layouts["xtuner"])
        opened.family.write_files(opened, "xtuner", model)
        return model
    shards.write_shards(model, list(infos.values()), read, advance=advance)
    copy_files(files, model, more=("*.py",))
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, **{name: 0 for name in _LORA_OPTIONS if name in config}})
    return model


def _write_parts(
    model: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor], table: WeightTable
) -> None:
    """The tensors in the folders that the layout has them in."""
    places: dict[str, list[TensorInfo]] = {}
    for name, info in infos.items():
        link = table.link(name)
        assert link is not None, name  # the names were compared with the base's, which the layout covers
        places.setdefault(link.folder, []).append(info)
    for folder, plan in places.items():
        (model / folder).mkdir(exist_ok=True)
        shards.write_shards(model / folder, plan, read)
