"""Where a row's path may lead."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vlmtune.data.rows.paths import MediaRoot, RenamedRoot, Root
from vlmtune.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("images/a.png", "images/sub/b b.png", "other/c.png", "secret.png"):
        (tmp_path / name).write_bytes(b"x")
    return MediaRoot(str(tmp_path / "images"), why="`root` of the source", allow=(str(tmp_path / "other"),))


def reason(root: Root, name: str) -> str:
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
    assert root.locate("sub").path == f"{root.base}/sub/", "frames may lie in a folder; its path ends with a slash"
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


def test_absolute_path_outside_says_what_the_file_is_called_here(root: MediaRoot) -> None:
    text = reason(root, "/data/luoyx/929_data/sub/b b.png")
    assert "`allow: [/data/luoyx/929_data/sub]`" in text
    assert f"`replace_prefix: {{/data/luoyx/929_data/: {root.base}/}}`" in text, "sub/b b.png lies under the root"
    assert "`replace_prefix: {/data/x/: images/}`" in reason(root, "/data/x/y.png")


def test_further_folders_for_relative_paths(root: MediaRoot, tmp_path: Path) -> None:
    both = MediaRoot(root.base, why="", more=(str(tmp_path / "other"),))
    assert both.locate("c.png").path == str(tmp_path / "other/c.png")
    assert both.locate("a.png").path == f"{root.base}/a.png"
    assert f"start from {root.base} and {tmp_path}/other" in reason(both, "d.png")


def test_replace_prefix(root: MediaRoot, tmp_path: Path) -> None:
    renamed = RenamedRoot(
        root,
        {
            "/data/old/": root.base,
            "/data/old/deep": str(tmp_path / "other") + "/",
            "D:\\pictures": "",
            "https://a.b/c/": "sub/",
            "old": "sub",
        },
    )
    there = {
        "/data/old/a.png": "images/a.png",
        "/data/old//a.png": "images/a.png",
        "/data/old/deep/c.png": "other/c.png",
        "file:///data/old/sub/b%20b.png": "images/sub/b b.png",
        "D:\\pictures\\sub\\b b.png": "images/sub/b b.png",
        "D:/pictures/a.png": "images/a.png",
        "https://a.b/c/b b.png": "images/sub/b b.png",
        "old/b b.png": "images/sub/b b.png",
        "a.png": "images/a.png",
    }
    for name, path in there.items():
        assert renamed.locate(name).path == str(tmp_path / path), name
    assert renamed.locate("data:,x").inline == b"x"
    assert "[the row says /data/old/z.png, changed by `replace_prefix`]" in reason(renamed, "/data/old/z.png")
    assert "lies outside" in reason(renamed, "/data/older/a.png"), "a prefix ends where a part of the path ends"
    assert "holds `..`" in reason(renamed, "/data/old/../secret.png")
    assert "holds `..`" in reason(renamed, "D:\\pictures\\..\\..\\secret.png")


def test_windows_paths_ask_for_a_prefix(root: MediaRoot) -> None:
    text = reason(root, "C:\\data\\imgs\\1.jpg")
    assert "is one of a Windows machine" in text and "`replace_prefix: {'C:\\data\\imgs\\': images/}`" in text
    assert "written with / and not with \\." in reason(root, "imgs\\1.jpg")


def test_strange_names_are_refused_and_never_a_traceback(root: MediaRoot) -> None:
    names = [
        "\ud800.png",
        "x" * 5000,
        "a/" * 3000,
        "\0",
        "",
        " ",
        ".",
        "/",
        "//",
        "~",
        "a.png/",
        "C:\\",
        "file:",
        "file://x",
    ]
    names += [
        "file:///%00",
        "file:///%zz",
        "data:",
        "data:,",
        "data:;base64,é",
        "data:image/png;base64,=",
        "http://",
        "..\\x",
    ]
    for name in names:
        for place in (root, RenamedRoot(root, {"/": root.base, "C:\\": "", "x": "sub"})):
            try:
                assert place.locate(name).path.endswith("/"), name
            except DataError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500, name
