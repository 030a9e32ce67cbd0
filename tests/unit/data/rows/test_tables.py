"""Parquet and saved datasets as rows, against what was written."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.tars import picture_bytes
from vlmtune.config.schema import MediaOptions, SourceConfig
from vlmtune.data.media import pictures
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.rows.tables import TableRows
from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

MESSAGES = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets` in the test's folder, and no network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "cache"


def conversation(i: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nq{i}"}, {"from": "gpt", "value": f"a{i}"}]


def table(numbers: range, *, typed: bool = True) -> datasets.Dataset:
    """LLaVA-like rows whose picture is in the row; `typed`: the cell says that it is a picture."""
    picture: Any = datasets.Image() if typed else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    pictures = [{"bytes": picture_bytes(i), "path": f"{i}.png"} for i in numbers]
    texts = [{"id": str(i), "conversations": conversation(i)} for i in numbers]
    rows = [text | {"image": picture} for text, picture in zip(texts, pictures, strict=True)]
    features = datasets.Features({"id": datasets.Value("string"), "image": picture, "conversations": [turn]})
    return datasets.Dataset.from_list(rows, features=features)


def write_parquet(path: Path, numbers: range, *, typed: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table(numbers, typed=typed).to_parquet(path)
    return path


def opened(path: Path | str, **more: Any) -> Corpus:
    memory = more.pop("memory", None)
    return open_corpus([SourceConfig(path=str(path), **more)], memory=memory)


def check_rows(corpus: Corpus, numbers: range) -> None:
    """The corpus says the rows that `table` made of `numbers`, pictures to the last pixel."""
    assert len(corpus) == len(numbers)
    for i, number in enumerate(numbers):
        sample = corpus.sample(i)
        assert [message.text for message in sample.messages] == [f"\nq{number}", f"a{number}"]
        (picture,) = sample.images
        assert picture.ref.inline == picture_bytes(number)
        expected = pictures.open_image(MediaRef(path="x", inline=picture_bytes(number)), MediaOptions())
        assert np.array_equal(pictures.open_image(picture.ref, MediaOptions()), expected)


@pytest.mark.parametrize("typed", [True, False])
def test_a_parquet_file(tmp_path: Path, typed: bool) -> None:
    corpus = opened(write_parquet(tmp_path / "x.parquet", range(7), typed=typed))
    check_rows(corpus, range(7))
    assert [corpus.origin(i) for i in (0, 6)] == ["x.parquet:1", "x.parquet:7"]
    assert corpus.find("x.parquet:7") == 6
    assert "3.png (" in corpus.sample(3).images[0].ref.path


def test_several_files_number_their_own_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(4))
    write_parquet(tmp_path / "b.parquet", range(4, 6), typed=False)  # files need not agree in their types
    corpus = opened(tmp_path / "*.parquet")
    check_rows(corpus, range(6))
    places = ["a.parquet:1", "a.parquet:2", "a.parquet:3", "a.parquet:4", "b.parquet:1", "b.parquet:2"]
    assert [corpus.origin(i) for i in range(6)] == places
    assert corpus.find("b.parquet:2") == 5
    rows = corpus.sources[0].rows
    assert [rows.find(0, "5"), rows.find(1, "3"), rows.find(1, "0"), rows.find(0, "x")] == [None] * 4
    assert corpus.names == ["*.parquet"]


def test_messages_with_pictures_in_lists_and_in_parts(tmp_path: Path) -> None:
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turns = [{"role": datasets.Value("string"), "content": [part]}]
    features = datasets.Features({"messages": turns, "images": [datasets.Image()]})
    rows = [{"messages": MESSAGES, "images": [{"bytes": picture_bytes(5), "path": None}]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "list.parquet")
    assert opened(tmp_path / "list.parquet").sample(0).images[0].ref.inline == picture_bytes(5)

    part = {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": [part]}]})
    shown = {"type": "image", "image": {"bytes": picture_bytes(6), "path": None}, "text": None}
    asked, said = ({"type": "text", "image": None, "text": text} for text in ("What?", "A"))
    rows = [{"messages": [{"role": "user", "content": [shown, asked]}, {"role": "assistant", "content": [said]}]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "parts.parquet")
    sample = opened(tmp_path / "parts.parquet").sample(0)
    assert sample.images[0].ref.inline == picture_bytes(6)
    assert [message.text for message in sample.messages] == ["What?", "A"]


def test_the_cauldron_and_flat_rows_with_plain_bytes(tmp_path: Path) -> None:
    texts = [{"user": "q", "assistant": "a", "source": "s"}, {"user": "r", "assistant": "b", "source": "s"}]
    datasets.Dataset.from_list([{"images": [picture_bytes(1)], "texts": texts}]).to_parquet(tmp_path / "c.parquet")
    sample = opened(tmp_path / "c.parquet").sample(0)
    assert sample.images[0].ref.inline == picture_bytes(1)
    assert [m.role for m in sample.messages] == ["user", "assistant", "user", "assistant"]
    pyarrow.parquet.write_table(
        pyarrow.table({"photo": [picture_bytes(2)], "q": ["What?"], "label": ["cat"]}), tmp_path / "f.parquet"
    )
    columns = {"image": "photo", "question": "q", "answer": "label"}
    sample = opened(tmp_path / "f.parquet", columns=columns).sample(0)
    assert sample.images[0].ref.inline == picture_bytes(2)
    assert sample.messages[1].text == "cat"


def test_a_cell_without_bytes_is_a_path_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture_bytes(1))
    rows = [
        {"image": {"bytes": None, "path": path}, "conversations": conversation(0)}
        for path in ("1.png", str(tmp_path / "images" / "1.png"), "/etc/passwd", "../images/1.png")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    corpus = opened(tmp_path / "x.parquet", root=str(tmp_path / "images"))
    for i in (0, 1):
        assert corpus.sample(i).images[0].ref == MediaRef(path=str(tmp_path / "images" / "1.png"))
    for i, said in ((2, "lies outside the media root"), (3, "holds `..`")):
        with pytest.raises(DataError, match=rf"^x\.parquet:{i + 1}: .*{said}"):
            corpus.sample(i)


def test_saved_datasets(tmp_path: Path) -> None:
    table(range(5)).save_to_disk(tmp_path / "saved", num_shards=2)
    corpus = opened(tmp_path / "saved")
    check_rows(corpus, range(5))
    assert corpus.origin(4) == "saved:5"
    assert corpus.find("saved:5") == 4
    both = datasets.DatasetDict({"train": table(range(3)), "test": table(range(3, 5))})
    both.save_to_disk(tmp_path / "both")
    check_rows(opened(tmp_path / "both"), range(3))
    check_rows(opened(tmp_path / "both", split="test"), range(3, 5))
    for said, path, split in (("there is no split 'val'", "both", "val"), ("one split only", "saved", "train")):
        with pytest.raises(DataError, match=said):
            opened(tmp_path / path, split=split)


def test_a_folder_of_parquet_files_by_split(tmp_path: Path) -> None:
    for name, numbers in {
        "train-00000-of-00002": range(2),
        "train-00001-of-00002": range(2, 4),
        "test-00000-of-00001": range(4, 5),
    }.items():
        write_parquet(tmp_path / "set" / "data" / f"{name}.parquet", numbers)
    check_rows(opened(tmp_path / "set"), range(4))
    check_rows(opened(tmp_path / "set", split="test"), range(4, 5))
    assert opened(tmp_path / "set").origin(2) == "train-00001-of-00002.parquet:1"
    assert opened(tmp_path / "set").names == ["set"]
    with pytest.raises(DataError, match=r"no split 'validation' \(there are: test, train\)"):
        opened(tmp_path / "set", split="val")
    write_parquet(tmp_path / "set" / "more.parquet", range(1))
    with pytest.raises(DataError, match=r"more\.parquet belongs to no split"):
        opened(tmp_path / "set")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_imagefolder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(picture_bytes(1))
    row = {"file_name": "1.png", "question": "q", "answer": "a, b"}
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    elif kind == "csv":
        (folder / "metadata.csv").write_text('file_name,question,answer\n1.png,q,"a, b"\n')
    else:
        datasets.Dataset.from_list([row]).to_parquet(folder / "metadata.parquet")
    corpus = opened(tmp_path / "set")
    sample = corpus.sample(0)
    assert sample.images[0].ref == MediaRef(path=str(folder / "1.png"))
    assert sample.messages[1].text == "a, b"
    assert corpus.origin(0) == f"metadata.{kind}:1"


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = opened(write_parquet(tmp_path / "x.parquet", range(3))).digest()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "x.parquet", tmp_path / "elsewhere" / "y.parquet")
    assert opened(tmp_path / "elsewhere" / "y.parquet").digest() == first
    assert opened(write_parquet(tmp_path / "x.parquet", range(1, 4))).digest() != first


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    check_rows(opened(write_parquet(tmp_path / "x.parquet", range(3)), memory=memory), range(3))
    check_rows(opened(write_parquet(tmp_path / "x.parquet", range(5, 9)), memory=memory), range(5, 9))


def test_a_remembered_table_opens_nothing_until_a_row_is_read(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, memory = write_parquet(tmp_path / "x.parquet", range(3)), tmp_path / "memory"
    opened(path, memory=memory)
    shutil.rmtree(own_cache)  # the copy is made again when it is needed
    corpus = opened(path, memory=memory)
    assert len(corpus) == 3
    assert not own_cache.exists()
    check_rows(corpus, range(3))


def _texts(corpus: Corpus) -> list[str]:
    return [corpus.sample(i).messages[1].text for i in range(len(corpus))]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_rows_travel_to_other_processes(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", range(4))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    corpus = opened(tmp_path / "x.parquet")
    expected = _texts(corpus)
    assert len(pickle.dumps(corpus)) < 10_000
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.map(_texts, [corpus]) == [expected]


def reason(*arguments: Any, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(*arguments, **more)
    return str(caught.value)


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", range(3))
    content = path.read_bytes()
    for broken in (content[:-100], b"PAR1" + bytes(50), b"no", b"", content[:40] + bytes(200) + content[240:]):
        path.write_bytes(broken)
        assert reason(path).startswith("x.parquet: the table cannot be opened ("), broken[:50]
    assert reason(tmp_path / "none.parquet").startswith("none.parquet: the source ")
    table(range(3)).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "../x.arrow"}]}))
    said = reason(tmp_path / "saved")
    assert "state.json names the file '../x.arrow'; expected Arrow files in the folder itself" in said
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "saved: state.json cannot be read" in reason(tmp_path / "saved")
    datasets.Dataset.from_dict({"a": []}).to_parquet(tmp_path / "empty.parquet")
    assert "empty.parquet: the table holds no rows" in reason(tmp_path / "empty.parquet")


def test_damaged_offsets_of_a_saved_dataset_do_not_end_the_process(tmp_path: Path) -> None:
    table(range(3)).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    content = path.read_bytes()
    offsets = np.array([0, 1, 2, 3], np.int32).tobytes()  # of the three ids "0", "1", "2"
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.array([0, 1, 2**30, 2**31 - 1], np.int32).tobytes()))
    assert "saved: the Arrow files are damaged" in reason(tmp_path / "saved")
    path.write_bytes(content)
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps({**info, "features": {"id": "x"}}))
    assert "saved: the table cannot be opened" in reason(tmp_path / "saved")


@pytest.mark.parametrize("name", ["x.pkl", "x.pt", "x.npy", "x.npz", "x.bin", "x.PTH"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert f"{name}: files of this kind run code when they are opened" in reason(tmp_path / name)


def test_folders_without_rows(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"")
    assert "pictures: the folder holds no file with rows (it holds .png)" in reason(tmp_path / "pictures")
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.jsonl").write_text("{}")
    assert "the folder holds 2 files with rows: a.jsonl, b.jsonl" in reason(tmp_path / "pictures")
    assert "the pattern means 2 files" in reason(tmp_path / "pictures" / "*.jsonl")


def test_without_the_library_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", range(1))
    monkeypatch.setattr("vlmtune.data.rows.tables.importlib.util.find_spec", lambda name: None)
    assert 'pip install "vlmtune[datasets]"' in reason(path)
    with pytest.raises(DataError, match="needs the library `datasets`"):
        TableRows([str(path)])


def test_json_sources_do_not_import_the_library(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}]}) + "\n")
    script = (
        "import sys; from vlmtune.config.schema import SourceConfig; from vlmtune.data.rows.corpus import open_corpus; "
        "open_corpus([SourceConfig(path=sys.argv[1])]).sources[0].rows.read(0, ''); "
        "assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.jsonl")], check=True)
