"""The JSON schema for editors is up to date, and accepts what `load_config` accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vlmtune.config.load import dump_config, load_config
from vlmtune.config.schema_file import json_schema, render
from vlmtune.config.yaml_reader import read_file

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = sorted((REPOSITORY / "src" / "vlmtune" / "examples").glob("*.yaml"))


def errors(values: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(values)]


def sources(value: Any) -> Any:
    return {"model": {"path": "m"}, "data": {"sources": value}}


def test_the_committed_schema_is_up_to_date() -> None:
    committed = (REPOSITORY / "schema" / "run.schema.json").read_text(encoding="utf-8")
    assert committed == render(), "run: python -m vlmtune.config.schema_file > schema/run.schema.json"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_fit_the_schema(path: Path) -> None:
    config = load_config(path)
    assert not errors(read_file(path)[0])
    assert not errors(yaml.safe_load(dump_config(config)))


def test_examples_open_with_a_title_and_differ() -> None:
    """No variants by copy: at most half of an example's lines stand in another one."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES}
    assert len(texts) >= 4
    for name, text in texts.items():
        title = text.split("\n", 1)[0]
        assert title.startswith("# ") and 20 < len(title) < 120, name
        lines = {line.strip() for line in text.splitlines() if line.strip()}
        for other, text_of_other in texts.items():
            shared = lines & {line.strip() for line in text_of_other.splitlines()}
            assert other == name or len(shared) <= len(lines) / 2, (name, other)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"path": "m"}, "data": {"sources": {"path": "a"}}, "train": None},
        {"model": {"path": "m"}, "data": {"sources": [{"path": "a"}]}, "tuning": {"train": ["projector"]}},
        {
            "model": {"path": "m"},
            "data": {"sources": [{"path": "a"}]},
            "tuning": {"method": "lora", "targets": "vision"},
        },
        sources({"hub": "a/b", "data_files": "x/*", "choose": 3}),
        sources({"data_paths": "a", "image_folders": "b", "repeat_times": 2, "replace_prefix": {"/a/": ""}}),
        sources([{"data_paths": ["a", "b"], "image_folders": ["b", None], "repeat_times": [2, 0.5]}, {"path": "a"}]),
        sources({"path": "a", "root": ["b", "c"], "image": {"max_tiles": 3}, "columns": {"answer": "x"}}),
    ],
)
def test_short_forms_fit_the_schema(values: Any) -> None:
    assert not errors(values)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"path": "m"}},
        {"model": {"path": "m"}, "data": {"sources": [{"path": "a", "x": 1}]}},
        {"model": {"path": "m"}, "data": {"sources": [{"path": "a"}]}, "tuning": {"rank": 3}},
        sources({"path": "a", "hub": "b/c"}),
        sources({"data_paths": ["a"], "repeat": 2}),
        sources({"data_paths": []}),
        sources({"hub": "a/b", "root": "c"}),
        sources({"path": "a", "root": 3}),
    ],
)
def test_mistakes_do_not_fit_the_schema(values: Any) -> None:
    assert errors(values)
