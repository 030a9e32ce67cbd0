"""One test per upstream defect: it fails once the defect is gone, and then the function in compat.py can go."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vlmtune import compat

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
