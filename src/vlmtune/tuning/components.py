"""Which parameters train, at which learning rate: freezing, the report before the start, optimizer groups."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmtune.config.schema import COMPONENTS, Component
from vlmtune.errors import WeightsError
from vlmtune.models.family import Components, OpenedFolder

# What PEFT puts into a parameter's name: the wrapper in front, and the marks of an adapter or of a trained copy inside.
_PEFT_PREFIX = "base_model.model."
_PEFT_MARKS = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.[^.]+)(?=\.|$)"
)

# Modules that FSDP's activation checkpointing and torch.compile put around others.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """One line of the report: numbers of parameters, and the peak learning rate (None when nothing trains)."""

    component: Component
    trained: int
    total: int
    learning_rate: float | None


def native_name(parameter: str) -> str:
    """The name that the parameter, or the weight that an adapter sits on, has in the bare model."""
    for wrapper in _WRAPPERS:
        parameter = parameter.replace(wrapper, "")
    return _PEFT_MARKS.sub("", parameter.removeprefix(_PEFT_PREFIX))


def component_of(parameter: str, components: Components) -> Component:
    """The component of a parameter, PEFT's wrapping seen through.

    Raises:
        WeightsError: no prefix of the family covers the name; every parameter must belong to a component.
    """
    component = components.of(native_name(parameter))
    if component is None:
        raise WeightsError(
            "belongs to no component (vision, projector, language)",
            where=native_name(parameter),
            remedy="The model family's table of components has a hole; please report it.",
        )
    return component


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole tensor, also where DeepSpeed ZeRO-3 left only this rank's part in place, and where
    bitsandbytes packed two 4-bit numbers into each byte of a column."""
    packed = vars(parameter).get("quant_state")
    if packed is not None:
        return torch.Size(packed.shape)
    return torch.Size(vars(parameter).get("ds_shape", parameter.shape))


def never_trains(opened: OpenedFolder) -> re.Pattern[str] | None:
    """Names of parameters that get no gradient by construction, such as tower layers behind the feature layer."""
    pattern = opened.family.lawful_zeros(opened.config)
    return re.compile(pattern) if pattern else None


def freeze_all_but(model: nn.Module, opened: OpenedFolder, trained: Sequence[Component]) -> None:
    """Lets exactly the parameters of the named components train.

    Parameters behind the model's output stay frozen: training could change them only by weight decay.
    """
    idle = never_trains(opened)
    for name, parameter in model.named_parameters():
        component = component_of(name, opened.components)
        parameter.requires_grad_(component in trained and not (idle and idle.search(name)))


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without the frozen originals that PEFT keeps beside a trained copy."""
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            yield name, parameter


def report(model: nn.Module, opened: OpenedFolder, rates: Mapping[Component, float]) -> list[ComponentRow]:
    """Trained and total parameters per component; `rates` as `learning_rates` gives them."""
    trained = dict.fromkeys(COMPONENTS, 0)
    total = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in _counted(model):
        component = component_of(name, opened.components)
        size = full_shape(parameter).numel()
        total[component] += size
        trained[component] += size if parameter.requires_grad else 0
    return [
        ComponentRow(name, trained[name], total[name], rates[name] if trained[name] else None) for name in COMPONENTS
    ]


def table(rows: Sequence[ComponentRow]) -> str:
    """The report as text, one line per component and a sum."""
    lines = [f"{'component':<10} {'trained':>15} {'total':>15} {'share':>8}  learning rate"]
    # "all" is no component; the row only has their columns.
    for row in [*rows, ComponentRow("all", sum(r.trained for r in rows), sum(r.total for r in rows), None)]:  # type: ignore[arg-type]
        share = 100 * row.trained / row.total if row.total else 0.0
        rate = f"{row.learning_rate:g}" if row.learning_rate else ("" if row.component not in COMPONENTS else "frozen")
        lines.append(f"{row.component:<10} {row.trained:>15,} {row.total:>15,} {share:>7.2f}%  {rate}".rstrip())
    return "\n".join(lines)


def learning_rates(default: float, overrides: Mapping[Component, float]) -> dict[Component, float]:
    """Peak learning rate of every component."""
    return {component: overrides.get(component, default) for component in COMPONENTS}


def param_groups(
    model: nn.Module, opened: OpenedFolder, rates: Mapping[Component, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, one per component and kind: `component` (str), `lr`, `weight_decay`, `params`.

    Vectors and scalars (biases, norms, layer scales) are not decayed. Empty groups are left out; the order is fixed, so
    that a saved optimizer finds its parameters again.
    """
    sorted_out: dict[tuple[Component, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = component_of(name, opened.components), len(full_shape(parameter)) > 1
            sorted_out.setdefault(key, []).append(parameter)
    return [
        {
            "component": component,
            "lr": rates[component],
            "weight_decay": weight_decay if decays else 0.0,
            "params": sorted_out[component, decays],
        }
        for component in COMPONENTS
        for decays in (True, False)
        if (component, decays) in sorted_out
    ]
