"""The weights that a run starts from: the base model, or those of the checkpoint that it goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel, set_seed

from vlmtune.config.schema import RunConfig
from vlmtune.errors import WeightsError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.train.arguments import resolve_precision
from vlmtune.tuning.adapters import prepare
from vlmtune.tuning.quantised import load_quantised

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def source(config: RunConfig, opened: OpenedFolder, resumed: Path | None) -> OpenedFolder:
    """The folder that holds the whole model: the base, or the checkpoint of a full run that is gone on with."""
    if resumed is None or config.tuning.method != "full":
        return opened
    return open_folder(resumed, config.media)


def load(
    config: RunConfig,
    source: OpenedFolder,
    resumed: Path | None,
    *,
    partitioned: bool,
    native_base: Path | None = None,
) -> PreTrainedModel | PeftModel:
    """The prepared model on the CPU (a 4-bit one on the GPU if there is one), with the weights of `resumed` if any.

    Full tuning keeps float32 master weights and computes under autocast; under an adapter the frozen base is kept in
    the precision of the forward pass, and for QLoRA the blocks with adapters in 4 bits.

    Args:
        source: see the function of this name; opened before DeepSpeed's settings exist.
        partitioned: ZeRO-3, where DeepSpeed reads the adapter of a checkpoint itself.
        native_base: what an adapter names as its base, instead of the folder that was read.
    """
    full = config.tuning.method == "full"
    half = not full and resolve_precision(config.train) == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    if config.tuning.method == "qlora":
        model = load_quantised(source, config.tuning, dtype=dtype, attention=config.model.attention)
    else:
        model = load_model(source, dtype=dtype, attention=config.model.attention)
    _make_savable(model)
    # Adapters begin alike on every rank and under every strategy; loading draws random numbers under ZeRO-3 only.
    set_seed(config.train.seed)
    prepared = prepare(model, source, config.tuning)
    if isinstance(prepared, PeftModel) and native_base is not None:
        for settings in prepared.peft_config.values():
            settings.base_model_name_or_path = str(native_base)
    if isinstance(prepared, PeftModel) and resumed is not None and not partitioned:
        _load_adapter(prepared, resumed)
    return prepared


def _make_savable(model: PreTrainedModel) -> None:
    """transformers refuses to save generation settings that contradict each other, as some public models' do.

    The base folder's own generation_config.json is copied into every checkpoint afterwards, so nothing is lost.
    """
    if not model.can_generate() or model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()


def _load_adapter(model: PeftModel, folder: Path) -> None:
    """Fills the adapter, every tensor of it.

    Raises:
        WeightsError: keys that differ.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    differing = sorted(set(saved) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if differing:
        raise WeightsError(
            f"the adapter does not fit this run; keys that differ: {', '.join(differing[:5])}",
            where=str(folder / ADAPTER_WEIGHTS),
        )
    set_peft_model_state_dict(model, saved)
