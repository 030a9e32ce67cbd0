"""Slices of files as one stream, against the joined bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import pictures
from vlmtune.data.media.pieces import Pieces
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

OPTIONS = MediaOptions()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), reads=st.lists(st.integers(0, 30), max_size=6))
def test_reads_at_any_place_equal_the_joined_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], reads: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    pieces, joined = [], b""
    for i, length in enumerate(lengths):
        content = bytes(range(i * 20, i * 20 + length))
        (folder / str(i)).write_bytes(b"???" + content + b"!!")
        pieces.append((str(folder / str(i)), 3, length))
        joined += content
    with io.BufferedReader(Pieces(pieces), 4) as stream:
        assert stream.read() == joined
        for place in reads:
            stream.seek(place)
            assert stream.read(5) == joined[place : place + 5]
        assert stream.seek(0, io.SEEK_END) == len(joined)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_cut_at_every_byte_is_the_same_picture(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    content = buffer.getvalue()
    (tmp_path / "whole").write_bytes(content)
    expected = np.asarray(pictures.open_image(MediaRef(path=str(tmp_path / "whole")), OPTIONS))
    first, second = tmp_path / "aa", tmp_path / "ab"
    for cut in range(1, len(content), 1 if kind == "PNG" else 9):
        first.write_bytes(b"head" + content[:cut])
        second.write_bytes(content[cut:] + b"tail")
        ref = MediaRef(path=str(first), offset=4, length=cut, more=((str(second), 0, len(content) - cut),))
        assert pictures.size(ref, OPTIONS) == (4, 3)
        assert np.array_equal(np.asarray(pictures.open_image(ref, OPTIONS)), expected)
        assert pictures.read_bytes(ref) == content


def test_a_part_that_went_missing_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "aa").write_bytes(b"1234")
    ref = MediaRef(path=str(tmp_path / "aa"), length=4, more=((str(tmp_path / "ab"), 0, 4),))
    with pytest.raises(DataError, match=r"/ab cannot be opened \(No such file"):
        pictures.read_bytes(ref)
