"""One test per upstream defect: it fails once the defect is gone, and then the function in compat.py can go."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    conversion_mapping,
)

from vlmtune import compat
from vlmtune.models.load import open_folder
from vlmtune.weights.loading import _Renamed, conversion_rules

DEFECT = """
import transformers
from transformers.models.internvl.processing_internvl import InternVLProcessor
try:
    InternVLProcessor(image_processor=None, tokenizer=None, video_processor=None)
except AttributeError as error:
    print("defect:", error)
except Exception as error:
    print("gone:", type(error).__name__, error)
"""


def test_processors_with_a_video_slot_cannot_be_constructed_without_torchvision() -> None:
    probe = DEFECT.replace("image_processor=None, tokenizer=None, ", "")
    probe = probe.replace(
        "InternVLProcessor(video_processor=None)",
        "InternVLProcessor.check_argument_for_proper_class(InternVLProcessor, 'video_processor', None)",
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert "defect:" in result.stdout, f"transformers mended it: remove compat.construct_processor ({result.stdout})"


def test_null_video_processor_refuses_videos() -> None:
    with pytest.raises(NotImplementedError, match="pictures only"):
        compat.NullVideoProcessor()([])


def four_bit_layer(width: int) -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX-512 BF16")
    return layer


def trained(layer: torch.nn.Module, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a layer returns in training, and the gradient of its inputs."""
    inputs = torch.ones(2, width, requires_grad=True)
    outputs = layer.train()(inputs)
    outputs.sum().backward()
    return outputs, inputs.grad


def evaluated_then_trained(layer: torch.nn.Module, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        layer.eval()(torch.ones(2, width))
    return trained(layer, width)


def test_4bit_layers_rearrange_themselves_in_an_evaluation() -> None:
    with pytest.raises(AssertionError, match="divisible"):
        evaluated_then_trained(four_bit_layer(48), 48)
    gone = "bitsandbytes mended it: remove compat.keep_4bit_layout"
    _, gradient = evaluated_then_trained(four_bit_layer(64), 64)
    assert gradient is None or not gradient.any(), gone


def nf4_error(rows: int, width: int) -> float:
    """Largest error of packing and unpacking normal numbers, in parts of the largest one."""
    bnb = pytest.importorskip("bitsandbytes")
    exact = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(exact, quant_type="nf4")
    rounded = bnb.functional.dequantize_4bit(packed, state)
    return float((rounded - exact).abs().max() / exact.abs().max())


def test_4bit_rows_must_be_whole_blocks_on_a_cpu() -> None:
    half_step = 0.16  # half the widest distance of two levels of NF4, and something for the scale
    assert compat.fits_4bit_blocks(192) and nf4_error(16, 192) < half_step
    assert not compat.fits_4bit_blocks(96)
    assert nf4_error(16, 96) > half_step, "bitsandbytes mended it: remove compat.fits_4bit_blocks"


@pytest.mark.parametrize("width", [48, 64])
def test_4bit_layers_that_keep_their_layout_train_after_an_evaluation(width: int) -> None:
    layer = four_bit_layer(width)
    compat.keep_4bit_layout(torch.nn.Sequential(layer))
    before, after = trained(layer, width), evaluated_then_trained(layer, width)
    for one, two in zip(before, after, strict=True):
        assert one is not None and two is not None and two.any() and torch.equal(one, two)


def _official(tiny_folder: Callable[[str], Path], **options: Any) -> Any:
    """An official folder read by our rules, as `models.load` does, but with nothing mended afterwards."""
    opened = open_folder(tiny_folder("official-internlm2"))
    assert opened.table is not None
    with compat.conversion_rules("internvl", conversion_rules(opened.table)):
        return InternVLForConditionalGeneration.from_pretrained(
            opened.folder.path, config=copy.deepcopy(opened.config), **options
        )


def test_rules_for_other_layouts_can_only_be_registered(tiny_folder: Callable[[str], Path]) -> None:
    taken = inspect.signature(InternVLForConditionalGeneration.from_pretrained).parameters
    assert not {"weight_mapping", "weight_conversions"} & set(taken), "given directly, they need no registry"
    before = conversion_mapping.get_checkpoint_conversion_mapping("internvl")
    _official(tiny_folder)
    after = conversion_mapping.get_checkpoint_conversion_mapping("internvl")
    assert [rule.source_patterns for rule in after] == [rule.source_patterns for rule in before]
    assert "internvl" not in conversion_mapping.USER_REGISTERED_MAPPINGS


def test_rules_go_when_they_are_left_whatever_happens_inside() -> None:
    def names() -> list[str]:
        return [type(rule).__name__ for rule in conversion_mapping.get_checkpoint_conversion_mapping("internvl")]

    before = names()
    with compat.conversion_rules("internvl", ["outer"]):
        with pytest.raises(OSError, match="lost"), compat.conversion_rules("internvl", [1]):
            assert names() == ["int"]
            raise OSError("lost")
        assert names() == ["str"]
        assert "internvl" in conversion_mapping.USER_REGISTERED_MAPPINGS
    assert names() == before
    assert "internvl" not in conversion_mapping.USER_REGISTERED_MAPPINGS


def test_a_model_from_other_rules_is_saved_under_their_names_unless_restored(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = _official(tiny_folder)
    assert any(isinstance(rule, _Renamed) for rule in model._weight_conversions), "then nothing needs restoring"
    compat.restore_conversions(model)
    model.save_pretrained(tmp_path)
    _, info = InternVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@torch.no_grad()
def test_dynamic_frequencies_remember_the_longest_row_unless_told_to_forget() -> None:
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**text, **heads, rope_parameters=rope)).eval()
    long, longer = torch.arange(1, 13)[None], torch.arange(1, 31)[None]
    alone = model(long).logits
    model(longer)
    assert not torch.allclose(model(long).logits, alone), "transformers forgets by itself now"
    compat.forget_longest_row(model)
    model(longer)
    assert torch.equal(model(long).logits, alone)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_towers_name_layers_that_they_do_not_have(kind: str) -> None:
    """accelerate looks for each of these names in the model, and refuses to shard it where one is absent."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"model_type": "llama", "vocab_size": 4, **small}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config={"model_type": kind, **small}, text_config=text))
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) - present, "transformers mended it: remove compat.forget_absent_layers"
    compat.forget_absent_layers(model)
    assert set(model._no_split_modules) <= present
    assert {"LlamaDecoderLayer", f"{'CLIP' if 'clip' in kind else 'Siglip'}EncoderLayer"} <= model._no_split_modules
