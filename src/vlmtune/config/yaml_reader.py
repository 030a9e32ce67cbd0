"""YAML with places: plain values, and for every key the line it stands on.

Scalars follow YAML 1.2's core schema. PyYAML alone follows 1.1, where ``1e-5`` is a string, ``no`` is false, ``010``
is eight and ``2026-11-01`` a date: each of these has cost somebody a run.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlmtune.errors import ConfigError

# A file of this size is no configuration: either the wrong file, or aliases that multiply.
MAX_NODES = 100_000

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Python refuses to read integers of thousands of digits; such a thing is a string, which its field will refuse.
_INT = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands, and the places of what is inside it (keys of a mapping, indices of a list)."""

    label: str
    """`run.yaml:19`, or `command line` for an override."""
    inside: dict[str | int, Place] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader that only resolves the tags of plain strings itself; see `_scalar`."""


_Loader.yaml_implicit_resolvers = {}


class ResolvedDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which this reader *or* a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: ResolvedDumper, text: str) -> yaml.ScalarNode:
    # PyYAML takes these three for line breaks and loses them, unless they are escaped.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _prepare_dumper() -> None:
    ResolvedDumper.add_representer(str, _represent_text)
    for tag, pattern in (("int", _INT), ("float", _FLOAT)):
        ResolvedDumper.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern.pattern})\Z"), list("-+.0123456789")
        )


_prepare_dumper()


def read_file(path: Path) -> tuple[dict[str, Any], Place]:
    """The mapping in a YAML file and its places; an empty file is an empty mapping.

    Raises:
        ConfigError: not a file, not UTF-8, not YAML, not a mapping, a key twice, a tag such as ``!env``.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy=_yaml_files_near(path)) from None
    except IsADirectoryError:
        raise ConfigError(
            "is a folder; expected a YAML file", where=str(path), remedy=_yaml_files_near(path / "x")
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path)) from error
    values, place = read_text(_decode(raw, path), str(path))
    if values is None:
        return {}, Place(str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"holds {kind_of(values)} at the top",
            where=str(path),
            expected="the sections model, tuning, data, train",
            remedy="`vlmtune init` lists examples to start from.",
        )
    # What is missing at the top has no line.
    return values, Place(str(path), place.inside)


def read_text(text: str, name: str, *, numbered: bool = True) -> tuple[Any, Place]:
    """The value of a YAML text and its places; `name` stands in messages, with line numbers if `numbered`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name, numbered) from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}" if numbered else ""
        raise ConfigError(f"the character {error.character:#06x} cannot stand in YAML", where=name + line) from error
    if node is None:
        return None, Place(f"{name}:1" if numbered else name)
    return _Builder(name, numbered).build(node)


class _Builder:
    """Turns composed nodes into values and places, refusing what PyYAML would let pass."""

    def __init__(self, name: str, numbered: bool) -> None:
        self._name = name
        self._numbered = numbered
        self._num_nodes = 0
        self._open: list[yaml.Node] = []  # the nodes around the current one

    def build(self, node: yaml.Node, key_node: yaml.Node | None = None) -> tuple[Any, Place]:
        # A value is found by the line of its key: that is where the eye looks for it.
        label = self._label(key_node or node)
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise ConfigError(f"holds more than {MAX_NODES} values", where=self._name, remedy="Is this the right file?")
        if any(node is outer for outer in self._open):
            raise ConfigError("an alias that contains itself", where=label)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, label)
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, "seq", label)
                pairs = [self.build(child) for child in node.value]
                return [value for value, _ in pairs], Place(label, dict(enumerate(place for _, place in pairs)))
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, label), Place(label)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, label: str) -> tuple[dict[str, Any], Place]:
        self._check_tag(node, "map", label)
        values: dict[str, Any] = {}
        places: dict[str | int, Place] = {}
        for key_node, value_node in node.value:
            key_label = self._label(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("a key that is not a word", where=key_label)
            key = key_node.value
            if key == "<<" and key_node.style is None:
                raise ConfigError("merge keys (<<) are not read", where=key_label, remedy="Write the keys out.")
            if key in values:
                raise ConfigError(f"the key {key} stands twice (first at {places[key].label})", where=key_label)
            values[key], places[key] = self.build(value_node, key_node)
        return values, Place(label, places)

    def _scalar(self, node: yaml.ScalarNode, label: str) -> Any:
        text = node.value
        if node.style is not None:  # quoted, or a block of text
            return text
        self._check_tag(node, "str", label)
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        return float(text) if _FLOAT.fullmatch(text) else text

    def _check_tag(self, node: yaml.Node, kind: str, label: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"the YAML tag {tag} is not read", where=label, remedy="Write the plain value.")

    def _label(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}" if self._numbered else self._name


def kind_of(value: Any) -> str:
    """A value's kind in the reader's words: `a list`, `the text 'abc'`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    return f"the number {value}"


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"byte {raw[error.start]:#04x} is not UTF-8",
            where=f"{path}:{line}",
            remedy="Save the file as UTF-8 (`iconv -f GBK -t UTF-8` if it is in GBK).",
        ) from error


def _syntax_error(error: yaml.MarkedYAMLError, name: str, numbered: bool) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or error.context or "cannot be read").removeprefix("but ").replace("\n", " ")
    remedy = ""
    if "'\\t'" in problem:
        problem, remedy = "a tab stands where YAML wants spaces", "Indent with spaces."
    elif "mapping values are not allowed" in problem:
        remedy = "Is a space missing or too many before a key, or does a text with a colon need quotes?"
    elif "expected ',' or" in problem or "did not find expected" in problem:
        remedy = "Is a bracket, a brace or a quote left open?"
    where = f"{name}:{mark.line + 1}" if mark and numbered else name
    return ConfigError(f"is not YAML: {problem}", where=where, remedy=remedy)


def _yaml_files_near(path: Path) -> str:
    """A sentence that names the YAML files of the folder, those with the nearest names first."""
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, names, n=3) or names[:3]
    if not near:
        return "`vlmtune init NAME` writes an example."
    return f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
