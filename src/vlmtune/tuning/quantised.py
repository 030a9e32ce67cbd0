"""QLoRA: which Linear layers are loaded in 4 bits, and the proof that these were and no others.

Quantised are the blocks of the components that carry adapters (NF4 with double quantisation, through bitsandbytes).
Towers and projectors without adapters, the head, embeddings, and components trained in full stay as they are, and so do
layers whose rows are not whole blocks of 64 numbers (see `compat.fits_4bit_blocks`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vlmtune import compat
from vlmtune.config.schema import FullTuning, LoraTuning
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model
from vlmtune.tuning.adapters import is_meant, target_modules, target_regex
from vlmtune.tuning.components import component_of
from vlmtune.weights.names import skeleton
from vlmtune.weights.strict import listed

PACKAGE = "bitsandbytes"
INSTALL = 'Run: pip install "vlmtune[qlora]".'


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def require(tuning: FullTuning | LoraTuning) -> None:
    """Raises `ConfigError` when the method needs bitsandbytes and it is not installed."""
    if tuning.method == "qlora" and not is_installed():
        raise ConfigError("qlora needs bitsandbytes", where="tuning.method", remedy=INSTALL)


def wanted_names(model: nn.Module, opened: OpenedFolder, tuning: LoraTuning) -> set[str]:
    """Full names of the Linear layers that are to be 4-bit; `model` may lie on the meta device.

    Raises:
        ConfigError: a target that hits nothing, or blocks without a Linear layer that fits.
    """
    targets = target_modules(model, opened, tuning.targets)
    carrying = {component_of(f"{name}.weight", opened.components) for name in targets} - set(tuning.train)
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and compat.fits_4bit_blocks(module.in_features)
        and name not in opened.components.head
        and any(is_meant(name, component, opened.components) for component in carrying)
    }
    if not wanted:
        raise ConfigError(
            "the blocks of the components that carry adapters hold no Linear layer that can be kept in 4 bits",
            where="tuning.targets",
            expected="layers whose number of inputs is a multiple of 64",
            remedy="Choose other targets, or method: lora.",
        )
    return wanted


def four_bit_names(model: nn.Module) -> set[str]:
    """Full names of the layers that really are 4-bit."""
    from bitsandbytes.nn import Linear4bit

    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def check(model: nn.Module, wanted: Collection[str], *, where: str) -> None:
    """Compares what became 4-bit with what should have.

    A wanted layer may have stayed as it was (a class of its own, or one that its model keeps in float32): that costs
    memory only.

    Raises:
        WeightsError: a layer is 4-bit that should not be, or none is.
    """
    found = four_bit_names(model)
    if wrong := sorted(found - set(wanted)):
        raise WeightsError(
            f"{len(wrong)} layers were loaded in 4 bits that should not be: {listed(wrong)}",
            where=where,
            remedy="Please report this with the output of `vlmtune info`; method: lora trains without 4 bits.",
        )
    if not found:
        raise WeightsError(
            "no layer was loaded in 4 bits",
            where=where,
            expected=f"{len(wanted)} of them",
            remedy="Use method: lora, which keeps the base as it is.",
        )


def settings(model: nn.Module, wanted: Collection[str], compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers must be told: NF4 twice, and every layer but `wanted` skipped."""
    convertible = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    skipped = [name for name in convertible if name not in wanted]
    # transformers matches an entry from the start of the full name or as its end, and an own list replaces its default
    # (the head). One pattern of full names, closed at the end, can be read in one way only.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[f"(?:{target_regex(skipped)})$"] if skipped else [],
    )


def load_quantised(
    opened: OpenedFolder,
    tuning: LoraTuning,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model with 4-bit layers where the adapters of `tuning` go, the rest in `dtype`; no adapter yet.

    Args:
        dtype: of what is not quantised, and of the arithmetic.
        device: where the model goes; the current GPU, or the CPU without one, if left out.

    Raises:
        ConfigError: bitsandbytes is absent or cannot be used here; targets that hit nothing.
        WeightsError: as `load_model`; or other layers than the wanted ones became 4-bit.
    """
    require(tuning)
    bare = skeleton(opened)
    wanted = wanted_names(bare, opened, tuning)
    try:
        model = load_model(
            opened, dtype=dtype, attention=attention, quantisation=settings(bare, wanted, dtype), device=device
        )
    except ImportError as error:
        raise ConfigError(
            f"transformers cannot use bitsandbytes here ({str(error).splitlines()[0]})",
            where="tuning.method",
            remedy=INSTALL,
        ) from error
    check(model, wanted, where=str(opened.folder.path))
    compat.keep_4bit_layout(model)
    return model
