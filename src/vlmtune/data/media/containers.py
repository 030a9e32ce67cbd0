"""Video files through PyAV, which is loaded only when one is met: their header, and chosen frames as pictures.

Frame i is the i-th picture that the decoder shows, whatever order the file stores them in. The count comes from the
header (less what an edit list hides), or from counting packets where the header has none (webm, mkv). No pixel but the
first frame's is decoded for it: only a decoded frame knows its rotation. A file that turns out to hold fewer frames
than it announced is an error as soon as a missing one is needed. Pixels that are not square are not stretched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import pictures
from vlmtune.data.sample import MediaRef, Size
from vlmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

INSTALL = 'Run: pip install "vlmtune[video]".'
EXPECTED = "an mp4, mov, webm, mkv, avi or gif file, or a folder of pictures"

# A jump to a keyframe flushes the decoder; over less than this many frames, going on is as fast.
_WORTH_A_JUMP = 16
# Below this frame number everything is decoded in order, without a look at the packets first.
_WORTH_A_TABLE = 64

# The demuxer is chosen by the first bytes and not by FFmpeg, whose guesses include playlists that name other files.
_DEMUXERS: tuple[tuple[int, bytes, str], ...] = (
    *((4, kind, "mov") for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"GIF8", "gif"),
    (8, b"AVI ", "avi"),
)

_TURNS = {
    90: PIL.Image.Transpose.ROTATE_90,
    180: PIL.Image.Transpose.ROTATE_180,
    270: PIL.Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class Header:
    """size: (width, height) as it is looked at. rate: frames per second; None for a folder."""

    size: Size
    num_frames: int
    rate: float | None


def header(ref: MediaRef, options: MediaOptions) -> Header:
    """Size, number of frames and rate.

    Raises:
        DataError: missing, unreadable or foreign file, no frame, or more than `max_image_pixels` pixels in one.
        UsageError: PyAV is not installed.
    """
    with _opened(ref, options) as (container, stream):
        total = _announced(stream)
        rate = stream.average_rate or stream.guessed_rate
        with closing(_decoded(ref, container, stream)) as frames:
            first = next(frames, None)
        if first is None:
            raise DataError(
                f"the video {pictures.name_of(ref)} has no frames", remedy="Replace it, or take the row out."
            )
        size = _upright(first, ref, options)[0]
    if total is None:
        with _opened(ref, options) as (container, stream), _told(ref):
            total = sum(_is_shown(packet, stream) for packet in container.demux(stream))
    return Header(size, max(total, 1), float(rate) if rate else None)  # one was decoded, whatever the packets say


def frames(ref: MediaRef, indices: Sequence[int], options: MediaOptions) -> Generator[PIL.Image.Image, None, None]:
    """The frames with these numbers, which ascend, as RGB; one pass over the file.

    Raises:
        DataError: as `header`, for damage, and for a frame that the file does not hold.
        UsageError: PyAV is not installed.
    """
    with closing(_chosen(ref, indices, options)) as chosen:
        for frame in chosen:
            turn = _upright(frame, ref, options)[1]
            picture = PIL.Image.fromarray(frame.to_ndarray(format="rgb24"))
            yield picture if turn is None else picture.transpose(turn)


def _chosen(ref: MediaRef, indices: Sequence[int], options: MediaOptions) -> Generator[VideoFrame, None, None]:
    """By jumps where that pays and the file allows it, else one after the other."""
    done = 0
    if indices[-1] >= _WORTH_A_TABLE:
        table = _Table.of(ref, options)
        if table is not None and indices[-1] < len(table.shown):
            for frame in _by_jumps(ref, [table.shown[i] for i in indices], table, options):
                done += 1
                yield frame
    left = indices[done:]
    if not left:
        return
    with _opened(ref, options) as (container, stream), closing(_decoded(ref, container, stream)) as frames:
        number = -1
        for wanted in left:
            for frame in frames:
                number += 1
                if number == wanted:
                    yield frame
                    break
            else:
                raise DataError(
                    f"the video {pictures.name_of(ref)} ends after {number + 1:,} frames, and its frame {wanted + 1:,} "
                    "was announced",
                    remedy="The file is cut off or its header is wrong: make it anew, or take the row out.",
                )


@dataclass(frozen=True, slots=True)
class _Table:
    """When frames are shown (in the order of showing), and those of them that decoding can begin at."""

    shown: list[int]
    keys: list[int]

    @classmethod
    def of(cls, ref: MediaRef, options: MediaOptions) -> _Table | None:
        """From the packets, undecoded; None where they do not say it."""
        with _opened(ref, options) as (container, stream), _told(ref):
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if _is_shown(p, stream)]
        times = [pts for pts, _ in packets if pts is not None]
        if len(times) < len(packets) or len(set(times)) < len(times):
            return None
        return cls(sorted(times), sorted(pts for pts, is_key in packets if is_key and pts is not None))


def _by_jumps(
    ref: MediaRef, wanted: Sequence[int], table: _Table, options: MediaOptions
) -> Generator[VideoFrame, None, None]:
    """Frames by their times; ends early where a jump leads elsewhere, and the caller goes on in order."""
    import av

    with _opened(ref, options) as (container, stream):
        frames = container.decode(stream)
        reached = -1  # place of the last decoded frame
        for time in wanted:
            key = table.keys[max(bisect_right(table.keys, time) - 1, 0)] if table.keys else table.shown[0]
            try:
                if bisect_right(table.shown, key) - 1 - reached > _WORTH_A_JUMP:
                    container.seek(key, stream=stream)
                    frames = container.decode(stream)
                frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
            except av.error.FFmpegError:
                return
            if frame is None or frame.pts != time or frame.is_corrupt:
                return
            reached = bisect_right(table.shown, time) - 1
            yield frame


@contextmanager
def _opened(ref: MediaRef, options: MediaOptions) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, closed at the end whatever happens."""
    av = _pyav()
    with pictures.open_bytes(ref) as source, _told(ref):
        begin = source.read(12)
        demuxer = next((name for at, magic, name in _DEMUXERS if begin[at:].startswith(magic)), None)
        if demuxer is None:
            found = f"is not a video: it begins with {begin!r}" if begin else "is an empty file"
            raise DataError(f"{pictures.name_of(ref)} {found}", expected=EXPECTED)
        source.seek(0)
        with av.open(source, format=demuxer, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None or not stream.width:
                raise DataError(
                    f"the file {pictures.name_of(ref)} holds no video track that can be read, or is cut off",
                    expected=EXPECTED,
                )
            pictures.refuse_bomb(
                (stream.width, stream.height), f"a frame of {pictures.name_of(ref)}", options.max_image_pixels
            )
            stream.codec_context.thread_count = 1  # the loader's processes are the parallel part
            # A frame that is larger than the header says is not allocated; a damaged one is an error, not a guess.
            stream.codec_context.options = {"max_pixels": str(options.max_image_pixels), "err_detect": "explode"}
            yield container, stream


@contextmanager
def _told(ref: MediaRef) -> Iterator[None]:
    """FFmpeg's errors as ours."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        why = (error.strerror or str(error) or type(error).__name__).strip()
        raise DataError(
            f"the video {pictures.name_of(ref)} cannot be decoded ({why})",
            remedy="The file is damaged; replace it or take the row out.",
        ) from error


def _decoded(ref: MediaRef, container: InputContainer, stream: VideoStream) -> Generator[VideoFrame, None, None]:
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise DataError(
                f"the video {pictures.name_of(ref)} has a damaged frame", remedy="Replace it, or take the row out."
            )
        yield frame


def _announced(stream: VideoStream) -> int | None:
    """Frames by the header; None when it does not say."""
    if not stream.frames:
        return None
    entries = stream.index_entries
    if len(entries) != stream.frames:
        return int(stream.frames)
    return sum(1 for entry in entries if not entry.is_discard)  # an mp4's edit list hides frames


def _is_shown(packet: Packet, stream: VideoStream) -> bool:
    """Whether a frame comes out of this packet; VP8 has packets that are only looked back at (RFC 6386, 9.1)."""
    if not packet.size or packet.is_discard:
        return False
    return stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _upright(frame: VideoFrame, ref: MediaRef, options: MediaOptions) -> tuple[Size, PIL.Image.Transpose | None]:
    """The size of a frame as it is looked at, and the turn that brings it there; phones film lying down."""
    angle = 0 if options.exif == "ignore" else int(frame.rotation) % 360
    if angle not in (0, *_TURNS):
        raise DataError(
            f"the video {pictures.name_of(ref)} is rotated by {angle} degrees",
            expected="a multiple of 90",
            remedy="Save it upright, or set data.exif: ignore.",
        )
    size = (frame.height, frame.width) if angle in (90, 270) else (frame.width, frame.height)
    return size, _TURNS.get(angle)


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UsageError(
            "a row holds a video, and PyAV, which reads videos, is not installed", remedy=INSTALL
        ) from None
    return av
