"""Which parameters of the model a tensor on disk fills.

A folder in transformers' own layout may still lie on disk under the names of an older class layout (InternVL, LLaVA),
which transformers renames while it loads and renames back when it saves. The table here is worked out with its own
rules on a model without weights. A folder in another layout is read by the table of its family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmtune.weights.layout import Link, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmtune.models.family import OpenedFolder


@dataclass(frozen=True, slots=True)
class NameTable:
    """Names on disk against names in the model.

    links: disk name -> what it fills; a tensor that the model does not know is left out.
    converted: disk names that transformers joins, splits or permutes on the way, so that no parameter equals them and
        none of our operations undoes it.
    """

    links: Mapping[str, Link]
    converted: frozenset[str] = frozenset()

    @property
    def filled(self) -> set[str]:
        """The parameters (and buffers) that get a value."""
        return {name for link in self.links.values() for name in link.parameters}

    @property
    def link_of(self) -> dict[str, Link]:
        """Parameter name -> where it lies, for tensors that can be taken from disk as they are in the model."""
        known = (link for link in self.links.values() if link.disk not in self.converted)
        return {name: link for link in known for name in link.parameters}


def skeleton(opened: OpenedFolder) -> PreTrainedModel:
    """The model of an opened folder on the meta device: names, shapes and ties, no weights."""
    import copy

    import torch

    with torch.device("meta"):
        return opened.family.model_class(opened.folder)(copy.deepcopy(opened.config))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter name -> name of the parameter that it shares its memory with, both ways."""
    first: dict[int, str] = {}
    pairs: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            pairs[name], pairs[other] = other, name
    return pairs


def name_table(model: PreTrainedModel, disk_names: Iterable[str], table: WeightTable | None = None) -> NameTable:
    """The table for `disk_names`.

    Args:
        model: may lie on the meta device.
        table: of the layout that the folder is in; None for transformers' own.
    """
    if table is not None:
        known = set(model.state_dict())
        links = {disk: link for disk in disk_names if (link := table.link(disk)) and known.issuperset(link.parameters)}
        return NameTable(links)
    return _native_table(model, disk_names)


def _native_table(model: PreTrainedModel, disk_names: Iterable[str]) -> NameTable:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    links: dict[str, Link] = {}
    converted: set[str] = set()
    for disk in disk_names:
        parameter, pattern = rename_source_key(disk, renamings, converters, model.base_model_prefix, known)
        if parameter not in known and disk in known:
            parameter, pattern = disk, None  # the folder was saved under the parameter names themselves
        if parameter in known:
            links[disk] = Link(disk, (parameter,))
        if pattern is not None:
            converted.add(disk)
    return NameTable(links, frozenset(converted))


def saved_links(model: PreTrainedModel, parameters: Iterable[str], table: WeightTable | None) -> dict[str, Link]:
    """The tensors that a folder of a layout holds for these parameters, by their names on disk.

    Args:
        model: without weights, as `skeleton` gives it.
        table: of the layout; None for the names that transformers saves under.

    Raises:
        KeyError: the layout has no place for a parameter.
    """
    if table is None:
        return {disk: Link(disk, (parameter,)) for parameter, disk in _saved_names(model, parameters).items()}
    links: dict[str, Link] = {}
    for parameter in parameters:
        link = table.link_of(parameter)
        if link is None:
            raise KeyError(parameter)
        links[link.disk] = link
    return links


def _saved_names(model: PreTrainedModel, parameters: Iterable[str]) -> dict[str, str]:
    """Parameter name -> the name that `save_pretrained` writes it under."""
    from transformers.core_model_loading import revert_weight_conversion

    known = model.state_dict()
    tensors = {name: known[name] for name in parameters}
    saved = revert_weight_conversion(model, dict(tensors))
    disk_of = {id(tensor): disk for disk, tensor in saved.items()}
    return {name: disk_of[id(tensor)] for name, tensor in tensors.items()}
