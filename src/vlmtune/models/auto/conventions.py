"""How models write what a chat template does not say: frames of videos, and boxes; by the model_type of config.json.

Frames: SmolVLM as the processor of transformers writes them (SmolVLMProcessor, `replace_video_token`); every other
model as several pictures in a row. Boxes: Qwen2-VL (arXiv 2409.12191, 2.2.1) and Qwen3-VL count to 1000; Qwen2.5-VL
(arXiv 2502.13923) writes pixels of the picture after its resize; LLaVA-1.5's training data has fractions with two
decimals.
"""

from __future__ import annotations

from vlmtune.models.family import BoxFormat, FrameFormat

_FRAMES: dict[str, FrameFormat] = {
    "smolvlm": FrameFormat(
        opening="You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n",
        before="\nFrame from {time}:",
        close="\n\n",
        count_in_words=True,
    ),
}

_BOXES: dict[str, BoxFormat] = {
    "qwen2_vl": BoxFormat(template="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"),
    "qwen2_5_vl": BoxFormat(unit="pixels"),
    "qwen3_vl": BoxFormat(),
    "llava": BoxFormat(unit="unit"),
    "llava_next": BoxFormat(unit="unit"),
    "llava_onevision": BoxFormat(unit="unit"),
}


def frames(model_type: str) -> FrameFormat | None:
    return _FRAMES.get(model_type)


def boxes(model_type: str) -> BoxFormat:
    """0–1000 in plain brackets where no convention is known."""
    return _BOXES.get(model_type, BoxFormat())
