"""Members of tars by offset, against `tarfile` and against the same files unpacked."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import cut, picture_bytes, special, write_tar
from vlmtune.config.schema import MediaOptions, SourceConfig
from vlmtune.data.media import pictures
from vlmtune.data.rows.archives import Archive, Members, TarRoot, archives_of, is_archive
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.rows.patterns import files_of
from vlmtune.data.rows.tar_index import plain_name
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def root_of(*paths: Path | str, memory: Path | None = None) -> TarRoot:
    return TarRoot(Members(archives_of([str(path) for path in paths]), memory))


def reason(call: object, *arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value)


names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1, max_size=12)
paths = (
    st.lists(names, min_size=1, max_size=3)
    .map("/".join)
    .filter(
        lambda name: plain_name(name) == name and "." not in name.split("/")  # no file system holds a file called .
    )
)


@pytest.mark.parametrize("format", FORMATS[1:])
@settings(max_examples=40, deadline=None)
@given(contents=st.dictionaries(paths, st.binary(max_size=1500), min_size=1, max_size=6), long=st.integers(0, 300))
def test_any_names_and_contents_equal_tarfile(
    tmp_path_factory: pytest.TempPathFactory, format: int, contents: dict[str, bytes], long: int
) -> None:
    contents = {"d" * long + name: content for name, content in contents.items()}
    contents = {name: content for name, content in contents.items() if ".." not in name.split("/")}
    if not contents:
        return
    path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", contents.items(), format)
    root = root_of(path)
    with tarfile.open(path) as tar:
        expected = {plain_name(member.name): tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert {root.members.name(i) for i in range(len(root.members))} == set(expected)
    for name, content in expected.items():
        assert pictures.read_bytes(root.locate(name)) == content
        assert pictures.read_bytes(root.locate("./" + name)) == content


@pytest.mark.parametrize("format", FORMATS)
def test_pixels_equal_the_files_unpacked(tmp_path: Path, format: int) -> None:
    contents = {f"images/{i:03}.png": picture_bytes(i, (5 + i, 9)) for i in range(5)}
    path = write_tar(tmp_path / "x.tar", [(f"./{name}", content) for name, content in contents.items()], format)
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    root = root_of(path)
    for name in contents:
        unpacked = pictures.open_image(MediaRef(path=str(tmp_path / "out" / name)), MediaOptions())
        assert np.array_equal(pictures.open_image(root.locate(name), MediaOptions()), unpacked)


@pytest.mark.parametrize("name", ["a.bin", "longer-" + "n" * 120 + ".bin"])
def test_parts_cut_at_every_byte_give_the_same_members(tmp_path: Path, name: str) -> None:
    contents = {name: bytes(range(200)), "empty": b""}
    path = tmp_path / "x.tar"
    whole = write_tar(path, contents.items(), tarfile.GNU_FORMAT).read_bytes()
    end = whole.rindex(b"empty") + 512  # behind it there are only zeros
    start = whole.index(contents[name])
    for place in {*range(start - 5, start + 205), *range(1, end, 97)}:
        path.write_bytes(whole)
        cut(path, [place], ["x.tar.aa", "x.tar.ab"])
        root = root_of(tmp_path / "x.tar.*")
        assert len(root.members) == 2
        for member, content in contents.items():
            assert pictures.read_bytes(root.locate(member)) == content, place


@settings(max_examples=40, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), min_size=1, max_size=30).map(sorted))
def test_many_parts_empty_ones_too(tmp_path_factory: pytest.TempPathFactory, places: list[int]) -> None:
    folder = tmp_path_factory.mktemp("parts")
    content = np.random.default_rng(1).bytes(6000)
    path = write_tar(folder / "x.tar", [("a", content), ("b", b"b" * 700)])
    size = path.stat().st_size
    cut(path, [min(place, size) for place in places], [f"part{i}" for i in range(len(places) + 1)])
    root = root_of(folder / "part*")
    assert pictures.read_bytes(root.locate("a")) == content
    assert pictures.read_bytes(root.locate("b")) == b"b" * 700


@pytest.mark.parametrize(
    ("given_names", "ordered"),
    [
        (["x.tar.ab", "x.tar.aa"], ["x.tar.aa", "x.tar.ab"]),
        (["x.tar.part_ab", "x.tar.part_aa"], ["x.tar.part_aa", "x.tar.part_ab"]),
        (["x.tar.001", "x.tar.000"], ["x.tar.000", "x.tar.001"]),
        ([f"x.tar.part{i}" for i in (10, 2, 1, 9, 3, 4, 5, 6, 7, 8)], [f"x.tar.part{i}" for i in range(1, 11)]),
        (
            [f"part_{a}{b}" for a in "abcdefghijklmnopqrstuvwxy" for b in "abcdefghijklmnopqrstuvwxyz"] + ["part_zaaa"],
            [f"part_{a}{b}" for a in "abcdefghijklmnopqrstuvwxy" for b in "abcdefghijklmnopqrstuvwxyz"] + ["part_zaaa"],
        ),
        ([f"p.tar.{i:02}" for i in range(90)] + ["p.tar.9000", "p.tar.9001"], None),
    ],
)
def test_parts_are_put_in_order(given_names: list[str], ordered: list[str] | None) -> None:
    (archive,) = archives_of(given_names)
    assert list(archive.parts) == (ordered or given_names)


def test_whole_tars_and_parts_side_by_side(tmp_path: Path) -> None:
    for name in ["b.tar", "a.tar", "c.tar.aa", "c.tar.ab"]:
        (tmp_path / name).touch()
    found = archives_of([str(tmp_path / "*.tar"), str(tmp_path / "c.tar.{aa,ab}")])
    assert [archive.name for archive in found] == ["a.tar", "b.tar", "c.tar.aa"]
    assert found[2] == Archive((str(tmp_path / "c.tar.aa"), str(tmp_path / "c.tar.ab")))


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (["part_aa", "part_ac"], "part_*: part_ab, which follows part_aa, is missing"),
        (["part_ab"], "part_*: the first part here is part_ab"),
        (["x.tar.00", "x.tar.02"], "x.tar.*: x.tar.01, which follows x.tar.00, is missing"),
        (["x.tar.gz.aa", "x.tar.gz.ab"], "is compressed"),
        (["x.tgz"], "is compressed"),
        (["x.tar.zst"], "is compressed"),
        (["notes.txt"], "notes.txt: the file is no tar by its name"),
    ],
)
def test_parts_and_names_that_do_not_work(present: list[str], said: str) -> None:
    assert said in reason(archives_of, present)


def test_what_is_an_archive() -> None:
    tars = ["x.tar", "x.TAR", "x.tar.aa", "part_aa", "x.tar.gz", "x.tgz", "a.tar.part-001"]
    others = ["x.jsonl", "part.jsonl", "department", "partial.json", "x.parquet", "images", "tar"]
    assert [is_archive(name) for name in tars + others] == [True] * len(tars) + [False] * len(others)


@pytest.mark.parametrize("keep", [1700, 3000])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"1"), ("b", b"2" * 1500)])
    path.write_bytes(path.read_bytes()[:keep])
    said = reason(root_of, path)
    assert "x.tar: the archive ends in the middle of the member b" in said
    assert "cut short" in said


def test_the_last_part_missing_is_refused_even_at_a_boundary(tmp_path: Path) -> None:
    cut(write_tar(tmp_path / "x.tar", [("a", b"1"), ("b", b"2")]), [700, 1024], ["x.tar.aa", "x.tar.ab", "x.tar.ac"])
    (tmp_path / "x.tar.ac").unlink()
    assert "A part may be missing at the end" in reason(root_of, tmp_path / "x.tar.*")


def test_damage_is_told_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"1"), ("b", b"2")])
    content = bytearray(path.read_bytes())
    content[1024] ^= 1
    path.write_bytes(content)
    assert "holds a damaged header (at byte 1,024)" in reason(root_of, path)
    path.write_bytes(b"no tar at all" * 100)
    assert "this is no tar archive" in reason(root_of, path)
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "compressed with gzip" in reason(root_of, path)
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(2000))
    assert "compressed with zstd" in reason(root_of, path)
    path.write_bytes(bytes(10240))
    assert "holds no files" in reason(root_of, path)


@settings(max_examples=80, deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_damage_is_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    path = write_tar(tmp_path_factory.getbasetemp() / "damaged.tar", [("ü" * 90, b"1" * 700), ("b", b"2")])
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        root = root_of(path)
    except DataError as error:
        assert error.where == "damaged.tar"
        return
    for i in range(len(root.members)):
        assert root.members.length(i) <= len(content)


def test_an_empty_member_may_end_an_archive_without_an_end_mark(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"1"), ("empty", b"")])
    path.write_bytes(path.read_bytes()[: 3 * 512])
    assert pictures.read_bytes(root_of(path).locate("empty")) == b""


def test_joined_archives_are_read_to_their_end(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{n}.tar", [(n, n * 3)]) for n in "ab")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert pictures.read_bytes(root_of(first).locate("b")) == b"bbb"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "is a symbolic link"),
        (tarfile.LNKTYPE, "is a hard link"),
        (tarfile.CHRTYPE, "is a device or pipe"),
        (tarfile.FIFOTYPE, "is a device or pipe"),
    ],
)
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes, said: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("b.png", special(kind, "/etc/passwd"))])
    assert f"the member b.png of x.tar {said}" in reason(root_of(path).locate, "b.png")


def test_sparse_members_are_refused_and_their_neighbours_found(tmp_path: Path) -> None:
    info = tarfile.TarInfo("holes")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes"}
    path = write_tar(tmp_path / "x.tar", [("holes", info), ("b", b"22")])
    root = root_of(path)
    assert "is a sparse file" in reason(root.locate, "holes")
    assert pictures.read_bytes(root.locate("b")) == b"22"


def test_a_name_leads_nowhere_outside(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("../up.png", b"1"), ("/etc/abs.png", b"2"), ("in.png", b"3")])
    root = root_of(path)
    assert "holds `..`" in reason(root.locate, "../up.png")
    assert "is absolute" in reason(root.locate, "/etc/abs.png")
    assert "is a web address" in reason(root.locate, "http://x/y.png")
    assert "a path is empty" in reason(root.locate, "")
    assert pictures.read_bytes(root.locate(str(tmp_path / "in.png"))) == b"3"  # as if unpacked beside the tar
    assert pictures.read_bytes(root.locate("data:image/png;base64,QUJD")) == b"ABC"


def test_an_oversized_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_of(write_tar(tmp_path / "x.tar", [("a", b"1" * 2000)]))
    monkeypatch.setattr("vlmtune.data.rows.archives.MAX_MEMBER_BYTES", 1999)
    assert "the member a of x.tar has 2,000 bytes; expected at most 1,999" in reason(root.locate, "a")


def test_a_missing_member_is_told_with_a_near_name(tmp_path: Path) -> None:
    root = root_of(write_tar(tmp_path / "x.tar", [("top/images/1.png", b"1"), ("top/images/2.png", b"2")]))
    said = reason(root.locate, "images/2.png")
    assert "no member images/2.png in x.tar (2 members, the first is top/images/1.png)" in said
    assert "did you mean top/images/2.png?" in said
    assert "did you mean top/images/2.png?" in reason(root.locate, "elsewhere/2.png")
    assert "did you mean" not in reason(root.locate, "3.png")
    assert "no member TOP/images/1.png" in reason(root.locate, "TOP/images/1.png")


def test_the_same_name_twice_is_ambiguous_when_asked_for(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", [("a", b"1"), ("b", b"1")])
    two = write_tar(tmp_path / "2.tar", [("a", b"2"), ("c", b"2"), ("c", b"3")])
    root = root_of(one, two, one)
    assert pictures.read_bytes(root.locate("b")) == b"1"
    assert "the member a stands in 1.tar and in 2.tar" in reason(root.locate, "a")
    assert "the member c stands in 2.tar, more than once" in reason(root.locate, "c")


def test_the_index_is_remembered_and_learnt_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in "12":
        write_tar(tmp_path / f"{n}.tar", [(f"{n}/{i}", f"{n}-{i}") for i in range(20)])
    memory = tmp_path / "memory"
    root = root_of(tmp_path / "*.tar", memory=memory)
    again = pickle.loads(pickle.dumps(root))
    for n, i in [("1", 0), ("1", 19), ("2", 0), ("2", 7)]:
        assert pictures.read_bytes(root.locate(f"{n}/{i}")) == f"{n}-{i}".encode()
        assert again.locate(f"{n}/{i}") == root.locate(f"{n}/{i}")
    assert len(pickle.dumps(root)) < 1000

    read: list[str] = []
    from vlmtune.data.rows import archives

    original = archives.index_tar
    monkeypatch.setattr(archives, "index_tar", lambda parts, name: (read.append(name), original(parts, name))[1])
    assert root_of(tmp_path / "*.tar", memory=memory).locate("2/7") == root.locate("2/7")
    assert read == []
    write_tar(tmp_path / "2.tar", [("new", b"n" * 50_000)])
    changed = root_of(tmp_path / "*.tar", memory=memory)
    assert read == ["2.tar"]
    assert pictures.read_bytes(changed.locate("new")) == b"n" * 50_000
    assert "no member 2/7" in reason(changed.locate, "2/7")


def test_prepared_rows_are_void_when_their_tar_was_packed_anew(tmp_path: Path) -> None:
    rows = str(lines(tmp_path / "rows.jsonl", "1.png"))
    members = [("1.png", picture_bytes(1)), ("2.png", picture_bytes(2))]

    def digest(order: int) -> str:
        write_tar(tmp_path / "x.tar", members[::order])
        source = SourceConfig(path=rows, root=str(tmp_path / "x.tar"), replace_prefix={"/a": "b"})
        return open_corpus([source], memory=tmp_path / "memory").sources[0].media.digest

    first = digest(1)
    assert first
    assert digest(-1) != first
    assert digest(1) == first


def test_without_a_memory_a_pickle_carries_the_index(tmp_path: Path) -> None:
    root = root_of(write_tar(tmp_path / "x.tar", [("a", b"1")]))
    assert pickle.loads(pickle.dumps(root)).locate("a") == root.locate("a")


def test_patterns(tmp_path: Path) -> None:
    for name in ["s-000.tar", "s-001.tar", "s-010.tar", "t.tar"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()

    def names_of(pattern: str) -> list[str]:
        return [Path(path).name for path in files_of(str(tmp_path / pattern))]

    assert names_of("s-{000..001}.tar") == ["s-000.tar", "s-001.tar"]
    assert names_of("{t,s-*}.tar") == ["t.tar", "s-000.tar", "s-001.tar", "s-010.tar"]
    assert names_of("*.tar") == ["s-000.tar", "s-001.tar", "s-010.tar", "t.tar"]
    assert names_of("s-00?.tar") == ["s-000.tar", "s-001.tar"]
    assert names_of("plain.tar") == ["plain.tar"]  # whoever reads it says that it is missing
    assert "there is no file" in reason(names_of, "s-{000..002}.tar")
    assert "no file matches" in reason(names_of, "*.zip")
    assert "no order" in reason(names_of, "s-{3..1}.tar")
    (tmp_path / "odd[1].tar").touch()
    assert names_of("odd[1].tar") == ["odd[1].tar"]


def lines(path: Path, *pictures: str) -> Path:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    path.write_text("".join(json.dumps({"image": name, "conversations": turns}) + "\n" for name in pictures))
    return path


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("remember", [True, False])
def test_a_jsonl_that_names_members_of_a_split_tar(tmp_path: Path, start: str, remember: bool) -> None:
    contents = {f"images/{i}.png": picture_bytes(i) for i in range(6)}
    size = write_tar(tmp_path / "x.tar", contents.items()).stat().st_size
    cut(tmp_path / "x.tar", [size // 3, size // 2], ["part_aa", "part_ab", "part_ac"])
    source = SourceConfig(
        path=str(lines(tmp_path / "rows.jsonl", *(f"/old/home/{i}.png" for i in range(6)), "../x", "gone.png")),
        root=str(tmp_path / "part_*"),
        replace_prefix={"/old/home/": "images/"},
    )
    corpus = open_corpus([source], memory=tmp_path / "memory" if remember else None)
    with multiprocessing.get_context(start).Pool(1) as pool:
        found = pool.map(_picture_of, [(corpus, i) for i in range(6)])
    assert found == [_picture_of((corpus, i)) for i in range(6)] == list(contents.values())
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the path \.\./x holds `\.\.`"):
        corpus.sample(6)
    with pytest.raises(DataError, match=r"^rows\.jsonl:8: there is no member gone\.png in part_aa \(6 members"):
        corpus.sample(7)


def _picture_of(what: tuple[Corpus, int]) -> bytes:
    return pictures.read_bytes(what[0].sample(what[1]).images[0].ref)


def test_roots_that_are_neither_folders_nor_tars(tmp_path: Path) -> None:
    path = str(lines(tmp_path / "rows.jsonl", "1.png"))
    write_tar(tmp_path / "x.tar", [("1.png", b"1")])
    for root, said in [
        ((str(tmp_path), str(tmp_path / "x.tar")), "x.tar is not a folder; expected folders, or tar files"),
        (str(tmp_path / "none.tar"), "none.tar: the archive .*none.tar cannot be read .No such file"),
        (str(tmp_path / "none-*.tar"), "no file matches"),
        (str(tmp_path / "rows.jsonl"), "is not a folder"),
        (str(tmp_path / "x.tar.gz"), "is compressed"),
    ]:
        with pytest.raises(DataError, match=said):
            open_corpus([SourceConfig(path=path, root=root)])
