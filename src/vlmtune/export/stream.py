"""The tensors of an export, one by one: from the layout of the base, through the adapter, into the layout asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmtune.errors import ExportError, WeightsError
from vlmtune.export.merge import Merge
from vlmtune.infer.session import torch_dtype
from vlmtune.models.family import NATIVE
from vlmtune.progress import track
from vlmtune.weights import shards
from vlmtune.weights.layout import Link
from vlmtune.weights.names import name_table, saved_links, skeleton
from vlmtune.weights.shards import FLOATING, Shards, TensorInfo
from vlmtune.weights.strict import listed, unread

if TYPE_CHECKING:
    from vlmtune.models.family import OpenedFolder

COUNTS = ("unchanged", "merged", "replaced", "cast")


@dataclass(frozen=True, slots=True)
class Route:
    """From the tensors of a folder to those of another.

    sources: parameter -> the tensor on disk that holds it. targets: name in the new folder -> the parameters in it, in
    their order; none for a tensor that the model does not know, which is copied.
    """

    sources: Mapping[str, Link]
    targets: Mapping[str, Link]


def plan_route(opened: OpenedFolder, source: Shards, layout: str) -> Route:
    """Raises:
    WeightsError: a tensor of the folder that the model does not know, or a parameter without a place in the layout.
    """
    model = skeleton(opened)
    table = name_table(model, source.infos, opened.table)
    sources = table.link_of
    if layout == opened.layout and not (layout == NATIVE and NATIVE in opened.layouts):
        known = {disk: link for disk, link in table.links.items() if disk not in table.converted}
        return Route(sources, {disk: known.get(disk, Link(disk, ())) for disk in source.infos})
    unknown = unread((disk for disk in source.infos if disk not in table.links), model)
    try:
        targets = saved_links(model, sources, opened.layouts.get(layout))
    except KeyError as error:
        unknown.append(str(error.args[0]))
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensors have no place in the layout {layout}: {listed(unknown)}",
            where=str(source.folder),
            remedy="Check that config.json belongs to these files.",
        )
    incomplete = {name for link in targets.values() for name in link.parameters} - set(sources)
    if incomplete:
        raise WeightsError(f"the folder lacks {listed(sorted(incomplete))}", where=str(source.folder))
    return Route(sources, targets)


class Stream:
    """Reads, merges, packs and casts; the counts say what happened to the tensors of the new folder.

    Args:
        dtype: for every floating tensor; None keeps each as it is in the base.
        in_full: tensors of the source that are not the base's own but were trained in full.
    """

    def __init__(
        self, source: Shards, route: Route, merge: Merge, dtype: str | None, in_full: Collection[str] = ()
    ) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self._source = source
        self._route = route
        self._merge = merge
        self._code = shards.dtype_code(dtype) if dtype else None
        self._in_full = in_full
        self._last: tuple[str, torch.Tensor] | None = None

    def write(self, draft: Path) -> None:
        """All tensors into `draft`."""
        targets = self._route.targets
        for folder in dict.fromkeys(link.folder for link in targets.values()):
            (draft / folder).mkdir(exist_ok=True)
            self._write(draft / folder, {name: link for name, link in targets.items() if link.folder == folder})

    def _write(self, folder: Path, targets: Mapping[str, Link]) -> None:
        plan = [self._info(name, link) for name, link in targets.items()]
        written = {info.name: info.dtype for info in plan}

        def advance(infos: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
            return track(infos, total=len(plan), label="writing tensors")

        shards.write_shards(folder, plan, lambda name: self._tensor(name, written[name]), advance=advance)

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter as the export will hold it, before it is cast."""
        link = self._route.sources[name]
        if self._last is None or self._last[0] != link.disk:  # a fused tensor is asked for part by part
            self._last = link.disk, self._source.read(link.disk)
        part = link.op.split(self._last[1])[link.parameters.index(name)]
        return self._merge.apply(name, part) if name in self._merge else part

    def _info(self, name: str, link: Link) -> TensorInfo:
        if not link.parameters:
            return self._cast_info(self._source.infos[name])
        infos = [self._source.infos[self._route.sources[one].disk] for one in link.parameters]
        shape = link.op.whole(tuple(self._shape(one) for one in link.parameters))
        return self._cast_info(TensorInfo(name, infos[0].dtype, shape))

    def _cast_info(self, info: TensorInfo) -> TensorInfo:
        wanted = self._code if self._code and info.dtype in FLOATING else info.dtype
        return TensorInfo(info.name, wanted, info.shape)

    def _shape(self, parameter: str) -> tuple[int, ...]:
        link = self._route.sources[parameter]
        whole = self._source.infos[link.disk].shape
        return link.shapes(whole)[link.parameters.index(parameter)]

    def _tensor(self, name: str, wanted: str) -> torch.Tensor:
        link = self._route.targets[name]
        if not link.parameters:
            found = self._source.read(name)
            self._count(name, wanted)
            return _cast(found, wanted, name)
        if any(one in self._merge.merged for one in link.parameters):
            self.counts["merged"] += 1
        elif any(one in self._merge.replaced for one in link.parameters):
            self.counts["replaced"] += 1
        else:
            self._count(self._route.sources[link.parameters[0]].disk, wanted)
        # Merged parts come in float32 beside untouched ones; they are cast one by one, and once.
        parts = tuple(_cast(self.parameter(one), wanted, name) for one in link.parameters)
        return link.op.join(parts)

    def _count(self, disk: str, wanted: str) -> None:
        kept = "unchanged" if self._source.infos[disk].dtype == wanted else "cast"
        self.counts["replaced" if disk in self._in_full else kept] += 1


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
