"""The comparison for models that do not fit into memory: weights are read when a module runs, and go when it has run.

The model stands without weights; while one of its modules runs, that module's own parameters take their places, read
from the folder and widened to float32. An adapter is small and stays in memory, laid on the model by PEFT as on any
other. What is asked, and what is allowed, is that of `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vlmtune.errors import ExportError, WeightsError
from vlmtune.export import verify
from vlmtune.export.merge import NOTHING, Merge, fill_with_stand_ins, plan_merge
from vlmtune.export.stream import Route, Stream
from vlmtune.export.verify import Comparison, Expected
from vlmtune.files import free_memory
from vlmtune.infer.locate import Located
from vlmtune.infer.session import Session, attach, choose_device
from vlmtune.models.load import empty_model, open_folder
from vlmtune.progress import track
from vlmtune.weights import strict
from vlmtune.weights.names import NameTable, name_table, skeleton, tied_names
from vlmtune.weights.shards import Shards
from vlmtune.weights.strict import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmtune.data.sample import Encoded
    from vlmtune.models.family import OpenedFolder

Mode = Literal["full", "layers", "none"]
_FLOAT = torch.float32.itemsize


@dataclass(slots=True)
class Meter:
    """Bytes of the weights that are in their places now, and the most there have been."""

    live: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)


def choose(asked: Mode | None, source: Shards, device: str | None) -> Mode:
    """How an export is compared; None: in full where the model fits into memory in float32, else layer by layer.

    The memory is the machine's, and the GPU's where the comparison runs on one.

    Raises:
        ExportError: in full was asked for, and the model does not fit.
    """
    if asked not in (None, "full"):
        return asked
    place = choose_device(device)
    known = [free_memory(), torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else None]
    free = min((one for one in known if one is not None), default=None)
    needed = _FLOAT * sum(info.num_elements for info in source.infos.values())
    if free is None or needed <= free:
        return "full"
    if asked is None:
        return "layers"
    raise ExportError(
        f"the model takes {needed / 1e9:.1f} GB of memory in float32, and {free / 1e9:.1f} GB are free",
        where="--verify full",
        remedy="Compare layer by layer: --verify layers.",
    )


@torch.no_grad()
def expect(located: Located, dtype: torch.dtype, device: str | None, meter: Meter) -> Expected:
    """`verify.expect`, layer by layer: the base under its adapter, not merged; then the merged weights, cast once."""
    source = open_source(located, device, meter)
    prompts = tuple(source.encode(prompt) for prompt in verify.fixed_prompts())
    logits = ask(source, prompts, "asking the trained model")
    one_cast = [0.0] * len(prompts)
    if located.base is not None or dtype != torch.float32:
        cast = ask(_open_cast(located, dtype, device, meter), prompts, f"asking it after one cast to {dtype}")
        one_cast = [verify.rounding(a, b, dtype) for a, b in zip(logits, cast, strict=True)]
    return Expected(prompts=prompts, logits=logits, one_cast=one_cast)


def compare(expected: Expected, written: Located, device: str | None, meter: Meter) -> list[Comparison]:
    """`verify.compare`, with the written folder layer by layer."""
    return verify.compare(expected, ask(open_source(written, device, meter), expected.prompts, "asking the export"))


def ask(session: Session, prompts: Sequence[Encoded], label: str) -> list[torch.Tensor]:
    """Logits of the prompts, as `Session.logits` gives them.

    Raises:
        ExportError: a module used weights of another one that was not running.
    """
    found = [session.logits([prompt])[0] for prompt in track(prompts, total=len(prompts), label=label)]
    if not all(torch.isfinite(logits).all() for logits in found):
        raise ExportError(
            "the logits are not finite: the weights are broken, or a module of this model uses those of another",
            where=str(session.located.path),
            remedy="Compare with --verify full on a machine with more memory.",
        )
    return found


def open_source(located: Located, device: str | None, meter: Meter) -> Session:
    """What `load_located` gives in float32, with the base's weights streamed.

    Raises:
        WeightsError: tensors that are missing, of another shape, or not to be read one by one.
    """
    opened = open_folder(located.model_folder, located.media)
    return _open(located, opened, NOTHING, None, device, meter)


def _open_cast(located: Located, dtype: torch.dtype, device: str | None, meter: Meter) -> Session:
    opened = open_folder(located.model_folder, located.media)
    merge = NOTHING if located.base is None else plan_merge(opened, located.path, Shards(located.model_folder))
    merged = replace(located, path=located.model_folder, base=None)
    return _open(merged, opened, merge, dtype, device, meter)


def _open(
    located: Located, opened: OpenedFolder, merge: Merge, dtype: torch.dtype | None, device: str | None, meter: Meter
) -> Session:
    place = choose_device(device)
    source = Shards(located.model_folder)
    bare = skeleton(opened)
    table = name_table(bare, source.infos, opened.table)
    names = _names_on_disk(bare, table, source)
    stream = Stream(source, Route(table.link_of, {}), merge, None)

    def read(name: str) -> torch.Tensor:
        tensor = stream.parameter(names[name])
        return tensor.to(place, torch.float32) if dtype is None else tensor.to(place, dtype).float()

    model: Any = empty_model(opened)
    _fill_buffers(model, names, stream, place)
    homes = {module: _on_disk(module, path, names) for path, module in model.named_modules()}
    # NaN: whatever is computed with weights that were not read cannot pass for an answer.
    fill_with_stand_ins(model, float("nan"), place)
    wrapped = model if located.base is None else attach(model, located.path)
    _Visits(homes, read, meter).install(wrapped)
    return Session(wrapped.eval(), opened, located)


def _on_disk(module: nn.Module, path: str, names: Mapping[str, str]) -> dict[str, str]:
    """The module's own parameters by their names in the model; what a folder may lack, and does, stays NaN."""
    own = {one: f"{path}.{one}" if path else one for one, _ in module.named_parameters(recurse=False)}
    return {one: name for one, name in own.items() if name in names}


def _names_on_disk(bare: PreTrainedModel, table: NameTable, source: Shards) -> dict[str, str]:
    """Parameter (or buffer) -> the one that lies on disk and holds its numbers: itself, or what it is tied to."""
    links, tied, state = table.link_of, tied_names(bare), bare.state_dict()
    places = {name: next((one for one in (name, tied.get(name)) if one in links), None) for name in state}
    if converted := sorted(table.converted - {link.disk for link in links.values()}):
        raise WeightsError(
            f"{listed(converted)} are rearranged while they load and cannot be read one by one",
            where=str(source.folder),
            remedy="Compare with --verify full.",
        )
    found = {name: place for name, place in places.items() if place is not None}
    mismatched = []
    for name, place in found.items():
        link = links[place]
        shape = link.shapes(source.infos[link.disk].shape)[link.parameters.index(place)]
        if shape != tuple(state[name].shape):
            mismatched.append((name, shape, tuple(state[name].shape)))
    missing = strict.demanded(
        (name for name, place in places.items() if place is None), bare._keys_to_ignore_on_load_missing
    )
    unknown = [disk for disk in source.infos if disk not in table.links]
    unexpected = strict.unread(unknown, bare)
    complaints = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
    strict.check_loading(complaints, where=str(source.folder))
    return found


def _fill_buffers(model: nn.Module, names: Mapping[str, str], stream: Stream, device: torch.device) -> None:
    """Buffers are small and stay; those that files hold come from there."""
    for path, module in model.named_modules():
        for own, buffer in list(module.named_buffers(recurse=False)):
            place = names.get(f"{path}.{own}" if path else own)
            value = buffer if place is None else stream.parameter(place).to(buffer.dtype)
            module.register_buffer(own, value.to(device), persistent=own not in module._non_persistent_buffers_set)


class _Visits:
    """Puts the parameters of a module in their places while the module runs.

    Args:
        homes: module -> name of a parameter in it -> name of the parameter in the model.
        read: a parameter by that name.
    """

    def __init__(
        self, homes: Mapping[nn.Module, Mapping[str, str]], read: Callable[[str], torch.Tensor], meter: Meter
    ) -> None:
        self._homes = homes
        self._read = read
        self._meter = meter
        self._guests: dict[nn.Module, int] = {}
        self._stand_ins: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def install(self, model: nn.Module) -> None:
        """On the modules of a model that may carry an adapter; the copies that an adapter trained keep their own."""
        for module in list(model.modules()):
            homes = [one for one in _used_by(module) if self._homes.get(one)]
            if homes:
                self._watch(module, homes)

    def _watch(self, module: nn.Module, homes: list[nn.Module]) -> None:
        def enter(*_: Any) -> None:
            for home in homes:
                self._enter(home)

        def leave(*_: Any) -> None:
            for home in homes:
                self._leave(home)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _enter(self, home: nn.Module) -> None:
        self._guests[home] = self._guests.get(home, 0) + 1
        if self._guests[home] > 1:  # a layer under an adapter is used by the adapter's layer, and runs inside it
            return
        self._stand_ins[home] = dict(home.named_parameters(recurse=False))
        for own, name in self._homes[home].items():
            parameter = nn.Parameter(self._read(name), requires_grad=False)
            self._meter.add(parameter.nbytes)
            home.register_parameter(own, parameter)

    def _leave(self, home: nn.Module) -> None:
        self._guests[home] -= 1
        if self._guests[home]:
            return
        stand_ins = self._stand_ins.pop(home)
        for own in self._homes[home]:
            self._meter.add(-home.get_parameter(own).nbytes)
            home.register_parameter(own, stand_ins[own])


def _used_by(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own parameters a module reads while it runs."""
    from peft.tuners.lora import LoraLayer

    yield module
    if isinstance(module, LoraLayer):  # DoRA asks for the norms of the weight
        yield module.get_base_layer()
    if isinstance(module, nn.MultiheadAttention):
        yield module.out_proj
