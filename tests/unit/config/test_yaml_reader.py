"""The YAML reader: 1.2 scalars, places, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.config.yaml_reader import ResolvedDumper, read_file, read_text
from vlmtune.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.0e-5", 2e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("2026-11-01", "2026-11-01"),
        ("1:30", "1:30"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("1e", "1e"),
        ("[language,vision]", ["language", "vision"]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found, _ = read_text(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_places_are_the_lines_of_the_keys() -> None:
    _, place = read_text("a: 1\nb:\n  c:\n    - x\n    -\n      d: 2\n", "run.yaml")
    assert place.inside["b"].label == "run.yaml:2"
    assert place.inside["b"].inside["c"].inside[1].inside["d"].label == "run.yaml:6"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key a stands twice (first at run.yaml:1)"),
        ("a:\n  b: 1\n  b: 1\n", 3, "stands twice"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: !env HOME\n", 1, "!env"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "python/object"),
        ("? [1]\n: 2\n", 1, "not a word"),
        ("a: {b: 1\n", 2, "bracket"),
        ("a: b: c\n", 1, "colon"),
        ("a: &x [*x]\n", 1, "contains itself"),
        ("a: *b\n", 1, "undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("<<: {a: 1}\n", 1, "merge keys"),
        ("a: 1\nb: \x00\n", 2, "0x0000"),
    ],
)
def test_refusals_name_the_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "run.yaml")
    assert caught.value.where == f"run.yaml:{line}"
    assert words in str(caught.value)


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than"):
        read_text("\n".join(lines), "bomb.yaml")


def test_bom_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: \xe5\x9b\xbe\r\n")
    values, place = read_file(path)
    assert values == {"a": 1, "b": "图"}
    assert place.inside["b"].label == f"{path}:2"


def test_gbk_is_refused_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: 1\nb: " + "数据".encode("gbk"))
    with pytest.raises(ConfigError, match=r"run.yaml:2: byte 0x[0-9a-f]{2} is not UTF-8\. .*GBK"):
        read_file(path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"loar\.yaml: no such file\. Did you mean .*lora\.yaml\?"):
        read_file(tmp_path / "loar.yaml")
    with pytest.raises(ConfigError, match="does not exist either"):
        read_file(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_file(tmp_path)


@pytest.mark.parametrize("text", ["- a\n", "hello\n", "3\n"])
def test_the_top_is_a_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="at the top; expected the sections"):
        read_file(path)


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12))
_TRAPS = st.sampled_from(
    ["1e-5", "no", "on", "0o17", "010", "1:30", "2026-11-01", "null", "~", "", ".inf", "1_0", "<<"]
)
_VALUES = st.recursive(
    _SCALARS | _TRAPS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TRAPS, inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    found, _ = read_text(yaml.dump({"v": value}, Dumper=ResolvedDumper, allow_unicode=True), "x")
    assert found == {"v": value}


@given(_TRAPS)
def test_a_yaml_1_1_reader_sees_the_same_text(value: str) -> None:
    assert yaml.safe_load(yaml.dump({"v": value}, Dumper=ResolvedDumper)) == {"v": value}
