"""Videos: which frames are chosen, that exactly those are decoded, and every kind of damage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from videos import KINDS, SIZE, number_of, write_video

from vlmtune.config.schema import MediaOptions, VideoOptions
from vlmtune.data.media import containers, pictures, video
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError, UsageError

OPTIONS = MediaOptions(exif="apply")
GOLDEN = json.loads((Path(__file__).parents[3] / "fixtures" / "video_indices.json").read_text())


def options(**chosen: float) -> MediaOptions:
    return MediaOptions(exif="apply", video=VideoOptions(**chosen))


def numbers(path: Path, indices: list[int], **where: object) -> list[int]:
    refs = [MediaRef(path=str(path), frame=i, **where) for i in indices]
    return [number_of(picture) for picture in video.open_pictures(refs, OPTIONS)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case[0]}-{case[1]}")
def test_auroracap_video_indices(case: tuple[int, int, list[int]]) -> None:
    total, num_frames, indices = case
    assert video.frame_indices(total, num_frames) == indices


def test_frames_by_rate() -> None:
    assert video.frame_indices_by_rate(100, 25.0, 1.0) == [0, 25, 50, 75]
    assert video.frame_indices_by_rate(101, 25.0, 1.0) == [0, 25, 50, 75, 100]
    assert video.frame_indices_by_rate(10, 30000 / 1001, 10.0) == [0, 2, 5, 8]
    assert video.frame_indices_by_rate(5, 25.0, 60.0) == [0, 1, 2, 3, 4]
    assert video.frame_indices_by_rate(1, 25.0, 0.01) == [0]


@pytest.mark.parametrize("name", KINDS)
def test_header_and_every_frame(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, **KINDS[name])
    assert video.header(MediaRef(path=str(path)), OPTIONS) == video.Header(SIZE, 40, 25.0)
    assert numbers(path, list(range(40))) == list(range(40))
    assert numbers(path, [0, 7, 8, 31, 39]) == [0, 7, 8, 31, 39]


@pytest.mark.parametrize("name", KINDS)
def test_frames_reached_by_jumps_equal_those_reached_in_order(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"sc_threshold": "0", "flags": "-cgop", "x264opts": "open-gop=1"} if name == "b.mkv" else {}
    path = write_video(tmp_path / name, num_frames=250, **{**KINDS[name], **more})
    indices = [3, 70, 71, 107, 120, 131, 132, 133, 200, 249]
    jumped = [np.asarray(p) for p in video.open_pictures([MediaRef(path=str(path), frame=i) for i in indices], OPTIONS)]
    assert [number_of(PIL.Image.fromarray(p)) for p in jumped] == indices
    monkeypatch.setattr(containers, "_WORTH_A_TABLE", 10_000)
    plain = video.open_pictures([MediaRef(path=str(path), frame=i) for i in indices], OPTIONS)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(jumped, plain, strict=True))


def test_jumps_decode_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", codec="libx264", num_frames=250, g="12", bf="3")
    seen = []
    real = containers._by_jumps

    def counting(*args: object) -> object:
        for frame in real(*args):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(containers, "_by_jumps", counting)
    monkeypatch.setattr(containers, "_decoded", lambda *_: pytest.fail("went through the file in order"))
    assert numbers(path, [0, 100, 249]) == [0, 100, 249]
    assert len(seen) == 3


def test_what_an_edit_list_hides_is_not_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", codec="libx264", first_pts=-6, g="12", bf="0")
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 40
    assert video.header(MediaRef(path=str(path)), OPTIONS).num_frames == 34
    assert numbers(path, [0, 33]) == [6, 39]


def test_packets_that_show_nothing_are_not_counted(tmp_path: Path) -> None:
    """As those that YouTube's VP8 files hold: two pictures of this film are told not to be shown."""
    whole = write_video(tmp_path / "whole.webm", codec="libvpx", num_frames=90, g="200")
    path = tmp_path / "a.webm"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(packet)
                content[0] &= 0xEF if number in (20, 50) else 0xFF
                hidden = av.Packet(bytes(content))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream, hidden.is_keyframe = stream, packet.is_keyframe
                target.mux(hidden)
    assert video.header(MediaRef(path=str(path)), OPTIONS).num_frames == 88
    assert numbers(path, [19, 20, 87]) == [19, 21, 89]


def test_a_fragmented_mp4_is_counted_by_its_packets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", codec="libx264", g="12", container={"movflags": "frag_keyframe+empty_moov"})
    assert video.header(MediaRef(path=str(path)), OPTIONS).num_frames == 40
    assert numbers(path, [39]) == [39]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_phone_video_stands_upright_unless_it_is_told_not_to(tmp_path: Path, rotation: int) -> None:
    ref = MediaRef(path=str(write_video(tmp_path / "a.mp4", codec="libx264", num_frames=6, rotation=rotation)))
    upright = (96, 128) if rotation != 180 else (128, 96)
    assert video.header(ref, OPTIONS).size == upright
    as_stored = MediaOptions(exif="ignore")
    assert video.header(ref, as_stored).size == (128, 96)
    frame = MediaRef(path=ref.path, frame=5)
    (turned,), (stored,) = (list(video.open_pictures([frame], o)) for o in (OPTIONS, as_stored))
    assert turned.size == upright and stored.size == (128, 96)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(stored), rotation // 90))


def test_a_member_of_a_tar_also_when_it_is_cut_in_parts(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", codec="libx264", g="12", bf="3").read_bytes()
    (tmp_path / "x_aa").write_bytes(b"h" * 512 + whole[:3000])
    (tmp_path / "x_ab").write_bytes(whole[3000:] + b"t" * 900)
    more = ((str(tmp_path / "x_ab"), 0, len(whole) - 3000),)
    where = {"offset": 512, "length": 3000, "more": more}
    ref = MediaRef(path=str(tmp_path / "x_aa"), **where)
    film = video.film(ref, options(num_frames=4))
    assert [frame.frame for frame in film.frames] == [0, 13, 26, 39]
    assert {frame.more for frame in film.frames} == {more}
    assert [number_of(p) for p in video.open_pictures(film.frames, OPTIONS)] == [0, 13, 26, 39]
    inline = MediaRef(path="data:video/mp4", inline=whole)
    assert video.header(inline, OPTIONS).num_frames == 40


def test_a_folder_of_frames_in_natural_order(tmp_path: Path) -> None:
    for i in (1, 2, 10, 11, 100):
        PIL.Image.new("RGB", (10 + i, 8), (i, i, i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("x")
    ref = MediaRef(path=str(tmp_path))
    assert video.header(ref, OPTIONS) == video.Header((11, 8), 5, None)
    film = video.film(ref, options(num_frames=3))
    assert film.sizes == ((11, 8), (20, 8), (110, 8)) and film.times is None
    assert [p.getpixel((0, 0))[0] for p in video.open_pictures(film.frames, OPTIONS)] == [1, 10, 100]
    assert video.sizes(film.frames, OPTIONS) == list(film.sizes)
    with pytest.raises(DataError, match="has no frame rate"):
        video.film(ref, options(fps=1.0))
    os.symlink("/etc/hostname", tmp_path / "frame0.png")
    with pytest.raises(DataError, match=r"frame0\.png is a link"):
        video.film(ref, OPTIONS)


def test_pictures_and_frames_in_one_row(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (5, 6), (9, 9, 9)).save(tmp_path / "p.png")
    picture = MediaRef(path=str(tmp_path / "p.png"))
    first = video.film(MediaRef(path=str(write_video(tmp_path / "a.mp4", **KINDS["a.mp4"]))), options(num_frames=2))
    second = video.film(MediaRef(path=str(write_video(tmp_path / "b.mkv", **KINDS["b.mkv"]))), options(fps=5))
    refs = [picture, *first.frames, picture, *second.frames, *first.frames]
    found = list(video.open_pictures(refs, OPTIONS))
    assert video.sizes(refs, OPTIONS) == [p.size for p in found]
    assert found[0].size == found[3].size == (5, 6)
    shown = [number_of(p) for p in found if p.size == SIZE]
    assert shown == [0, 39, *range(0, 40, 5), 0, 39]
    assert first.times == (0.0, 39 / 25) and first.duration == 40 / 25


def refused(path: Path, indices: list[int] | None = None, given: MediaOptions = OPTIONS) -> str:
    with pytest.raises(DataError) as caught:
        if indices is None:
            video.film(MediaRef(path=str(path)), given)
        else:
            list(video.open_pictures([MediaRef(path=str(path), frame=i) for i in indices], given))
    assert not caught.value.where, "the caller knows the row"
    return caught.value.reason


def test_one_video_twice_in_a_row(tmp_path: Path) -> None:
    """As in a row with two `<video>` marks for one file; also of one frame."""
    path = write_video(tmp_path / "a.mkv", codec="ffv1", num_frames=6)
    for numbers in ([0, 2, 5, 0, 2, 5], [0, 0, 0], [4, 4]):
        refs = [MediaRef(path=str(path), frame=i) for i in numbers]
        assert [number_of(picture) for picture in video.open_pictures(refs, OPTIONS)] == numbers


def test_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for content, message in (
        (b"", "a.mp4 is an empty file; expected an mp4"),
        (b"hello, I am text", "a.mp4 is not a video: it begins with b'hello, I am '"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "is not a video"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 40, "a.mp4"),
    ):
        path.write_bytes(content)
        assert message in refused(path)
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(tmp_path / "empty")
    assert "cannot be opened (No such file" in refused(tmp_path / "b.mp4")


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_off(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    more = {"container": {"movflags": "faststart"}} if name[-3:] in ("mp4", "mov") else {}
    path = write_video(tmp_path / name, **KINDS[name], **more)
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.7):
        path.write_bytes(whole[: int(len(whole) * share)])
        reason = refused(path, [39])
        words = ("cannot be decoded", "ends after", "no video", "damaged frame")
        assert name in reason and any(word in reason for word in words)
    assert not capfd.readouterr().err, "FFmpeg's own complaints are not for the user"


def test_bytes_turned_over_are_an_error_or_decode_but_never_a_traceback(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, made in KINDS.items():
        path = write_video(tmp_path / name, num_frames=12, **made)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(15):
            damaged = whole.copy()
            damaged[draw.integers(0, len(whole), 6)] ^= draw.integers(1, 255, 6).astype(np.uint8)
            path.write_bytes(damaged.tobytes())
            try:
                film = video.film(MediaRef(path=str(path)), options(num_frames=3))
                assert all(
                    p.size == s for p, s in zip(video.open_pictures(film.frames, OPTIONS), film.sizes, strict=True)
                )
            except DataError as error:
                assert name in error.reason


def test_bombs_and_too_many_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.webm", **KINDS["c.webm"])
    small = MediaOptions(exif="apply", max_image_pixels=10_000)
    assert "128×96 = 12,288 pixels; expected at most 10,000 (data.max_image_pixels)" in refused(path, None, small)
    assert "128×96" in refused(path, [0], small)
    long = write_video(tmp_path / "b.gif", codec="gif", num_frames=5000)
    assert "5,000 frames of the video b.gif are asked for; expected at most 4,096" in refused(
        long, None, options(num_frames=6000)
    )


def test_a_header_that_announces_billions_of_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", **KINDS["e.avi"])
    raw = bytearray(path.read_bytes())
    at = raw.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert int.from_bytes(raw[at : at + 4], "little") == 40
    raw[at : at + 4] = (3_000_000_000).to_bytes(4, "little")
    path.write_bytes(raw)
    assert "360,000,000 frames of the video a.avi are asked for; expected at most 4,096" in refused(
        path, None, options(fps=3.0)
    )
    film = video.film(MediaRef(path=str(path)), options(num_frames=3))
    assert "ends after 40 frames" in refused(path, [frame.frame for frame in film.frames])


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", **KINDS["a.mp4"])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        opened = video.open_pictures([MediaRef(path=str(path), frame=i) for i in (1, 5, 9)], OPTIONS)
        next(opened)
        opened.close()
        assert len(list(video.open_pictures([MediaRef(path=str(path), frame=i) for i in (1, 39)], OPTIONS))) == 2
        with pytest.raises(DataError):
            list(video.open_pictures([MediaRef(path=str(path), frame=99)], OPTIONS))
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_stays_flat(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=100, **KINDS["a.mp4"])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def rounds(number: int) -> int:
        for _ in range(number):
            film = video.film(MediaRef(path=str(path)), options(num_frames=6))
            list(video.open_pictures(film.frames, OPTIONS))
        return resident()

    after_some = rounds(15)
    assert rounds(40) - after_some < 8 << 20


def test_without_pyav_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", **KINDS["a.mp4"])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r'pip install "vlmtune\[video\]"'):
        video.film(MediaRef(path=str(path)), OPTIONS)


def test_an_animated_gif_of_pillow(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    film = video.film(MediaRef(path=str(tmp_path / "a.gif")), OPTIONS)
    assert [p.getpixel((3, 3)) for p in video.open_pictures(film.frames, OPTIONS)] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 255, 0),
    ]
    assert pictures.size(MediaRef(path=str(tmp_path / "a.gif")), OPTIONS) == film.sizes[0]
