"""What trains, made ready: LoRA, DoRA, rsLoRA and QLoRA adapters through PEFT, targets and ranks by component."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from vlmtune.config.schema import COMPONENTS, Component, FullTuning, LoraTuning
from vlmtune.errors import ConfigError
from vlmtune.models.family import Components, OpenedFolder
from vlmtune.nn import drop_path
from vlmtune.nn.partial_lora import PartialLoRA
from vlmtune.tuning.components import component_of, freeze_all_but, native_name, never_trains

HEAD = "head"
_COPY = ".modules_to_save."  # in PEFT's names of what trains beside an adapter


def prepare(
    model: PreTrainedModel, opened: OpenedFolder, tuning: FullTuning | LoraTuning
) -> PreTrainedModel | PeftModel:
    """Makes ready what trains: freezes components, or wraps the model with an adapter; installs drop path.

    Every trained tensor, and all of a component that trains beside an adapter, is float32 afterwards, whatever the base
    is kept in.

    Raises:
        ConfigError: a target hits no Linear layer (the message names candidates), a component with a rank of its own
            carries no adapter, or drop path or partial LoRA's dropout is asked of a model that cannot have it.
        WeightsError: a parameter belongs to no component.
    """
    if isinstance(tuning, FullTuning):
        freeze_all_but(model, opened, tuning.train)
        prepared: PreTrainedModel | PeftModel = model
    else:
        prepared = _with_adapter(model, opened, tuning)
    for name, parameter in prepared.named_parameters():
        # Small updates vanish in bfloat16; the forward pass runs under autocast. Frozen layers inside a trained copy go
        # along: not every one takes the float32 of the layers before it, and FSDP2 wants one dtype in what it shards.
        if parameter.requires_grad or (_COPY in name and parameter.is_floating_point()):
            parameter.data = parameter.data.float()
    if tuning.drop_path:
        _install_drop_path(prepared, opened, tuning.drop_path)
    if tuning.partial_lora_dropout:
        _drop_in_partial_lora(prepared, tuning.partial_lora_dropout)
    return prepared


def _drop_in_partial_lora(model: nn.Module, rate: float) -> None:
    found = [module for module in model.modules() if isinstance(module, PartialLoRA)]
    if not found:
        raise ConfigError(
            "has no effect: this model has no partial LoRA",
            where="tuning.partial_lora_dropout",
            remedy="Leave it out; tuning.dropout is the dropout of the adapter that trains.",
        )
    for module in found:
        module.dropout = rate


def _install_drop_path(model: nn.Module, opened: OpenedFolder, rate: float) -> None:
    """On the tower's layers, in the copy as well that PEFT trains of a tower beside the adapter."""
    if opened.family.lays_end_to_end(opened.spec):
        raise ConfigError(
            "does not go with merged tokens or pictures in their own shapes: the pictures of a micro batch lie end to "
            "end in the tower, so that a branch would be dropped for all of them at once",
            where="tuning.drop_path",
            remedy="Leave it out.",
        )
    blocks = opened.components.blocks.get("vision", ())
    stacks = [
        list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and native_name(name) in blocks
    ]
    if not stacks or not all(drop_path.branches(layer) for layers in stacks for layer in layers):
        raise ConfigError(
            "the vision tower's layers have no attention and MLP branch that a tile could skip",
            where="tuning.drop_path",
            expected="a tower built like InternViT, CLIP or SigLIP",
            remedy="Leave it out.",
        )
    for layers in stacks:
        drop_path.install(layers, rate)


def target_modules(model: nn.Module, opened: OpenedFolder, targets: Sequence[str]) -> list[str]:
    """Names of the Linear layers that the targets mean: components (their blocks), `head`, or suffixes of names."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    idle = never_trains(opened)
    linear = [name for name in linear if not (idle and idle.search(f"{name}.weight"))]
    chosen: dict[str, None] = {}
    for target in targets:
        hits = [name for name in linear if is_meant(name, target, opened.components)]
        if not hits:
            raise _no_hits(target, linear, opened.components)
        chosen.update(dict.fromkeys(hits))
    return list(chosen)


def target_regex(names: Iterable[str]) -> str:
    """One regular expression that matches these full names and no other (PEFT matches it against the whole name).

    Names that differ only in layer numbers share a branch, so the adapter's config stays readable.
    """
    patterns: dict[str, set[str]] = {}
    for name in names:
        pattern = ".".join("#" if part.isdigit() else part for part in name.split("."))
        patterns.setdefault(pattern, set()).add(name)
    return "|".join(_numbered(pattern, found) for pattern, found in patterns.items())


def _numbered(pattern: str, names: set[str]) -> str:
    """The pattern with the numbers that really occur in place of each `#`."""
    if "#" not in pattern:
        return re.escape(pattern)
    numbers = [tuple(int(part) for part in name.split(".") if part.isdigit()) for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    product = 1
    for column in columns:
        product *= len(column)
    if product != len(names):  # not a full grid: spelled out, since a shorter pattern would match too much
        return "|".join(re.escape(name) for name in sorted(names))
    choices = iter(columns)
    parts = (_one_of(next(choices)) if part == "#" else re.escape(part) for part in pattern.split("."))
    return r"\.".join(parts)


def _one_of(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else "(?:" + "|".join(map(str, numbers)) + ")"


def is_meant(name: str, target: str, components: Components) -> bool:
    """Whether the target (a component's blocks, `head`, or the end of a name) means the module `name`."""
    if target == HEAD:
        return name in components.head
    if target in COMPONENTS:
        prefixes = components.blocks.get(target) or _prefixes(components, target)
        return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    return name == target or name.endswith("." + target)


def _prefixes(components: Components, component: Component) -> tuple[str, ...]:
    return {"vision": components.vision, "projector": components.projector, "language": components.language}[component]


def _no_hits(target: str, linear: list[str], components: Components) -> ConfigError:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(target, [*COMPONENTS, HEAD, *suffixes], n=1)
    return ConfigError(
        f"{target!r} hits no Linear layer of this model",
        where="tuning.targets",
        expected=f"vision, projector, language, head, or the end of a module's name such as {', '.join(suffixes)}",
        remedy=f"Did you mean {near[0]}?" if near else "",
    )


def _with_adapter(model: PreTrainedModel, opened: OpenedFolder, tuning: LoraTuning) -> PeftModel:
    names = target_modules(model, opened, tuning.targets)
    for name, _ in model.named_parameters():
        component_of(name, opened.components)  # a hole in the table is found before the run, not after
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied and set(names) & set(opened.components.head):
        raise ConfigError(
            "the output head shares its weight with the input embeddings, so an adapter on it cannot be merged",
            where="tuning.targets",
            remedy="Leave out `head`.",
        )
    if tied and "language" in tuning.train:
        raise ConfigError(
            "the output head shares its weight with the input embeddings, and PEFT would train two copies of it",
            where="tuning.train",
            remedy="Train the language component by method: full, or by the adapter.",
        )
    idle = never_trains(opened)
    ranks, alphas = _patterns(names, opened.components, tuning)
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=_alpha(tuning, None),  # type: ignore[arg-type] # PEFT only multiplies
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=tuning.dropout,
        target_modules=target_regex(names),
        modules_to_save=_modules_of(model, opened, tuning.train) or None,
        use_dora=tuning.method == "dora",
        use_rslora=tuning.method == "rslora",
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if idle and _COPY in name and idle.search(native_name(name)):
            parameter.requires_grad_(False)
    if is_our_own(type(model)):
        # Without a task PEFT's Auto classes would look the model up by its module, and refuse all but a few packages.
        for one in wrapped.peft_config.values():
            one.task_type = TaskType.CAUSAL_LM
    return wrapped


def is_our_own(model_class: type[PreTrainedModel]) -> bool:
    """Whether the class is this program's, so that transformers knows it after `import vlmtune.models` only."""
    return model_class.__module__.split(".")[0] == __name__.split(".")[0]


def _alpha(tuning: LoraTuning, component: Component | None) -> float:
    """The scale of a component's adapters, or of those of all components that are not named (None)."""
    if component is not None and component in tuning.alphas:
        return tuning.alphas[component]
    rank = tuning.rank if component is None else tuning.ranks.get(component, tuning.rank)
    return tuning.alpha if tuning.alpha is not None else 2 * rank


def _patterns(names: Sequence[str], components: Components, tuning: LoraTuning) -> tuple[dict[str, Any], ...]:
    """PEFT's `rank_pattern` and `alpha_pattern`: one entry for each component whose figures are its own.

    Raises:
        ConfigError: a component is named that carries no adapter.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for component in COMPONENTS:
        if component not in tuning.ranks and component not in tuning.alphas:
            continue
        carrying = [name for name in names if component_of(f"{name}.weight", components) == component]
        if not carrying:
            raise ConfigError(
                f"names {component}, where no adapter goes",
                where="tuning.ranks" if component in tuning.ranks else "tuning.alphas",
                remedy=f"Add {component} to tuning.targets, or leave it out here.",
            )
        pattern = target_regex(carrying)
        ranks[pattern] = tuning.ranks.get(component, tuning.rank)
        alphas[pattern] = _alpha(tuning, component)
    return ranks, alphas


def _modules_of(model: nn.Module, opened: OpenedFolder, trained: Sequence[Component]) -> list[str]:
    """Modules that hold the components trained in full beside the adapter; PEFT trains and saves a copy of each.

    They are the largest ones that hold nothing else: a Qwen-VL tower has the projector inside, and a copy of the tower
    beside a copy of the projector would leave one of the two without effect.
    """
    found = {component: False for component in trained}
    modules: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        names = [f"{name}.{inner}" if name else inner for inner, _ in module.named_parameters()]
        held = {component_of(parameter, opened.components) for parameter in names}
        if not held & set(trained):
            return
        if name and held <= set(trained) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            modules.append(name)
            found.update(dict.fromkeys(held, True))
            return
        for inner, _ in module.named_parameters(recurse=False):
            if component_of(f"{name}.{inner}", opened.components) in trained:
                raise ConfigError(
                    f"{name}.{inner} stands in a module that is not trained as a whole, but PEFT saves whole ones only",
                    where="tuning.train",
                    remedy="Train all components of that module, or use method: full.",
                )
        for inner, child in module.named_children():
            visit(f"{name}.{inner}" if name else inner, child)

    visit("", model)
    if absent := [component for component, seen in found.items() if not seen]:
        raise ConfigError(f"this model has no {absent[0]}", where="tuning.train", remedy=f"Leave out {absent[0]}.")
    return modules
