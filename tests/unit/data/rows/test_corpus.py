"""Rows by byte offset, against `json.loads` of the whole file."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.schema import SourceConfig
from vlmtune.data.rows import index, json_rows
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.rows.index import index_file
from vlmtune.errors import DataError

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def open_one(path: Path, content: bytes | str, **more: object) -> Corpus:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_corpus([SourceConfig(path=str(path), **more)], allow=())


def row_of(corpus: Corpus, i: int) -> object:
    which, local = corpus.split(i)
    return corpus.sources[which].rows.read(local, corpus.origin(i))


def rows_of(corpus: Corpus) -> list[object]:
    return [row_of(corpus, i) for i in range(len(corpus))]


def reason(path: Path, content: bytes | str, row: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        row_of(open_one(path, content), row)
    return str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=6), children, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(json_values, min_size=1, max_size=12),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    block=st.integers(4, 60),
    bom=st.booleans(),
)
def test_json_list_equals_json_loads_for_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list, indent: int | None, ascii_only: bool, block: int, bom: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:  # lone surrogates stand in JSON only as escapes
        text = json.dumps(rows, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BLOCK", block)
        corpus = open_one(path, (b"\xef\xbb\xbf" if bom else b"") + b" \n" + text + b"\n ")
    assert rows_of(corpus) == rows
    assert [corpus.origin(i) for i in range(len(rows))] == [f"list.json:{i + 1}" for i in range(len(rows))]


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(
        st.one_of(st.fixed_dictionaries({"v": json_values}), st.sampled_from(["", "  ", "\t"])), min_size=1, max_size=12
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    block=st.integers(4, 60),
    bom=st.booleans(),
)
def test_jsonl_equals_splitting_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list, newline: str, last: bool, block: int, bom: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    texts = [line if isinstance(line, str) and not line.strip(" \t") else json.dumps(line) for line in lines]
    expected = [(number, json.loads(text)) for number, text in enumerate(texts, 1) if text.strip()]
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BLOCK", block)
        corpus = open_one(path, (b"\xef\xbb\xbf" if bom else b"") + (newline.join(texts) + newline * last).encode())
    assert rows_of(corpus) == [row for _, row in expected]
    assert [corpus.origin(i) for i in range(len(corpus))] == [f"lines.jsonl:{number}" for number, _ in expected]


def test_utf8_text_is_kept(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": '你好 \u2028 \\ " é'}]}
    assert row_of(open_one(tmp_path / "数 据.jsonl", json.dumps(row, ensure_ascii=False)), 0) == row


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_other_encodings_name_line_and_byte(tmp_path: Path, ending: str) -> None:
    good = '{"a": "b"}'
    raw = f"[{good},\n".encode() if ending == "json" else f"{good}\n".encode()
    raw += '{"a": "你好"}'.encode("gb18030") + (b"]" if ending == "json" else b"\n")
    path = tmp_path / f"a.{ending}"
    assert row_of(open_one(path, raw), 0) == {"a": "b"}
    byte = 9 if ending == "json" else 8  # the newline behind the comma belongs to the row
    assert reason(path, raw, 1).startswith(f"a.{ending}:2: byte {byte} of the row is 0xC4, which is not UTF-8")
    for encoding, mark in (("utf-16", "UTF-16"), ("utf-16-be", "")):
        text = f"[{good}]".encode(encoding) if mark else b"\xfe\xff" + good.encode(encoding)
        assert "the mark of UTF-16; expected UTF-8" in reason(path, text)


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ("{'id': 1}", "JSON wants double quotes"),
        ('{"id": ["x" "y"]}', "A comma is missing before the » sign"),
        ('{"id": "1" "image": "a"}', '{"id": "1" »"image": "a"}'),
        ('{"id": 1} {"id": 2}', "One row ends before the » sign"),
        ('{"id": 1,}', "broken JSON at character"),
        ("", "the row is empty. There is a comma too many"),
        ('{"v": "say "hi" now"}', "a quote inside the text"),
    ],
)
def test_broken_element_of_a_list_names_its_row_and_shows_the_spot(tmp_path: Path, element: str, said: str) -> None:
    path = tmp_path / "coco.json"
    rows = ['{"id": 0}'] * 123 + [element, '{"id": 1}']
    corpus = open_one(path, "[" + ",\n".join(rows) + "]")
    assert len(corpus) == 125 and row_of(corpus, 124) == {"id": 1}
    with pytest.raises(DataError) as caught:
        row_of(corpus, 123)
    assert str(caught.value).startswith("coco.json:124: ") and said in str(caught.value)


def test_half_of_a_character_is_refused(tmp_path: Path) -> None:
    r"""JSON can say \\ud83d alone, which no tokenizer and no file system takes."""
    rows = [r'{"v": "a \ud83d\uDE00 b"}', r'{"v": "a \\ud83d"}', r'{"v": ["a \uD83D b"]}']
    corpus = open_one(tmp_path / "a.jsonl", "\n".join(rows))
    assert row_of(corpus, 0) == {"v": "a \U0001f600 b"} and row_of(corpus, 1) == {"v": r"a \ud83d"}
    with pytest.raises(DataError, match=r"^a\.jsonl:3: the escape \\ud83d is half of a character"):
        row_of(corpus, 2)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"image": "a.png", "image": "b.png", "x": 1}'
    said = "the key 'image' stands twice in one object; expected every key once."
    assert reason(tmp_path / "a.jsonl", twice).startswith(f"a.jsonl:1: {said}")
    assert reason(tmp_path / "b.json", f'[{{"turns": [{twice}]}}]').startswith(f"b.json:1: {said}")


def test_the_example_of_xcomposers_page_is_not_json(tmp_path: Path) -> None:
    text = """[ { "id": "0",
      "image": ['path/to/image_0.jpg', 'path/to/image_1.jpg']
      "conversations": [ { "from": "user", "value": "x" } ] } ]"""
    said = reason(tmp_path / "vl_data.json", text)
    assert said.startswith("vl_data.json:1: broken JSON") and "»'path/to/image_0.jpg'" in said
    said = reason(tmp_path / "vl_data.json", text.replace("'", '"'))
    assert '"path/to/image_1.jpg"] »"conversations"' in said and "A comma is missing" in said


def test_unbalanced_quote_names_the_row_at_opening(tmp_path: Path) -> None:
    rows = ['{"v": "a"}', '{"v": "b}', '{"v": "c"}']
    with pytest.raises(DataError, match=r"^a\.json:2: broken JSON.*the file ends before the list is closed"):
        open_one(tmp_path / "a.json", "[" + ",".join(rows) + "]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"id": 1}, {"id": 2', "a.json:2: broken JSON"),
        ('[{"id": 1}', "a.json: the file ends before the list is closed"),
        ('[{"id": 1}] [2]', "after the list's closing bracket the file goes on with '[2]'"),
        ('{"id": 1}\n{"id": 2}', 'the file begins with \'{"id": 1}'),
        ('{"id": 1}', "name the file .jsonl"),
        ("", "the file is empty"),
        ("  \n", "the file is empty"),
        ("[ \n ]", "the file holds no rows"),
    ],
)
def test_files_that_are_no_list(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        open_one(tmp_path / "a.json", text)
    assert said in str(caught.value) and str(caught.value).startswith("a.json:")


def test_jsonl_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    corpus = open_one(path, '{"id": 1}\n\n  \r\n{"id": 2\n[1]\n')
    assert [corpus.origin(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    with pytest.raises(DataError, match=r"^a\.jsonl:4: broken JSON at character 9.*The row breaks off"):
        row_of(corpus, 1)
    with pytest.raises(DataError, match=r"^a\.jsonl:5: the row is a list; expected an object"):
        corpus.sample(2)
    with pytest.raises(DataError, match=r"begins with a list.*name it \.json\.$"):
        open_one(path, ' [\n{"id": 1},\n{"id": 2}\n]')
    with pytest.raises(DataError, match="holds no rows"):
        open_one(path, "\n \n")


def test_missing_files_and_other_endings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl: the source .*x\.jsonl cannot be read \(No such file"):
        open_corpus([SourceConfig(path=str(tmp_path / "x.jsonl"))])
    with pytest.raises(DataError, match=r"x\.csv ends in \.csv; expected a \.jsonl, \.json, \.parquet or \.tar file"):
        open_corpus([SourceConfig(path=str(tmp_path / "x.csv"))])
    with pytest.raises(DataError, match=r"media root .* is not a folder"):
        open_one(tmp_path / "a.jsonl", "{}", root=str(tmp_path / "nowhere"))


def test_several_sources(tmp_path: Path) -> None:
    sources = []
    for folder, num in (("train", 3), ("val", 2)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "a.jsonl"
        path.write_text("".join(json.dumps({"id": f"{folder}{i}", "conversations": TURNS}) + "\n" for i in range(num)))
        sources.append(SourceConfig(path=str(path), repeat=num / 2))
    (tmp_path / "b.json").write_text(json.dumps([{"id": "b", "conversations": TURNS}]))
    corpus = open_corpus([*sources, SourceConfig(path=str(tmp_path / "b.json"))])
    assert len(corpus) == 6 and corpus.source_sizes == [3, 2, 1]
    assert [source.options.repeat for source in corpus.sources] == [1.5, 1.0, None]
    assert [corpus.source_of(i) for i in range(6)] == [0, 0, 0, 1, 1, 2]
    assert corpus.origin(1) == "train/a.jsonl:2" and corpus.origin(3) == "val/a.jsonl:1"
    assert corpus.origin(5) == "b.json:1"
    assert [corpus.sample(i).id for i in (0, 4, 5)] == ["train0", "val1", "b"]
    with pytest.raises(IndexError):
        row_of(corpus, 6)


def test_pickled_corpus_opens_its_own_files_and_digest_follows_the_bytes(tmp_path: Path) -> None:
    corpus = open_one(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2}\n')
    assert row_of(corpus, 1) == {"id": 2}
    copy = pickle.loads(pickle.dumps(corpus))
    assert row_of(copy, 1) == {"id": 2} and copy.digest() == corpus.digest()
    (tmp_path / "moved").mkdir()
    assert open_one(tmp_path / "moved" / "b.jsonl", '{"id": 1}\n{"id": 2}\n').digest() == corpus.digest()
    assert open_one(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 3}\n').digest() != corpus.digest()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    corpus = open_one(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2}\n')
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="became shorter"):
        row_of(corpus, 1)


def test_a_large_list_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    rng = random.Random(0)
    with path.open("w") as out:
        out.write("[")
        for i in range(30_000):
            out.write(("," if i else "") + json.dumps({"id": i, "v": 'x\\"[{' * rng.randrange(200)}))
        out.write("]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BLOCK", 1 << 18)
        found = index_file(str(path), "big.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.starts) == 30_000 and peak < 8_000_000
    assert np.all(found.starts[1:] == found.starts[:-1] + found.lengths[:-1] + 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b'{"a": 1}', mtime=0), "the file is gzip data"),
        (pickle.dumps([{"a": 1}]), "the file is a Python pickle, which is never opened"),
        (b"PK\x03\x04rest", "the file is a zip archive"),
    ],
)
def test_other_files_under_the_name_of_json(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"^a\.jsonl: {said}; expected JSON text\."):
        open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])


def test_a_row_beyond_the_limit_is_refused_and_its_neighbours_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    corpus = open_one(tmp_path / "a.jsonl", '{"id": 1}\n' + json.dumps({"text": "x" * 200}) + '\n{"id": 3}\n')
    with pytest.raises(DataError, match=r"^a\.jsonl:2: the row has 212 bytes; expected at most 100\."):
        row_of(corpus, 1)
    assert row_of(corpus, 2) == {"id": 3}
