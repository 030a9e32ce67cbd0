"""Videos as pictures: which frames are shown, and all pictures and frames of a row, decoded in one pass over each file.

A frame is a `MediaRef` with a number. A folder of pictures is a video too: its frames are its pictures in the natural
order of their names. Other videos are files, see `media.containers`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import PIL.Image

from vlmtune.config.schema import MediaOptions, VideoOptions
from vlmtune.data.media import containers, pictures
from vlmtune.data.media.containers import Header
from vlmtune.data.sample import MediaRef, Size
from vlmtune.errors import DataError

DEFAULT_FRAMES = 8
MAX_FRAMES = 4096
"""Most frames of one video in a row."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif")

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Film:
    """The chosen frames of one video: where they are, their sizes, and when they are shown, in seconds."""

    frames: tuple[MediaRef, ...]
    sizes: tuple[Size, ...]
    times: tuple[float, ...] | None
    duration: float | None


def frame_indices(total: int, num_frames: int, *, last: bool = True) -> list[int]:
    """`num_frames` of `total` frames, evenly from the first, truncated to whole numbers; the last one always.

    The same as AuroraCap's read_video_pyav (github rese1f/aurora): with `num_frames` 1 there are two, and where
    truncation misses the last frame there is one more than asked for.

    Args:
        last: False: no frame is added for the sake of the last one.
    """
    indices = np.linspace(0, total - 1, min(num_frames, total)).astype(int).tolist()
    return indices if not last or indices[-1] == total - 1 else [*indices, total - 1]


def frame_indices_by_rate(total: int, rate: float, fps: float) -> list[int]:
    """The frame that is shown at 0, 1/fps, 2/fps … seconds; every frame once where the film has fewer."""
    step = max(rate / fps, 1.0)
    return [int(k * step) for k in range(int(np.ceil(total / step))) if int(k * step) < total]


def header(ref: MediaRef, options: MediaOptions) -> Header:
    """Size, number of frames and rate.

    Raises:
        DataError: missing, unreadable or foreign file, no frame, or more than `max_image_pixels` pixels in one.
        UsageError: PyAV is not installed.
    """
    if _is_folder(ref):
        names = _names_in(ref)
        return Header(pictures.size(_picture_in(ref, names, 0), options), len(names), None)
    return containers.header(ref, options)


def film(ref: MediaRef, options: MediaOptions) -> Film:
    """The frames that `options.video` chooses, from the header.

    Raises:
        DataError: as `header`; too many frames; a rate is asked of a folder, which has none.
    """
    found = header(ref, options)
    indices = _choose(found, ref, options.video)
    frames = tuple(replace(ref, frame=i) for i in indices)
    if found.rate is None:
        return Film(frames, tuple(sizes(frames, options)), None, None)
    times = tuple(i / found.rate for i in indices)
    return Film(frames, (found.size,) * len(frames), times, found.num_frames / found.rate)


def _choose(found: Header, ref: MediaRef, options: VideoOptions) -> list[int]:
    if options.fps is not None and found.rate is None:
        raise DataError(
            f"the video {pictures.name_of(ref)} has no frame rate, so fps cannot choose its frames",
            expected="a video file",
            remedy="Set model.video: {num_frames: N} instead.",
        )
    total, rate, fps = found.num_frames, found.rate or 1.0, options.fps
    num_frames = options.num_frames or DEFAULT_FRAMES
    # Before any list is made: a damaged header may announce billions of frames.
    asked = min(num_frames, total) if fps is None else total / max(rate / fps, 1.0)
    if asked > MAX_FRAMES:
        raise DataError(
            f"{int(asked):,} frames of the video {pictures.name_of(ref)} are asked for",
            expected=f"at most {MAX_FRAMES:,}",
            remedy="Lower model.video.num_frames or model.video.fps, or cut the video.",
        )
    if fps is not None:
        return frame_indices_by_rate(total, rate, fps)
    return frame_indices(total, num_frames, last=options.last_frame)


def sizes(refs: Sequence[MediaRef], options: MediaOptions) -> list[Size]:
    """(width, height) of every picture and frame, from headers; raises as `header`."""
    found: list[Size] = []
    for whole, group in groupby(refs, _whole):
        if whole is None:
            found += [pictures.size(ref, options) for ref in group]
        elif _is_folder(whole):
            names = _names_in(whole)
            found += [pictures.size(_picture_in(whole, names, ref.frame or 0), options) for ref in group]
        else:
            found += [header(whole, options).size] * len(list(group))
    return found


def open_pictures(refs: Sequence[MediaRef], options: MediaOptions) -> Generator[PIL.Image.Image, None, None]:
    """Every picture and frame as `pictures.open_image` gives pictures, in order; one pass over each video.

    Raises:
        DataError: as `pictures.open_image`; a frame that the file does not hold.
        UsageError: PyAV is not installed.
    """
    for group in _passes(refs):
        whole = _whole(group[0])
        if whole is None:
            yield from (pictures.open_image(ref, options) for ref in group)
        else:
            with closing(_frames(whole, [ref.frame or 0 for ref in group], options)) as chosen:
                yield from chosen


def _passes(refs: Sequence[MediaRef]) -> Iterator[list[MediaRef]]:
    """Pictures in a row, and frames of one video whose numbers ascend: the same video again is a pass of its own."""
    group: list[MediaRef] = []
    for ref in refs:
        goes_on = (
            group and _whole(group[-1]) == _whole(ref) and (ref.frame is None or ref.frame > (group[-1].frame or 0))
        )
        if group and not goes_on:
            yield group
            group = []
        group.append(ref)
    if group:
        yield group


def decode(refs: Sequence[MediaRef], options: MediaOptions) -> None:
    """Every picture and frame once, to be sure that each can be; raises as `open_pictures`."""
    with closing(open_pictures(refs, options)) as decoded:
        for _ in decoded:
            pass


def _whole(ref: MediaRef) -> MediaRef | None:
    """The video that a frame is of; None for a picture."""
    return None if ref.frame is None else replace(ref, frame=None)


def _frames(ref: MediaRef, indices: Sequence[int], options: MediaOptions) -> Generator[PIL.Image.Image, None, None]:
    """The frames with these numbers, which ascend."""
    if _is_folder(ref):
        names = _names_in(ref)
        for i in indices:
            yield pictures.open_image(_picture_in(ref, names, i), options)
        return
    yield from containers.frames(ref, indices, options)


def _is_folder(ref: MediaRef) -> bool:
    return ref.inline is None and ref.length is None and os.path.isdir(ref.path)


def _names_in(ref: MediaRef) -> list[str]:
    """The pictures of a folder in the natural order of their names: frame2 before frame10."""
    names = [name for name in os.listdir(ref.path) if name.lower().endswith(_PICTURES)]
    if not names:
        raise DataError(f"the folder {ref.path} holds no pictures", expected=containers.EXPECTED)
    return sorted(names, key=lambda name: ([int(run) if run.isdecimal() else run for run in _DIGITS.split(name)], name))


def _picture_in(ref: MediaRef, names: Sequence[str], number: int) -> MediaRef:
    if number >= len(names):
        raise DataError(
            f"the folder {ref.path} holds {len(names):,} pictures, and its picture {number + 1:,} was planned",
            remedy="Do not change the data during a run.",
        )
    path = os.path.join(ref.path, names[number])
    if os.path.islink(path):
        raise DataError(f"the frame {path} is a link", expected="picture files in a folder of frames")
    return MediaRef(path=path)
