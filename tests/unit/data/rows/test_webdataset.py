"""WebDataset shards as rows, against the rules of names written out by hand."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import cut, picture_bytes, special, write_tar
from vlmtune.config.schema import SourceConfig
from vlmtune.data.media import pictures
from vlmtune.data.rows.archives import Members, archives_of
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.rows.webdataset import WebDatasetRows, key_and_ending
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

TURNS = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
ROW = {"id": "1", "conversations": TURNS}


def rows_of(*paths: Path, memory: Path | None = None) -> WebDatasetRows:
    return WebDatasetRows(Members(archives_of([str(path) for path in paths]), memory), memory)


def one(tmp_path: Path, **members: object) -> dict:
    """The row that members `17.<ending>` give; two underscores in a name stand for a dot."""
    content = [
        (f"17.{ending.replace('__', '.')}", json.dumps(value) if isinstance(value, dict | list) else value)
        for ending, value in members.items()
    ]
    rows = rows_of(write_tar(tmp_path / "s.tar", content))  # type: ignore[arg-type]
    assert len(rows) == 1
    row = rows.read(0, "s.tar:17")
    assert isinstance(row, dict)
    return row


def content_of(value: object) -> object:
    """Pictures by their bytes, all else as it is."""
    if isinstance(value, MediaRef):
        return pictures.read_bytes(value)
    if isinstance(value, list):
        return [content_of(item) for item in value]
    return {key: content_of(item) for key, item in value.items()} if isinstance(value, dict) else value


def reason(rows: WebDatasetRows, i: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        rows.read(i, "s.tar:here")
    assert caught.value.where == "s.tar:here"
    return caught.value.reason


def test_a_json_and_its_picture(tmp_path: Path) -> None:
    assert content_of(one(tmp_path, jpg=b"J", json=ROW)) == {**ROW, "image": b"J"}


def test_several_pictures_keep_the_order_of_the_archive(tmp_path: Path) -> None:
    row = one(tmp_path, **{"1__jpg": b"second"}, json=ROW, **{"0__png": b"first"})
    assert content_of(row) == {**ROW, "images": [b"second", b"first"]}


@pytest.mark.parametrize("named", [["0.png", "1.jpg"], ["17.0.png", "d/17.1.jpg"], ["./17.0.png", "17.1.jpg"]])
def test_pictures_that_the_json_names_come_in_its_order(tmp_path: Path, named: list[str]) -> None:
    row = one(tmp_path, **{"1__jpg": b"second"}, json={**ROW, "image": named}, **{"0__png": b"first"})
    assert content_of(row) == {**ROW, "images": [b"first", b"second"]}


@pytest.mark.parametrize("named", ["17.jpg", "17", "jpg", "coco/train2017/000000000017.jpg"])
def test_a_single_picture_is_meant_whatever_it_was_called(tmp_path: Path, named: str) -> None:
    assert content_of(one(tmp_path, jpg=b"J", json={**ROW, "image": named})) == {**ROW, "image": b"J"}


def test_a_name_that_is_no_member_is_refused(tmp_path: Path) -> None:
    row = {**ROW, "images": ["0.png", "2.png"]}
    rows = rows_of(write_tar(tmp_path / "s.tar", [("1.json", json.dumps(row)), ("1.0.png", b"0"), ("1.1.png", b"1")]))
    assert "`image` names 2.png, which is no member of the row" in reason(rows)


def test_parts_of_messages_name_their_pictures(tmp_path: Path) -> None:
    def turns(picture: object, other: object) -> dict:
        parts = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "image", "image": other},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
            {"type": "text", "text": "q"},
        ]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}

    row = one(tmp_path, a__png=b"A", b__png=b"B", json=turns("17.b.png", "a.png"))
    assert content_of(row) == turns(b"B", b"A")


def test_parts_that_only_mark_places_take_the_row_s_pictures(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
    ]
    assert content_of(one(tmp_path, png=b"P", json={"messages": messages})) == {"messages": messages, "image": b"P"}


def test_captions(tmp_path: Path) -> None:
    assert content_of(one(tmp_path, png=b"P", txt="A cat. ü")) == {"caption": "A cat. ü", "image": b"P"}
    both = one(tmp_path, png=b"P", txt="A cat.", json={"url": "http://x", "key": "17"})  # img2dataset
    assert content_of(both) == {"url": "http://x", "key": "17", "caption": "A cat.", "image": b"P"}
    known = one(tmp_path, png=b"P", txt="A cat.", json=ROW)
    assert content_of(known) == {**ROW, "image": b"P", "txt": "(6 bytes that are not read)"}


def test_videos_and_unknown_members(tmp_path: Path) -> None:
    row = one(tmp_path, mp4=b"V", json=ROW, cls="3", npy=b"\x93NUMPY", seg__pkl=b"\x80")
    unread = {"cls": "(1 bytes that are not read)", "npy": "(6 bytes that are not read)"}
    assert content_of(row) == {**ROW, "video": b"V", **unread, "seg.pkl": "(1 bytes that are not read)"}


def test_a_row_of_text_alone(tmp_path: Path) -> None:
    assert one(tmp_path, json=ROW) == ROW


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    def said(*members: tuple[str, object]) -> str:
        return reason(rows_of(write_tar(tmp_path / "s.tar", members)))  # type: ignore[arg-type]

    assert "the row has no text (its members: .jpg, .cls)" in said(("1.jpg", b"1"), ("1.cls", b"2"))
    assert "broken JSON" in said(("1.json", b"{"), ("1.jpg", b"1"))
    assert "which is not UTF-8" in said(("1.json", b'{"a": "\xff"}'))
    assert "byte 3 of the caption 1.txt is not UTF-8" in said(("1.txt", b"ab\xff"), ("1.jpg", b"1"))
    assert "the row has two members .jpg" in said(("1.json", "{}"), ("1.jpg", b"1"), ("1.jpg", b"2"))
    assert "is a symbolic link" in said(("1.json", "{}"), ("1.jpg", special(tarfile.SYMTYPE, "/etc/passwd")))
    assert "is a hard link" in said(("1.json", special(tarfile.LNKTYPE, "x")))
    assert "leads out of the archive" in said(("../1.json", "{}"))
    assert "leads out of the archive" in said(("/1.json", "{}"))


def test_the_rule_of_names() -> None:
    assert key_and_ending("a.b/c.d.JPG") == ("a.b/c", "d.jpg")
    assert key_and_ending("c") == ("c", "")


def test_rows_are_grouped_within_an_archive_in_order_of_appearance(tmp_path: Path) -> None:
    first = write_tar(
        tmp_path / "1.tar",
        [
            ("./d/b.jpg", b"b"),
            ("d/a.jpg", b"a"),
            ("d/a.json", json.dumps(ROW)),
            ("d/b.json", json.dumps(ROW)),
            ("d/._b.jpg", b"apple"),
        ],
    )
    second = write_tar(tmp_path / "2.tar", [("d/b.txt", "caption"), ("d/b.jpg", b"other")])
    rows = rows_of(first, second)
    assert [rows.place(i) for i in range(len(rows))] == [(0, "d/b.json"), (0, "d/a.json"), (1, "d/b.txt")]
    assert content_of(rows.read(0, "")) == {**ROW, "image": b"b"}
    assert content_of(rows.read(2, "")) == {"caption": "caption", "image": b"other"}
    for file, label, found in [
        (0, "d/a.json", 1),
        (0, "d/a.jpg", 1),
        (0, "d/b", 0),
        (1, "d/b", 2),
        (1, "d/b.txt", 2),
        (1, "d/a.json", None),
        (0, "d/._b.jpg", None),
        (0, "x", None),
    ]:
        assert rows.find(file, label) == found, label


@settings(max_examples=30, deadline=None)
@given(
    rows=st.dictionaries(
        st.from_regex(r"[a-z0-9ü]{1,8}", fullmatch=True), st.text(max_size=20), min_size=1, max_size=6
    ),
    places=st.lists(st.integers(0, 12_000), min_size=1, max_size=5).map(sorted),
)
def test_shards_cut_anywhere_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, str], places: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    members = [
        member for key, text in rows.items() for member in ((f"{key}.png", picture_bytes()), (f"{key}.txt", text))
    ]
    whole = rows_of(write_tar(folder / "s.tar", members))
    expected = [content_of(whole.read(i, "")) for i in range(len(whole))]
    assert expected == [{"caption": text, "image": picture_bytes()} for text in rows.values()]
    size = (folder / "s.tar").stat().st_size
    cut(folder / "s.tar", [min(place, size) for place in places], [f"s.tar.{i}" for i in range(len(places) + 1)])
    parts = rows_of(folder / "s.tar.*")
    assert [content_of(parts.read(i, "")) for i in range(len(parts))] == expected
    for i in range(len(parts)):
        assert parts.find(*parts.place(i)) == i


def test_the_digest_says_what_rows_say_and_not_in_which_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    members = [("1.json", json.dumps(ROW)), ("1.jpg", b"123")]
    first = rows_of(write_tar(tmp_path / "s.tar", members)).digest
    assert rows_of(write_tar(tmp_path / "elsewhere" / "t.tar", members)).digest == first
    assert rows_of(write_tar(tmp_path / "s.tar", members[::-1])).digest != first
    assert rows_of(write_tar(tmp_path / "s.tar", [members[0], ("1.jpg", b"1234")])).digest != first
    assert (
        rows_of(write_tar(tmp_path / "s.tar", [("1.json", json.dumps({**ROW, "id": "2"})), members[1]])).digest != first
    )


def test_rows_travel_to_other_processes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{i}.json", json.dumps({**ROW, "id": str(i)})) for i in range(50)])
    for memory in (None, tmp_path / "memory"):
        rows = rows_of(path, memory=memory)
        again = pickle.loads(pickle.dumps(rows))
        assert [again.read(i, "") for i in range(50)] == [rows.read(i, "") for i in range(50)]
        assert memory is None or len(pickle.dumps(rows)) < 1000
        assert (again.digest, again.files, again.place(7)) == (rows.digest, rows.files, rows.place(7))


def test_shards_as_a_source(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(
            tmp_path / f"s-{shard:03}.tar",
            [
                (f"{shard}0.png", picture_bytes(shard)),
                (f"{shard}0.json", json.dumps(ROW)),
                (f"{shard}1.png", picture_bytes(9)),
                (f"{shard}1.txt", "A cat."),
            ],
        )
    source = SourceConfig(path=str(tmp_path / "s-{000..001}.tar"), prompt="Describe it.")
    corpus = open_corpus([source], memory=tmp_path / "memory")
    places = ["s-000.tar:00.json", "s-000.tar:01.txt", "s-001.tar:10.json", "s-001.tar:11.txt"]
    assert [corpus.origin(i) for i in range(len(corpus))] == places
    assert [corpus.find(place) for place in places] == [0, 1, 2, 3]
    assert pictures.read_bytes(corpus.sample(2).images[0].ref) == picture_bytes(1)
    caption = corpus.sample(3)
    assert (caption.messages[0].text.strip(), caption.messages[1].text) == ("Describe it.", "A cat.")
    assert pictures.read_bytes(caption.images[0].ref) == picture_bytes(9)


_names = st.sampled_from(["17.0.png", "0.png", "png", "17", "x.png", "", "data:image/png;base64,QUJD", "../x", "/x"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | _names,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["url", "image", "image_url", "type", "content", "role", "text"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
_parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "image_url", "text", "video"])},
    optional={
        "image": _values,
        "image_url": _values,
        "url": _values,
        "text": _values,
    },
)
_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.lists(_parts | _values)})
)


@settings(max_examples=60, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(["image", "images", "video", "conversations", "messages"]), _values)
    | st.fixed_dictionaries({"messages": _turns | _values}, optional={"images": _values}),
    pictures=st.integers(0, 2),
)
def test_any_json_gives_a_sample_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, row: object, pictures: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    write_tar(path, [("17.json", json.dumps(row)), *((f"17.{i}.png", picture_bytes(i)) for i in range(pictures))])
    corpus = open_corpus([SourceConfig(path=str(path))])
    try:
        corpus.sample(0)
    except DataError as error:
        assert error.where == "any.tar:17.json"
