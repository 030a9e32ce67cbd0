"""The only file that touches other libraries' attributes: one function per upstream defect, with its version range.

Each has a test that fails once the defect is gone, so that the function can be removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import transformers
from transformers import conversion_mapping
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin


class NullVideoProcessor(VideoProcessorMixin):
    """Stands where a processor class insists on a video processor; pictures never reach it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this processor was opened for pictures only")


def construct_processor(processor_class: type[ProcessorMixin], **parts: Any) -> ProcessorMixin:
    """Constructs a processor that has a `video_processor` slot on a machine without torchvision.

    transformers 5.23: `check_argument_for_proper_class` looks the name `VideoProcessorMixin` up in the top-level
    module, where it exists only beside torchvision; the constructors of InternVL's, Qwen-VL's and SmolVLM's processors
    then fail with `AttributeError: … _extra_content`, although pictures need no video processor.
    """
    module: Any = transformers.processing_utils.transformers_module
    if not hasattr(module, "VideoProcessorMixin"):
        module.VideoProcessorMixin = VideoProcessorMixin
    return processor_class(**parts)


def disable_deepspeed_shm_comm() -> None:
    """Lets DeepSpeed use gloo on a CPU without compiling its shared-memory collectives first.

    deepspeed 0.19: the first run builds `deepspeed_shm_comm` with g++ (minutes), and fails where there is no compiler.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fits_4bit_blocks(in_features: int) -> bool:
    """Whether a Linear layer of this width can be 4-bit: its rows must be whole blocks of 64 numbers.

    bitsandbytes 0.50: it quantises the weight as one long line of blocks, but its CPU kernels read them row by row, and
    where a block crosses the end of a row they multiply with the scales of others. The weights are then far off, and
    nothing says so. GPU kernels are not affected, but a run must not depend on the device.
    """
    return in_features % 64 == 0


def keep_4bit_layout(model: Any) -> None:
    """Stops 4-bit layers on a CPU with AVX-512 BF16 from rearranging themselves in an evaluation.

    bitsandbytes 0.50: the first forward pass in eval mode without gradients packs the weights for a kernel of its own,
    with scales rounded to bfloat16. Outputs that 32 does not divide end in an AssertionError; the others stay packed
    when training goes on, where that kernel has no backward pass: the layers before get no gradient.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def forget_unused_conversions(model: Any) -> None:
    """Lets a model that was loaded under ZeRO-3 be saved under the names of its folder.

    transformers 5.23: the ZeRO-3 loader keeps every renaming rule of the architecture, also those that met no tensor,
    and `save_pretrained` reverses them all: InternVL's decoder is saved as `language_model.model.model.…`.
    """
    model._weight_conversions = [rule for rule in model._weight_conversions if rule.was_used()]


def forget_absent_layers(model: Any) -> None:
    """Lets FSDP shard a model with the vision tower of CLIP or SigLIP.

    transformers 5.23: the tower also names parts of the text model that it was trained with as what must not be split,
    and accelerate refuses a model that lacks one of them.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in present}


@contextlib.contextmanager
def conversion_rules(model_type: str, rules: Sequence[Any]) -> Iterator[None]:
    """While it lasts, `from_pretrained` of an architecture reads weights by `rules` instead of transformers' own.

    transformers 5.23: rules can be given to its loader only through a registry of the whole process.
    """
    before = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    listed = model_type in conversion_mapping.USER_REGISTERED_MAPPINGS
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, list(rules), overwrite=True)
    try:
        yield
    finally:
        cache: Any = conversion_mapping._checkpoint_conversion_mapping_cache
        if before is None:
            cache.pop(model_type)
        else:
            cache[model_type] = before
        if not listed:
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(model_type)


def restore_conversions(model: Any) -> None:
    """Lets a model that was read by other rules be saved as a native one.

    transformers 5.23: `save_pretrained` reverses the rules that a model was loaded by, so that a model from an official
    folder would be saved under official names beside a native config.json, which no reader takes.
    """
    model._weight_conversions = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)


def forget_longest_row(model: Any) -> None:
    """Makes the frequencies of dynamic NTK RoPE a function of the batch alone.

    transformers 5.23: `dynamic_frequency_update` keeps the frequencies of the longest row since the last one inside the
    original range, so that a row's logits depend on the rows before it; a resumed run then differs from one that went
    through. Here they are set back before every call, as for a model just loaded.
    """
    for module in model.modules():
        if "original_inv_freq" in module._buffers and module.rope_type == "dynamic":
            module.register_forward_pre_hook(_set_back)


def _set_back(module: Any, args: Any) -> None:
    del args
    module.max_seq_len_cached = module.original_max_seq_len
    module.register_buffer("inv_freq", module.original_inv_freq.to(module.inv_freq.device), persistent=False)
