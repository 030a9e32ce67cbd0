"""docs/configuration.md, from the schema: ``python -m vlmtune.config.reference > docs/configuration.md``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vlmtune.config.schema import (
    DataConfig,
    EarlyStopping,
    EvalConfig,
    FullTuning,
    HubSource,
    ImageOptions,
    LoraTuning,
    Mixed,
    ModelConfig,
    Read,
    RunConfig,
    Section,
    SourceConfig,
    TrainConfig,
    VideoOptions,
    XTunerLists,
)

_HEAD = """\
# Configuration

One YAML file says what a run is. This page lists every key; it is written by `python -m vlmtune.config.reference` from
`src/vlmtune/config/schema.py`, and a test keeps it up to date. `schema/run.schema.json` tells the same to editors.

- **Required** are `model.path` and `data.sources`. Everything else has a default.
- **Relative paths** start from the folder of the YAML.
- **Overrides** stand behind the file on the command line, for every verb that takes a YAML: `train.epochs=3`,
  `data.packing=false`, `tuning.targets=[language,vision]`, `data.sources.0.repeat=2`. The value is YAML. Quote what the
  shell would read: `'model.image={max_tiles: 6}'`.
- **A mistake** is answered with its place: `run.yaml:5: train.learnig_rate: unknown key; did you mean learning_rate?`
  All mistakes of a file are told at once. Names of other tools are understood in these messages, never accepted.
- **The resolved file** (every key, absolute paths) is written to `run.yaml` in the run folder and in each checkpoint.
"""

# Dotted path of a section -> what it is, and its class, in the order of a file.
_SECTIONS: tuple[tuple[str, str, type[Section]], ...] = (
    ("model", "What is fine-tuned.", ModelConfig),
    ("model.image", "A key that has no effect on the model is refused. See [models.md](models.md).", ImageOptions),
    ("model.video", "One of the two keys; without either, 8 frames, spread evenly.", VideoOptions),
    ("tuning, method: full", "The default. See [training.md](training.md).", FullTuning),
    (
        "tuning, method: lora, dora, rslora or qlora",
        "Adapters through PEFT. See [training.md](training.md).",
        LoraTuning,
    ),
    ("data", "See [data.md](data.md).", DataConfig),
    ("data.sources and data.eval: a file", "The usual entry. See [data.md](data.md).", SourceConfig),
    ("data.sources and data.eval: a dataset of the hub", "`hub` in the place of `path`.", HubSource),
    ("data.sources and data.eval: XTuner's lists", "`data_paths` in the place of `path`.", XTunerLists),
    ("every source: how often its rows come", "Not beside `data_paths`, which has `repeat_times`.", Mixed),
    ("every source: how its rows are read", "For one source, whatever its kind.", Read),
    ("train", "See [training.md](training.md), and [scaling.md](scaling.md) for `strategy`.", TrainConfig),
    ("train.early_stopping", "Needs `data.eval`.", EarlyStopping),
    ("eval", "How `vlmtune eval` generates answers.", EvalConfig),
)

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def render() -> str:
    """The page's text."""
    version = RunConfig.model_fields["version"]
    parts = [_HEAD, "## version\n", *_table([("version", version)])]
    for title, note, section in _SECTIONS:
        inherited = {name for base in section.__bases__ if issubclass(base, Section) for name in base.model_fields}
        own = [(name, field) for name, field in section.model_fields.items() if name not in inherited]
        parts += [f"\n## {title}\n", f"{note}\n", *_table(own)]
    return "\n".join(parts) + "\n"


def _table(fields: Any) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields:
        yield f"| `{name}` | {_kind(field.annotation, field.metadata)} | {_default(field)} | {_meaning(field)} |"


def _kind(kind: Any, limits: Any = ()) -> str:
    """A type in words, with its limits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(arguments[0], (*arguments[1:], *limits))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(one, limits) for one in arguments if one is not NoneType)
    if origin is tuple:
        if Ellipsis not in arguments:
            return f"list of {len(arguments)} {_kind(arguments[0])}s"
        return f"list of {_plural(arguments[0])}"
    if origin is dict:
        if arguments[1] is Any:
            return "group of keys"
        return f"{_kind(arguments[0])}, each with a {_kind(arguments[1])}"
    if _is_group(kind):
        return "group of keys"
    return _PLAIN[kind] + _bounds(limits)


def _plural(kind: Any) -> str:
    members = get_args(get_args(kind)[0]) if get_origin(kind) is Annotated else ()
    if any(_is_group(one) for one in (kind, *members)):
        return "groups of keys, or one group"
    return _kind(kind)


def _is_group(kind: Any) -> bool:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return isinstance(plain, type) and issubclass(plain, Section)


def _bounds(limits: Any) -> str:
    # Inside a union pydantic keeps a Field() whole; elsewhere it is taken apart.
    parts = [part for limit in limits for part in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
    values = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    return ",".join(f" {sign} {values[name]:,}" for name, sign in _LIMITS if name in values)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if value is None:
        return "–"
    if isinstance(value, Section):
        return "as below"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(field: FieldInfo) -> str:
    return (field.description or "See below.").replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
