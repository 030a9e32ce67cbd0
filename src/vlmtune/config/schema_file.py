"""The JSON schema of a run's YAML, for editors: ``python -m vlmtune.config.schema_file > schema/run.schema.json``."""

from __future__ import annotations

import json
import sys
from typing import Any

from vlmtune.config.schema import RunConfig


def json_schema() -> dict[str, Any]:
    """The schema of what `load_config` accepts, its short forms included."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    # A single source stands without a list, a single target, pattern or file without brackets.
    for name in ("sources", "eval"):
        properties = definitions["DataConfig"]["properties"]
        _or(properties, name, *properties[name]["items"]["oneOf"])
    _or(definitions["LoraTuning"]["properties"], "targets", {"type": "string"})
    _or(definitions["HubSource"]["properties"], "data_files", {"type": "string"})
    lists = definitions["XTunerLists"]["properties"]
    for name in ("data_paths", "image_folders"):
        _or(lists, name, {"type": "string", "minLength": 1})
    _or(lists, "repeat_times", lists["repeat_times"]["items"])
    # Without `method` it is full tuning, so a section may not match both.
    definitions["LoraTuning"]["required"] = ["method"]
    # `train:` with everything commented out.
    for name in ("train", "eval"):
        _or(schema["properties"], name, {"type": "null"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vlmtune run"}


def _or(properties: dict[str, Any], name: str, *others: dict[str, Any]) -> None:
    described = {key: properties[name][key] for key in ("description", "default", "title") if key in properties[name]}
    shape = {key: value for key, value in properties[name].items() if key not in described}
    properties[name] = {**described, "anyOf": [shape, *others]}


def render() -> str:
    """The file's text."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
