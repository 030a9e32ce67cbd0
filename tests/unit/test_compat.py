"""One test per upstream defect: it fails once the defect is gone, and then the function in compat.py can go."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
