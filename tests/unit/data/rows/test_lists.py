"""Lists of other tools: what they expand to, their counts beside the official ones, and every way to be wrong."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from vlmtune.config.schema import AnySource, HubSource, ImageOptions, SourceConfig, XTunerLists
from vlmtune.data.counts import exact_count
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.rows.lists import Listed, expand
from vlmtune.errors import DataError

OFFICIAL = json.loads((Path(__file__).parents[3] / "fixtures" / "official_mixing.json").read_text())
ROW = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
PICTURED = {
    "image": "img/a.png",
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl", "sub dir/c d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((json.dumps(ROW) + "\n") * 10)
    return tmp_path


def write(folder: Path, name: str, content: object) -> SourceConfig:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else _text(content).encode())
    return SourceConfig(path=str(path))


def _text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def files(source: AnySource) -> list[SourceConfig]:
    found = [listed.source for listed in expand([source])]
    assert all(isinstance(one, SourceConfig) for one in found)
    return found  # type: ignore[return-value]


def reason(source: AnySource) -> str:
    with pytest.raises(DataError) as caught:
        open_corpus([source])
    return str(caught.value)


def in_epoch(listed: SourceConfig, num_rows: int) -> int:
    """Rows of an epoch: `choose`, or `repeat` exactly."""
    return listed.choose if listed.choose is not None else exact_count(listed.repeat or 1, num_rows)


# XTuner


def test_xtuners_lists_become_one_source_each() -> None:
    lists = XTunerLists(
        data_paths=("/d/a.json", "/d/b.jsonl", "/d/c.json"),
        image_folders=("/d/a", None, "/d/c"),
        repeat_times=(2, 0.5, 3.5),
        image=ImageOptions(max_tiles=4),
        replace_prefix={"/x/": "/y"},
    )
    found = files(lists)
    assert [(one.path, one.root, one.repeat) for one in found] == [
        ("/d/a.json", "/d/a", 2),
        ("/d/b.jsonl", None, 0.5),
        ("/d/c.json", "/d/c", 3.5),
    ]
    assert all(one.image == lists.image and one.replace_prefix == {"/x/": "/y"} for one in found)
    assert [in_epoch(one, 1000) for one in found] == [2000, 500, 3500]
    bare = files(XTunerLists(data_paths=("/d/a.json", "/d/b.jsonl")))
    assert [(one.root, one.repeat) for one in bare] == [(None, 1), (None, 1)]


def test_hub_sources_and_single_files_stay_what_they_are(folder: Path) -> None:
    sources: list[AnySource] = [HubSource(hub="a/b"), SourceConfig(path=str(folder / "a.jsonl"), weight=2)]
    assert expand(sources) == [Listed(sources[0]), Listed(sources[1])]  # type: ignore[arg-type]


def test_fractional_repeats_of_xtuner_are_exact_where_the_official_ones_are_cut() -> None:
    verdicts = Counter(
        _verdict(num_rows, repeat, official, is_float=True, cuts_above_one=True)
        for num_rows, repeat, official in OFFICIAL["xtuner: rows, repeat_times, count"]
    )
    print("XTuner:", dict(verdicts))
    assert verdicts["equal"] and verdicts["exact, official cuts"] and set(verdicts) <= VERDICTS


# InternVL


def test_an_internvl_meta_file(folder: Path) -> None:
    meta = {
        "ui": {
            "root": "sub dir",
            "annotation": "a.jsonl",
            "data_augment": True,
            "repeat_time": 0.5,
            "length": 10,
            "max_dynamic_patch": 6,
        },
        "text": {"annotation": "sub dir/c d.jsonl"},
        "far": {"root": "/imgs/", "annotation": str(folder / "b.jsonl"), "data_augment": False, "repeat_time": 3},
    }
    source = write(folder, "meta.json", meta).model_copy(
        update={"repeat": 2.0, "image": ImageOptions(min_tiles=2, max_tiles=3), "data_augment": True}
    )
    ui, text, far = files(source)
    assert ui == SourceConfig(
        path=f"{folder}/a.jsonl",
        root=f"{folder}/sub dir",
        repeat=1.0,
        image=ImageOptions(min_tiles=2, max_tiles=6),
        data_augment=True,
    )
    assert (text.path, text.root, text.repeat, text.image) == (f"{folder}/sub dir/c d.jsonl", None, 2.0, source.image)
    assert (far.root, far.repeat, far.data_augment) == ("/imgs", 6.0, False)
    corpus = open_corpus([write(folder, "meta.json", {"ui": meta["ui"], "text": meta["text"]})])
    assert corpus.source_sizes == [10, 10] and corpus.origin(10) == "c d.jsonl:1"


def test_paths_of_a_list_start_from_the_nearest_folder_that_has_them_all(folder: Path) -> None:
    (folder / "shell" / "data").mkdir(parents=True)
    meta = {"x": {"root": "sub dir", "annotation": "sub dir/c d.jsonl"}, "y": {"annotation": "a.jsonl"}}
    source = write(folder, "shell/data/meta.json", meta)
    assert [one.path for one in files(source)] == [f"{folder}/sub dir/c d.jsonl", f"{folder}/a.jsonl"]
    assert files(source)[0].root == f"{folder}/sub dir"
    (folder / "shell/data/a.jsonl").write_text("{}")
    assert files(source)[1].path == f"{folder}/a.jsonl", "one folder for the whole list"
    (folder / "shell" / "sub dir").mkdir()
    for name in ("a.jsonl", "sub dir/c d.jsonl"):
        (folder / "shell" / name).write_text("{}")
    rooted = source.model_copy(update={"root": str(folder / "shell")})
    assert [one.path for one in files(rooted)] == [f"{folder}/shell/sub dir/c d.jsonl", f"{folder}/shell/a.jsonl"]
    assert [one.root for one in files(rooted)] == [f"{folder}/shell/sub dir", f"{folder}/shell"]
    meta["gone"] = {"annotation": "gone.jsonl"}
    said = reason(write(folder, "shell/data/meta.json", meta).model_copy(update={"root": str(folder)}))
    assert said.startswith(f"meta.json: gone: there is no file gone.jsonl under {folder};")
    assert f"in {folder} (`root` of the source), {folder}/shell/data and the folders above" in said


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([], "meta.json: x: the entry is no object"),
        ({"root": "r", "repeat_time": 1}, "x: `annotation` is null; expected the path of a .jsonl"),
        ({"annotation": "/a\0.jsonl"}, "x: the path holds a zero byte"),
        ({"annotation": ""}, "x: `annotation` is empty"),
        ({"annotation": 3}, "x: `annotation` is 3"),
        ({"annotation": "a.jsonl", "repeat_time": "2"}, 'x: `repeat_time` is "2"; expected a number'),
        ({"annotation": "a.jsonl", "repeat_time": True}, "x: `repeat_time` is true"),
        ({"annotation": "a.jsonl", "repeat_time": 0}, "x: `repeat_time` is 0; expected more than 0. Take the entry"),
        ({"annotation": "a.jsonl", "repeat_time": -1.5}, "x: `repeat_time` is -1.5"),
        ({"annotation": "a.jsonl", "repeat_time": float("nan")}, "x: `repeat_time` is nan"),
        ({"annotation": "a.jsonl", "repeat_time": float("inf")}, "x: `repeat_time` is inf"),
        ({"annotation": "a.jsonl", "repeat_time": 1e300}, "x: `repeat_time`: every row would come 1e+300 times; exp"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 0}, "x: `max_dynamic_patch` is 0"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 10**9}, "x: `max_dynamic_patch` is 1000000000; expected"),
        ({"annotation": "/mnt/x/a.jsonl"}, "x: there is no file /mnt/x/a.jsonl. If it is another machine's path"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 1.5}, "x: `max_dynamic_patch` is 1.5; expected a whole number"),
        ({"annotation": "a.jsonl", "data_augment": "no"}, 'x: `data_augment` is "no"; expected true or false'),
        ({"annotation": "a.jsonl", "length": 12}, "x: the list says `length` 12, but a.jsonl has 10 rows"),
        ({"annotation": "a.jsonl", "repeat": 2}, "the entry has the unknown key `repeat`; did you mean repeat_time?"),
        ({"annotation": "a.jsonl", "sampler": 2}, "the entry has the unknown key `sampler`; expected root, "),
        ({"annotation": "a.jsonl", "root": "gone"}, "gone is not a folder"),
        ({"annotation": "a.txt", "repeat_time": 1}, "there is no file a.txt"),
    ],
)  # fmt: skip
def test_wrong_entries(folder: Path, entry: object, said: str) -> None:
    good = {"annotation": "b.jsonl", "repeat_time": 1}
    text = reason(write(folder, "meta.json", json.dumps({"good": good, "x": entry})))
    assert said in text and "\n" not in text


def test_a_meta_file_that_is_broken_json(folder: Path) -> None:
    assert reason(write(folder, "m.json", '{"x": {"annotation": "a.jsonl" "root": "r"}}')).startswith(
        "m.json: broken JSON at character 32"
    )
    assert "the key 'x' stands twice" in reason(
        write(folder, "m.json", '{"x": {"annotation": "a.jsonl"}, "x": {"annotation": "b.jsonl"}}')
    )
    for other in ('{"id": 1, "conversations": []}', '{"annotation": 3}\n{"annotation": 4}', "{}", '{"a": {"b": 1}}'):
        assert "the file begins with" in reason(write(folder, "m.json", other)), other


def test_entries_whose_names_are_long_and_alike_are_all_read(folder: Path) -> None:
    meta = {"x" * 200 + str(i): {"annotation": "a.jsonl"} for i in range(3)}
    assert len(files(write(folder, "meta.json", meta))) == 3


def test_mixing_beside_a_list(folder: Path) -> None:
    meta = {"x": {"annotation": "a.jsonl", "repeat_time": 0.5}}
    for key in ("choose", "weight"):
        said = reason(write(folder, "meta.json", meta).model_copy(update={key: 3}))
        assert said.startswith("meta.json: the source is a list of files") and f"`{key}` as well" in said
    source = write(folder, "data.txt", "a.jsonl 0.01\n").model_copy(update={"repeat": 0.5})
    assert files(source)[0].choose == 5 and files(source)[0].repeat is None


VERDICTS = {"equal", "exact, official cuts", "exact, official stops", "refused, official takes none", "refused by both"}


def _verdict(
    num_rows: int, repeat: float, official: int | None, *, is_float: bool, cuts_above_one: bool, meta: bool = False
) -> str:
    """Our count beside the official one, by a rule over the case; fails where no rule explains a difference."""
    if repeat <= 0:
        return "refused by both" if official is None else "refused, official takes none"
    ours = exact_count(repeat, num_rows)
    exact = Fraction(str(repeat)) * num_rows
    assert abs(ours - exact) <= Fraction(1, 2)
    if ours == official:
        return "equal"
    if official is None:
        assert meta and is_float and repeat > 1, "InternVL's trainer knows whole repeats above 1 only"
        return "exact, official stops"
    cut = num_rows * int(repeat) if repeat > 1 else int(num_rows * repeat)
    assert official == cut < ours and (repeat < 1 or cuts_above_one)
    return "exact, official cuts"


def test_counts_of_internvl_over_the_official_table(folder: Path) -> None:
    verdicts: Counter[str] = Counter()
    for num_rows, repeat, is_float, official in OFFICIAL["internvl: rows, repeat_time, is a float, count"]:
        verdict = _verdict(num_rows, repeat, official, is_float=is_float, cuts_above_one=False, meta=True)
        verdicts[verdict] += 1
        source = write(folder, "meta.json", {"x": {"annotation": "a.jsonl", "repeat_time": repeat}})
        if verdict.startswith("refused"):
            assert "`repeat_time` is" in reason(source)
        else:
            assert in_epoch(files(source)[0], num_rows) == exact_count(repeat, num_rows)
    print("InternVL:", dict(verdicts))
    assert verdicts["equal"] > 60 and set(verdicts) <= VERDICTS


def test_mutated_lists_are_read_or_refused_and_never_a_traceback(folder: Path) -> None:
    rng = random.Random(3)
    entry = {"root": ".", "annotation": "a.jsonl", "repeat_time": 0.5, "length": 10, "data_augment": False}
    good = {
        "meta.json": json.dumps({"x": entry, "y": {"annotation": "b.jsonl"}}),
        "data.txt": "a.jsonl 1\nb.jsonl 0.5\n",
    }
    inserted = [
        b"\xff",
        b"\x00",
        b"9" * 5000,
        b"[" * 20_000,
        b'"',
        b"{",
        b"null",
        b"\n",
        b" ",
        b"..",
        b"/",
        b"-",
        b"e99",
    ]
    refused = 0
    for i in range(800):
        name = sorted(good)[i % 2]
        raw = bytearray(good[name].encode())
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.choice([0, 0, 1, 9])] = rng.choice([b"", *inserted])
        try:
            expand([write(folder, name, bytes(raw)).model_copy(update={"given_num": i % 3 > 0})])
            open_corpus([SourceConfig(path=str(folder / name))])
        except DataError as error:
            assert "\n" not in str(error) and error.where
            refused += 1
    assert refused > 300


# XComposer


def test_a_data_txt_with_counts_and_with_ratios(folder: Path) -> None:
    text = "\ufeffa.jsonl 0.01\r\n\n  # a note\nsub dir/c d.jsonl\t 1.001  \r\nb.jsonl   .5\n"
    source = write(folder, "data.txt", text)
    found = files(source)
    assert [one.path for one in found] == [f"{folder}/a.jsonl", f"{folder}/sub dir/c d.jsonl", f"{folder}/b.jsonl"]
    assert [(one.choose, one.repeat) for one in found] == [(10, None), (1001, None), (500, None)]
    ratios = files(source.model_copy(update={"given_num": False}))
    assert [(one.choose, one.repeat) for one in ratios] == [(None, 0.01), (None, 1.001), (None, 0.5)]
    plain = files(write(folder, "data.txt", "a.jsonl\nsub dir/c d.jsonl"))
    assert [(one.choose, one.repeat) for one in plain] == [(None, None)] * 2
    twice = files(write(folder, "data.txt", "a.jsonl 0.01\na.jsonl 0.02"))
    assert [one.choose for one in twice] == [10, 20]


def test_a_line_may_name_a_pattern(folder: Path) -> None:
    (folder / "list").mkdir()
    source = write(folder, "list/data.txt", "sub dir/*.jsonl 1\n[a].jsonl 1\n")
    assert [one.path for one in files(source)] == [f"{folder}/sub dir/*.jsonl", f"{folder}/[a].jsonl"]
    assert open_corpus([source]).source_sizes == [10, 10]
    assert "there is no file x*.jsonl under" in reason(write(folder, "list/data.txt", "x*.jsonl 1\n"))


def test_media_of_a_data_txt_start_from_the_file_or_from_the_list(folder: Path) -> None:
    (folder / "img").mkdir()
    (folder / "img" / "a.png").touch()
    (folder / "sub dir" / "c d.jsonl").write_text(json.dumps(PICTURED) + "\n")
    source = write(folder, "data.txt", "sub dir/c d.jsonl 1\n")
    assert open_corpus([source]).sample(0).images[0].ref.path == f"{folder}/img/a.png"
    (folder / "sub dir" / "img").mkdir()
    (folder / "sub dir" / "img" / "a.png").touch()
    assert open_corpus([source]).sample(0).images[0].ref.path == f"{folder}/sub dir/img/a.png"
    rooted = source.model_copy(update={"root": str(folder)})
    assert open_corpus([rooted]).sample(0).images[0].ref.path == f"{folder}/img/a.png"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.jsonl 10\nb.jsonl\n", "data.txt:2: the line has no number, but others have"),
        ("a.jsonl\n\nb.jsonl 1\n", "data.txt:1: the line has no number, but others have"),
        ("a.jsonl 0\n", "data.txt:1: the number is 0; expected more than 0. Take the line out."),
        ("a.jsonl -1\n", "data.txt:1: the number is -1"),
        ("a.jsonl 0.0004\n", "data.txt:1: 0.0004 thousand is less than half a row"),
        ("a.jsonl 1e300\n", "data.txt:1: 1e300 thousand rows are too many; expected at most 2,000,000,000 rows"),
        ("a.jsonl 10k\n", "data.txt:1: '10k' is not a number; expected <path> <number>"),
        ("a.jsonl 1,5\n", "data.txt:1: '1,5' is not a number"),
        ("a.jsonl 10 20\n", "data.txt:1: there is no file a.jsonl 10 under"),
        ("10\n", "data.txt:1: the line holds the number 10 only; expected <path>"),
        ("\n# nothing\n", "data.txt: the list is empty"),
        ("gone.json 3\n", "data.txt:1: there is no file gone.json under"),
        ("a.txt 3\n", "data.txt:1: there is no file a.txt"),
        (b"a.jsonl 1\n\xb1\xed.json 1\n", "data.txt:2: byte 0xB1 is not UTF-8"),
        ("data.txt 3\n", "data.txt ends in .txt; expected"),
    ],
)
def test_wrong_lines(folder: Path, text: str | bytes, said: str) -> None:
    found = reason(write(folder, "data.txt", text))
    assert said in found and "\n" not in found


def test_a_list_that_is_missing_or_no_list(folder: Path) -> None:
    assert "gone.txt: the list " in reason(SourceConfig(path=str(folder / "gone.txt")))
    assert "more than 16,777,216 bytes" in reason(write(folder, "big.txt", "x" * (16 << 20) + "y"))


def test_counts_of_xcomposer_over_the_official_table(folder: Path) -> None:
    verdicts: Counter[str] = Counter()
    for num_rows, number, given_num, official in OFFICIAL["xcomposer: rows, number, given_num, count"]:
        line = "a.jsonl" if number is None else f"a.jsonl {number}"
        source = write(folder, "data.txt", line).model_copy(update={"given_num": given_num})
        if number == "0":
            assert official is None and "the number is 0" in reason(source)
            verdicts["refused by both"] += 1
            continue
        ours = in_epoch(files(source)[0], num_rows)
        exact = Fraction(number or "1") * (1000 if given_num and number else num_rows)
        assert ours == math.floor(exact + Fraction(1, 2))
        if ours == official:
            verdicts["equal"] += 1
        elif official is None:
            none_left = not given_num and int(float(number or 1) * num_rows) == 0
            assert none_left or number is None, "the official code stops on no rows, and on counts without a number"
            verdicts["refused by both" if ours == 0 else "exact, official stops"] += 1
        else:
            thousands = given_num and int(float(number) * 1000) == official
            assert official < ours and (thousands or int(float(number) * num_rows) == official)
            verdicts["exact, official cuts"] += 1
    print("XComposer:", dict(verdicts))
    assert verdicts["equal"] > 100 and set(verdicts) <= VERDICTS


def test_the_official_lists_with_several_lines(folder: Path) -> None:
    for name in ("a_5", "b_8", "m_6", "n_3"):
        (folder / f"{name}.json").write_text(json.dumps([ROW] * int(name[2:])))
    for case in OFFICIAL["xcomposer lists"]:
        source = write(folder, "data.txt", "\n".join(case["lines"])).model_copy(update={"given_num": case["given_num"]})
        ours = [in_epoch(one, int(Path(one.path).stem[2:])) for one in files(source)]
        lines = [line.split() for line in case["lines"] if line]
        sizes = [1000 if case["given_num"] else int(Path(path).stem[2:]) for path, _ in lines]
        exact = [Fraction(number) * size for (_, number), size in zip(lines, sizes, strict=True)]
        assert ours == [math.floor(count + Fraction(1, 2)) for count in exact]
        # A path that stands twice is taken once there, and as often as it stands here.
        if case["given_num"] and case["counts"] is not None and len({path for path, _ in lines}) == len(lines):
            assert ours == case["counts"]


def test_paths_of_another_machine_in_lists(folder: Path) -> None:
    (folder / "img").mkdir()
    meta = {"x": {"root": "/mnt/old/img/", "annotation": "/mnt/old/a.jsonl", "repeat_time": 2}}
    source = write(folder, "meta.json", meta).model_copy(update={"replace_prefix": {"/mnt/old/": str(folder)}})
    (entry,) = files(source)
    assert (entry.path, entry.root, entry.repeat) == (str(folder / "a.jsonl"), str(folder / "img"), 2)
    listed = write(folder, "data.txt", "/mnt/old/a.jsonl 0.01\n")
    assert "data.txt:1: there is no file /mnt/old/a.jsonl" in reason(listed)
    (line,) = files(listed.model_copy(update={"replace_prefix": {"/mnt/old": ""}}))
    assert (line.path, line.choose) == (str(folder / "a.jsonl"), 10)


@pytest.mark.parametrize("name", ["a.jsonl.txt", "meta.json", "rows.jsonl", "x.tar", "x.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is no regular file, but a pipe or a device" in reason(SourceConfig(path=str(tmp_path / name)))
