"""Small videos whose frame i says i in its pixels, in every container that vlmtune reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import PIL.Image

SIZE = (128, 96)
_BITS = 8


def numbered(i: int) -> np.ndarray:
    """uint8 (96, 128, 3): eight bars, black or white, that spell `i` in binary."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    width = SIZE[0] // _BITS
    for bit in range(_BITS):
        if i >> bit & 1:
            pixels[:, bit * width : (bit + 1) * width] = 255
    return pixels


def number_of(picture: PIL.Image.Image) -> int:
    """What `numbered` drew; the compression may have blurred it."""
    pixels = np.asarray(picture)
    width = SIZE[0] // _BITS
    return sum(int(pixels[30:60, bit * width + 5 : bit * width + 11].mean() > 128) << bit for bit in range(_BITS))


def write_video(
    path: Path,
    *,
    codec: str,
    num_frames: int = 40,
    rate: int = 25,
    first_pts: int = 0,
    rotation: int = 0,
    container: Mapping[str, str] | None = None,
    **options: str,
) -> Path:
    """A video of `num_frames` numbered frames; `options` are the encoder's."""
    with av.open(str(path), "w", options=dict(container or {})) as file:
        stream = file.add_stream(codec, rate=rate, options={name.replace("_", "-"): v for name, v in options.items()})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered(i % 256), "rgb24")
            frame.pts = i + first_pts
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


KINDS: Mapping[str, Mapping[str, str]] = {
    "a.mp4": {"codec": "libx264", "g": "12", "bf": "3"},
    "b.mkv": {"codec": "libx264", "g": "12", "bf": "3"},
    "c.webm": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu_used": "8"},
    "d.gif": {"codec": "gif"},
    "e.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "f.mov": {"codec": "mpeg4", "g": "12"},
}
"""One of each container, with frames that are stored out of order where the codec has such."""
