"""YAML and ``key=value`` overrides -> `RunConfig`, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlmtune.config.explain import locate, rewrite
from vlmtune.config.hub import HUB_ID
from vlmtune.config.schema import (
    FORMAT_VERSION,
    AnySource,
    FullTuning,
    HubSource,
    LoraTuning,
    RunConfig,
    SourceConfig,
    XTunerLists,
)
from vlmtune.config.yaml_reader import Place, ResolvedDumper, kind_of, read_file, read_text
from vlmtune.errors import ConfigError

COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Overrides are ``train.epochs=3``, ``data.packing=false``, ``tuning.targets=[language,vision]`` or
    ``data.sources.0.repeat=2``: the value is YAML, and it stands as if it stood in the file.
    All paths in the result are absolute; relative ones start from the folder of `path`. A hub id stays a hub id.

    Raises:
        ConfigError: every mistake that was found, each with file and line.
    """
    values, place = read_file(path)
    for override in overrides:
        _apply(override, values, place)
    _check_version(values, place)
    _complete(values, place)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise rewrite(error, place) from error
    return _with_absolute_paths(config, path.absolute())


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML with every option spelled out; `load_config` reads it back to the same."""
    values = config.model_dump()  # not mode="json", which turns infinity in train.extra into null
    return yaml.dump(values, Dumper=ResolvedDumper, sort_keys=False, allow_unicode=True, width=120)


def is_hub_id(path: str) -> bool:
    """Whether a loaded `model.path` names a repository on the hub rather than a folder."""
    return not os.path.isabs(path)


def _apply(override: str, values: dict[str, Any], place: Place) -> None:
    """Set one ``key=value`` in the nested values, and remember that it came from the command line."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{override!r} is not an override",
            where=COMMAND_LINE,
            expected="key=value, for example train.epochs=3",
        )
    where = f"{COMMAND_LINE}: {dotted.strip()}"
    value, value_place = read_text(text, where, numbered=False)
    here: Any = values
    spot = place
    for depth, word in enumerate(keys):
        key = _as_key(word, here, ".".join(keys[:depth]), where)
        last = depth == len(keys) - 1
        if last:
            here[key] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
        spot.inside[key] = _relabel(value_place) if last else spot.inside.get(key, Place(COMMAND_LINE))
        spot = spot.inside[key]


def _as_key(word: str, here: Any, outer: str, where: str) -> str | int:
    if isinstance(here, dict):
        if word.isdecimal() and outer != "train.extra":
            raise ConfigError(f"{outer} is not a list; leave the {word} out", where=where)
        return word
    if not isinstance(here, list):
        raise ConfigError(f"{outer} is {kind_of(here)}; it has no keys", where=where)
    if not word.isdecimal() or int(word) >= len(here):
        span = "empty" if not here else f"a list with the entries 0 to {len(here) - 1}"
        raise ConfigError(f"{outer} is {span}; {word} is none of them", where=where)
    return int(word)


def _relabel(place: Place) -> Place:
    """The message has the key already; the label of an override is just where it came from."""
    return Place(COMMAND_LINE, {key: _relabel(inner) for key, inner in place.inside.items()})


def _check_version(values: dict[str, Any], place: Place) -> None:
    version = values.get("version", FORMAT_VERSION)
    if version == FORMAT_VERSION:
        return
    where = f"{locate(place, ['version'])[0]}: version"
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigError(
            f"the file has format {version}, but this vlmtune reads format {FORMAT_VERSION}",
            where=where,
            remedy="Install a newer vlmtune (`pip install -U vlmtune`).",
        )
    raise ConfigError(f"found {kind_of(version)}", where=where, expected=str(FORMAT_VERSION))


def _complete(values: dict[str, Any], place: Place) -> None:
    """Fill what the schema cannot know: sections left empty, and the tuning method."""
    for name in RunConfig.model_fields:
        # `train:` with all its keys commented out means the defaults, not "nothing".
        if name in values and values[name] is None and name != "version":
            values[name] = {}
    tuning = values.get("tuning")
    if not isinstance(tuning, dict) or "method" in tuning:
        return
    lora_only = [key for key in tuning if key in LoraTuning.model_fields and key not in FullTuning.model_fields]
    if lora_only:
        raise ConfigError(
            "is an option of LoRA, but no method is given",
            where=f"{locate(place, ['tuning', lora_only[0]])[0]}: tuning.{lora_only[0]}",
            remedy="Add `method: lora` (or dora, rslora, qlora) under tuning.",
        )
    values["tuning"] = {"method": "full", **tuning}


def _with_absolute_paths(config: RunConfig, file: Path) -> RunConfig:
    """Anchor every path of the configuration at the folder of the YAML `file`."""
    base = file.parent

    def path(text: str) -> str:
        return _absolute(text, base)

    def source(entry: AnySource) -> AnySource:
        return _anchored(entry, path)

    data = config.data.model_copy(
        update={
            "sources": tuple(source(entry) for entry in config.data.sources),
            "eval": tuple(source(entry) for entry in config.data.eval),
            "prepared": config.data.prepared and path(config.data.prepared),
            "allow": tuple(_absolute(folder, base) for folder in config.data.allow),
        }
    )
    output_dir = _absolute(config.train.output_dir or f"runs/{file.stem}", base)
    model = config.model.model_copy(update={"path": _model_path(config.model.path, base)})
    train = config.train.model_copy(update={"output_dir": output_dir})
    tuning = config.tuning
    if isinstance(tuning, LoraTuning) and tuning.native_base is not None:
        tuning = tuning.model_copy(update={"native_base": path(tuning.native_base)})
    return config.model_copy(update={"model": model, "tuning": tuning, "data": data, "train": train})


def _anchored(entry: AnySource, path: Callable[[str], str]) -> AnySource:
    """A source whose paths `path` made absolute."""
    if isinstance(entry, XTunerLists):
        folders = tuple(folder if folder is None else path(folder) for folder in entry.image_folders)
        return entry.model_copy(update={"data_paths": tuple(map(path, entry.data_paths)), "image_folders": folders})
    given = entry.root if isinstance(entry, SourceConfig) and entry.root is not None else ()
    roots = tuple(map(path, (given,) if isinstance(given, str) else given))
    # What a prefix becomes is a folder beside the YAML, or the beginning of a member's name in a tar; "" is neither.
    anchor = path if all(map(os.path.isdir, roots)) else str
    prefixes = {old: anchor(new) if new else new for old, new in entry.replace_prefix.items()}
    if isinstance(entry, HubSource):
        return entry.model_copy(update={"replace_prefix": prefixes})
    root = (roots[0] if isinstance(given, str) else roots) if roots else None
    return entry.model_copy(update={"path": path(entry.path), "root": root, "replace_prefix": prefixes})


def _absolute(path: str, base: Path) -> str:
    return os.path.abspath(base / Path(path).expanduser())


def _model_path(path: str, base: Path) -> str:
    """A folder if there is one, or if it cannot be meant as a hub id; else the hub id as it is.

    `models/InternVL2-1B` has the form of a hub id. Where a folder `models` stands beside the YAML it is taken as a
    path, so that a missing model is reported as missing and not looked for in the network.
    """
    folder = _absolute(path, base)
    if os.path.exists(folder) or not HUB_ID.fullmatch(path):
        return folder
    return folder if os.path.isdir(os.path.dirname(folder)) else path
