"""Where a row's path may lead."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vlmtune.data.paths import MediaRoot
from vlmtune.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("images/a.png", "images/sub/b b.png", "other/c.png", "secret.png"):
        (tmp_path / name).write_bytes(b"x")
    return MediaRoot(str(tmp_path / "images"), why="`root` of the source", allow=(str(tmp_path / "other"),))


def reason(root: MediaRoot, name: str) -> str:
    with pytest.raises(DataError) as caught:
        root.locate(name)
    return caught.value.reason


def test_what_may_be_read(root: MediaRoot, tmp_path: Path) -> None:
    for name in ("a.png", "./a.png", f"{root.base}/a.png", f"file://{root.base}/a.png"):
        assert Path(root.locate(name).path).samefile(tmp_path / "images/a.png")
    assert root.locate(f"file://localhost{root.base}/sub/b%20b.png").path == f"{root.base}/sub/b b.png"
    assert root.locate(str(tmp_path / "other/c.png")).path == str(tmp_path / "other/c.png")


def test_absolute_path_outside_says_which_line_to_add(root: MediaRoot, tmp_path: Path) -> None:
    text = reason(root, str(tmp_path / "secret.png"))
    assert f"lies outside the media root {root.base}" in text and f"`allow: [{tmp_path}]`" in text
    assert "outside" in reason(root, f"{root.base}-too/a.png"), "a common beginning is not a common folder"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "sub/../a.png", "file:///x/../y.png"])
def test_dots_are_always_refused(root: MediaRoot, name: str) -> None:
    assert "holds `..`" in reason(root, name)
    assert "holds `..`" in reason(root, f"{root.base}/../secret.png")


def test_links_out_are_refused_links_inside_are_not(root: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "images/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images/up").symlink_to(tmp_path)
    (tmp_path / "images/in.png").symlink_to("a.png")
    (tmp_path / "images/gone.png").symlink_to("nothing.png")
    assert "through a link" in reason(root, "out.png")
    assert "through a link" in reason(root, "up/secret.png")
    assert root.locate("in.png").path.endswith("in.png")
    assert "leads nowhere" in reason(root, "gone.png")


def test_root_that_is_itself_a_link(root: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "images")
    assert MediaRoot(str(tmp_path / "alias"), why="").locate("a.png")


def test_missing_file_says_where_relative_paths_start(root: MediaRoot) -> None:
    text = reason(root, "x/y.png")
    assert f"there is no file {root.base}/x/y.png" in text
    assert f"relative paths start from {root.base}, `root` of the source" in text
    assert "there is no file" in reason(root, "a.png/b.png")


def test_what_is_no_file(root: MediaRoot) -> None:
    assert "is a folder" in reason(root, "sub")
    assert "a path is empty" in reason(root, "")
    assert "zero byte" in reason(root, "a\0.png")


@pytest.mark.parametrize("name", ["http://a.b/c.png", "HTTPS://a.b/c.png", "s3://bucket/c.png"])
def test_addresses_are_refused(root: MediaRoot, name: str) -> None:
    assert "is a web address" in reason(root, name)


def test_data_uris(root: MediaRoot) -> None:
    encoded = base64.b64encode(b"\x00\xffpixels").decode()
    assert root.locate(f"data:image/png;base64,{encoded}").inline == b"\x00\xffpixels"
    assert root.locate(f"DATA:image/png;base64,{encoded[:4]}\n{encoded[4:]}").inline == b"\x00\xffpixels"
    assert root.locate("data:,a%20b").inline == b"a b"
    assert "is not valid base64" in reason(root, "data:image/png;base64,@@@")
    assert "has no comma" in reason(root, "data:image/png;base64")
    assert "is empty" in reason(root, "data:image/png;base64,")
    assert len(reason(root, "data:image/png;base64," + "@" * 10_000)) < 300
