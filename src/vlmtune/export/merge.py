"""Plan, then fold an adapter into its base tensor by tensor.

PEFT does the arithmetic. The model is built without weights, its parameters stand-ins of one number each; PEFT lays the
adapter on it as on any model, so that ranks, scales and DoRA's magnitudes are PEFT's own reading of the adapter. Then
each base tensor takes its place in its layer for the moment of the merge, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmtune.infer.session import attach
from vlmtune.weights import strict
from vlmtune.weights.names import NameTable, name_table, skeleton, tied_names
from vlmtune.weights.shards import Shards

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from vlmtune.models.family import OpenedFolder

_PREFIX = "base_model.model."
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # these leave the base weight as it is


class NotStreamable(Exception):
    """The adapter changes something that cannot be found as one tensor of the base; the reason as a clause."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What an adapter does to the parameters of its base, by their names.

    merged: weights that a low-rank update is folded into. replaced: tensors that were trained in full beside it.
    """

    merged: Mapping[str, LoraLayer]
    replaced: Mapping[str, torch.Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.merged or name in self.replaced

    @torch.no_grad()
    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor after the merge, in float32, of the same shape; `name` must be one that the merge changes."""
        if name in self.replaced:
            return self.replaced[name].float()
        layer: Any = self.merged[name]
        base = layer.get_base_layer()
        stand_in = base.weight
        base.weight = torch.nn.Parameter(tensor.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
            return base.weight.detach()
        finally:
            base.weight = stand_in
            layer.merged_adapters.clear()


NOTHING = Merge({}, {})


# Without autograd: its graphs keep large temporaries alive among small results, and the heap grows to the model's size.
@torch.no_grad()
def plan_merge(opened: OpenedFolder, adapter: Path, shards: Shards) -> Merge:
    """Read the adapter and find the base tensors that it changes.

    Raises:
        NotStreamable: see there; the whole model must then be merged at once.
        WeightsError: the adapter does not fit the model.
    """
    _refuse_unusual(adapter)
    model = skeleton(opened)
    table = name_table(model, shards.infos, opened.table)
    tied = tied_names(model)
    fill_with_stand_ins(model)
    wrapped = attach(model, adapter)
    layers, replaced = _changes(wrapped)
    # Tensors that no file needs, as nothing reads them, stand in the copy that PEFT makes of a component all the same.
    may_lack = [name for name in replaced if name not in table.link_of]
    unneeded = set(may_lack) - set(strict.demanded(may_lack, model._keys_to_ignore_on_load_missing))
    replaced = {name: tensor for name, tensor in replaced.items() if name not in unneeded}
    return Merge(_on_disk(layers, table, tied), _on_disk(replaced, table, tied))


def _refuse_unusual(adapter: Path) -> None:
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != "LORA":
        raise NotStreamable(f"it is of the type {config.peft_type}")
    if config.bias != "none" or config.lora_bias:
        raise NotStreamable("it changes biases")
    if config.target_parameters or config.trainable_token_indices or config.layer_replication:
        raise NotStreamable("it changes more than whole layers")
    if config.init_lora_weights not in _INITS:
        raise NotStreamable(f"its initialisation ({config.init_lora_weights}) changes the base")


def fill_with_stand_ins(model: torch.nn.Module, value: float = 0.0, device: torch.device | None = None) -> None:
    """Put tensors of the right shape and of one number in memory where the meta tensors are.

    PEFT moves an adapter to the device of its base layer, so on the meta device its numbers would be lost.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                stand_in = torch.full((1,), value, device=device).expand(parameter.shape)
                made[id(parameter)] = torch.nn.Parameter(stand_in, requires_grad=False)
            module.register_parameter(name, made[id(parameter)])


def _changes(wrapped: torch.nn.Module) -> tuple[dict[str, LoraLayer], dict[str, torch.Tensor]]:
    """Parameter name -> layer that is merged, and parameter (or buffer) name -> trained tensor."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    layers: dict[str, LoraLayer] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name, module in wrapped.named_modules():
        inner = name.removeprefix(_PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            for key, tensor in module.modules_to_save["default"].state_dict().items():
                replaced[f"{inner}.{key}"] = tensor
        elif isinstance(module, LoraLayer):
            layers[f"{inner}.weight"] = module
    return layers, replaced


def _on_disk(changes: Mapping[str, Any], table: NameTable, tied: Mapping[str, str]) -> dict[str, Any]:
    """The changes by the names of the parameters that lie on disk."""
    link_of = table.link_of
    found: dict[str, Any] = {}
    for name, change in changes.items():
        # A folder with tied weights may hold either name, or both; all of them are the one tensor.
        places = [one for one in (name, tied.get(name)) if one in link_of]
        if not places:
            raise NotStreamable(f"{name} is not one tensor of the base")
        found.update((str(place), change) for place in places)
    return found
