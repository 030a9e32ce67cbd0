"""Which parameter of the model a tensor on disk fills.

transformers renames tensors while it loads (InternVL and LLaVA lie on disk under the names of an older class layout)
and turns the renaming round when it saves. The table here is worked out with transformers' own rules on a model without
weights, so that a tensor can be found in the base folder, changed, and written under the name that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmtune.models.family import OpenedFolder


@dataclass(frozen=True, slots=True)
class NameTable:
    """Names on disk against names in the model.

    module_of: disk name -> full parameter (or buffer) name; a tensor that the model does not know is left out.
    converted: disk names that are joined, split or permuted on the way, so that no single parameter equals them.
    """

    module_of: Mapping[str, str]
    converted: frozenset[str]

    @property
    def disk_of(self) -> dict[str, str]:
        """Parameter name -> disk name, for tensors that lie on disk as they are in the model."""
        return {module: disk for disk, module in self.module_of.items() if disk not in self.converted}


def skeleton(opened: OpenedFolder) -> PreTrainedModel:
    """The model of an opened folder on the meta device: names, shapes and ties, no weights."""
    import torch
    from transformers import AutoConfig

    folder = opened.folder
    config = AutoConfig.from_pretrained(folder.path)
    with torch.device("meta"):
        return opened.family.model_class(folder)(config)


def name_table(model: PreTrainedModel, disk_names: Iterable[str]) -> NameTable:
    """The table for `disk_names`; `model` may lie on the meta device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    module_of: dict[str, str] = {}
    converted: set[str] = set()
    for disk in disk_names:
        module, pattern = rename_source_key(disk, renamings, converters, model.base_model_prefix, known)
        if module not in known and disk in known:
            module, pattern = disk, None  # the folder was saved under the parameter names themselves
        if module in known:
            module_of[disk] = module
        if pattern is not None:
            converted.add(disk)
    return NameTable(module_of, frozenset(converted))
