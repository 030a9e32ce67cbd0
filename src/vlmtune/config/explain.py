"""pydantic's errors in the user's words: place, what was found, what was expected, did you mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, Union, get_args, get_origin

from vlmtune.config.hints import HINTS
from vlmtune.config.schema import FullTuning, LoraTuning, RunConfig, Section, XTunerLists
from vlmtune.config.sources import SOURCE_KINDS
from vlmtune.config.yaml_reader import Place, kind_of
from vlmtune.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    Loc = Sequence[int | str]

_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
}


def rewrite(error: ValidationError, place: Place) -> ConfigError:
    """All mistakes of a configuration as one error; `place` knows the line of every key.

    One mistake is ``run.yaml:19: train.learnig_rate: unknown key; did you mean learning_rate?``; several stand below
    each other.
    """
    details = error.errors(include_url=False)
    # A list whose item is wrong is also reported as too short; the item says it all.
    wrong = [tuple(item["loc"]) for item in details if item["type"] != "too_short"]
    kept = [d for d in details if d["type"] != "too_short" or not any(_inside(loc, d["loc"]) for loc in wrong)]
    mistakes = sorted((_explain(item, place) for item in kept), key=lambda mistake: mistake[0])
    if len(mistakes) == 1:
        _, where, reason = mistakes[0]
        return ConfigError(reason, where=where)
    lines = "\n".join(f"  {ConfigError(reason, where=where)}" for _, where, reason in mistakes)
    return ConfigError(f"{len(mistakes)} mistakes\n{lines}", where=place.label)


def _inside(loc: Loc, outer: Loc) -> bool:
    return len(loc) > len(outer) and tuple(loc[: len(outer)]) == tuple(outer)


def _explain(item: ErrorDetails, place: Place) -> tuple[tuple[int, str], str, str]:
    """A sort key (line, place), the place and the reason of one mistake."""
    loc = item["loc"]
    if item["type"] == "union_tag_invalid":
        # pydantic points at the section; the mistake is the value of the key that chooses.
        loc = (*loc, str(item["ctx"]["discriminator"]).strip("'"))
    keys, holder, field = _walk(loc)
    label, keys = locate(place, keys)
    path = ".".join(str(key) for key in keys)
    where = f"{label}: {path}" if path else label
    line = label.rpartition(":")[2]
    return (int(line) if line.isdecimal() else 0, where), where, _reason(item, keys, holder, field)


def locate(place: Place, keys: Sequence[int | str]) -> tuple[str, list[int | str]]:
    """The label of the deepest place on the way to `keys`, and the keys as the file spells them.

    A single source may stand without its list; its index is then not in the file.
    """
    spelled: list[int | str] = []
    here: Place | None = place
    label = place.label
    for key in keys:
        if isinstance(key, int) and here is not None and any(isinstance(inner, str) for inner in here.inside):
            continue
        spelled.append(key)
        here = here.inside.get(key) if here is not None else None
        label = here.label if here is not None else label
    return label, spelled


def _walk(loc: Loc) -> tuple[list[int | str], type[Section] | None, FieldInfo | None]:
    """Follow pydantic's location through the schema.

    Returns the keys without the tags of unions, the section that holds the last key, and the last key's field if it
    has one.
    """
    keys: list[int | str] = []
    kinds: tuple[Any, ...] = (RunConfig,)  # what may stand here: one, or the members of a union
    holder: type[Section] | None = None
    field: FieldInfo | None = None
    for step in loc:
        if step == "[key]":  # the error is about a key of a dict, which is the step before
            continue
        tagged = [kind for kind in kinds if _is_section(kind) and _answers_to(kind, step)]
        if len(kinds) > 1 and tagged:
            kinds = (tagged[0],)
            continue
        keys.append(step)
        kind = kinds[0] if len({str(kind) for kind in kinds}) == 1 else None
        holder, field = (kind, kind.model_fields.get(str(step))) if _is_section(kind) else (None, None)
        kinds = _members(field.annotation) if field is not None else _members(_item_of(kind))
    return keys, holder, field


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _answers_to(kind: type[Section], step: int | str) -> bool:
    """Whether a member of a union is the one that pydantic names by `step`: a tag, or the name of the class."""
    method = kind.model_fields.get("method")
    return (
        step == kind.__name__
        or SOURCE_KINDS.get(str(step)) is kind
        or (method is not None and step in get_args(method.annotation))
    )


def _members(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(member for part in get_args(kind) for member in _members(part) if member is not type(None))
    return (kind,)


def _item_of(kind: Any) -> Any:
    """What a list or dict holds."""
    arguments = [part for part in get_args(kind) if part is not Ellipsis]
    return arguments[-1] if get_origin(kind) in (tuple, list, dict) and arguments else None


def _reason(item: ErrorDetails, keys: list[int | str], holder: type[Section] | None, field: FieldInfo | None) -> str:
    kind, found, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key([str(key) for key in keys], holder)
    if kind == "missing":
        return _missing(found, keys, field)
    if kind == "union_tag_invalid":
        return _not_one_of(found[keys[-1]], context["expected_tags"])
    if kind == "literal_error":
        return _not_one_of(found, context["expected"])
    if kind == "value_error":
        return str(context["error"])
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        limit = context[name]
        shown = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        return f"found {found}; expected {words} {shown}"
    if kind == "too_short" or kind == "string_too_short":
        return "is empty"
    if kind in _KINDS:
        return _wrong_kind(found, _KINDS[kind], field)
    return f"{item['msg'][0].lower()}{item['msg'][1:]}"


def _wrong_kind(found: Any, expected: str, field: FieldInfo | None) -> str:
    if found is None:
        default = "" if field is None or field.is_required() else f", or leave the key out for {field.default}"
        return f"nothing stands after the colon; expected {expected}{default}"
    if expected == "text" and isinstance(found, int | float):
        return f"found {kind_of(found)}; expected text (put it in quotes)"
    sections = _sections(field.annotation) if field is not None else []
    if sections and expected == "a list":
        expected = f"a list of {_sketch(sections)}"
    elif sections and expected == "a group of keys":
        expected = _sketch(sections)
    return f"found {kind_of(found)}; expected {expected}"


def _missing(found: Any, keys: list[int | str], field: FieldInfo | None) -> str:
    if isinstance(keys[-1], int):
        return f"missing; found a list of {len(found)}"
    if field is None:
        return "missing"
    if field.description:
        return f"missing: {field.description[0].lower()}{field.description[1:].rstrip('.')}"
    sections = _sections(field.annotation)
    if not sections:
        return "missing"
    listed = not any(_is_section(member) for member in _members(field.annotation))
    return f"missing; expected {'a list of ' if listed else ''}{_sketch(sections)}"


def _sketch(sections: Sequence[type[Section]]) -> str:
    """What a section must hold, as it could be written."""
    if FullTuning in sections:
        return "{method: …}"
    fields = sections[0].model_fields  # of sources: the file, which is the usual one
    required = [f"{name}: …" for name, field in fields.items() if field.is_required()]
    return "{" + ", ".join(required) + "}" if required else f"{{}} for the defaults, or the keys {', '.join(fields)}"


def _not_one_of(found: Any, expected: str) -> str:
    """`expected` is pydantic's list, as in ``'a', 'b' or 'c'``."""
    choices = re.findall(r"'([^']*)'", expected)
    listed = ", ".join(choices) or expected
    return f"{_shown(found)} is not one of {listed}{_did_you_mean(str(found), choices, cutoff=0.5)}"


def _shown(found: Any) -> str:
    return repr(found) if isinstance(found, str) else kind_of(found)


def _did_you_mean(word: str, choices: Sequence[str], cutoff: float = 0.7) -> str:
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_key(keys: list[str], holder: type[Section] | None) -> str:
    if holder is None:
        return "unknown key"
    key, section = keys[-1], ".".join(key for key in keys[:-1] if not key.isdecimal())
    known = list(holder.model_fields)
    foreign = _of_another_source(key, holder)
    if foreign:
        return foreign
    hint = HINTS.get(key.lower().replace("-", "_"))
    if hint is not None and hint.key is None:
        return f"unknown key; remove it: {hint.note}"
    if hint is not None and hint.key is not None:
        owner, _, name = hint.key.rpartition(".")
        note = f" ({hint.note})" if hint.note else ""
        if section == "data.sources" and owner == "model.image":
            return f"unknown key; did you mean image: {{{name}: …}}{note}?"
        return f"unknown key; did you mean {name if owner == section else hint.key}{note}?"
    if section == "tuning" and key in LoraTuning.model_fields:
        return "is an option of LoRA, but the method is full; write method: lora (or dora, rslora, qlora), or remove it"
    near = _did_you_mean(key.replace("-", "_"), known)
    if near:
        return f"unknown key{near}"
    elsewhere = option_named(key)
    if elsewhere:
        return f"unknown key; did you mean {elsewhere}?"
    extra = " (other arguments of transformers.TrainingArguments go into train.extra)" if section == "train" else ""
    return f"unknown key; expected one of {', '.join(known)}{extra}"


def _of_another_source(key: str, holder: type[Section]) -> str:
    """What to say of a key that belongs to another kind of source than the one it stands in."""
    if holder not in SOURCE_KINDS.values():
        return ""
    owners = [_tells(kind) for kind in SOURCE_KINDS.values() if key in kind.model_fields]
    if not owners:
        return ""
    if key in owners:
        return f"does not go with {_tells(holder)}; a source has one of them, so make two entries, or remove one"
    instead = {"repeat": "; write the number into repeat_times", "root": "; write the folder into image_folders"}
    return (
        f"belongs to a source with {' or '.join(owners)}, but this one has {_tells(holder)}"
        f"{instead.get(key, '') if holder is XTunerLists else ''}"
    )


def _tells(kind: type[Section]) -> str:
    """The key that tells a kind of source from the others."""
    return next(name for name, field in kind.model_fields.items() if field.is_required())


def leaves(kind: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every option of the configuration as a dotted path without list indices."""
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        for section in _sections(field.annotation):
            yield from leaves(section, path + ".")


def _sections(kind: Any) -> list[type[Section]]:
    """The sections that may stand in a field: itself, a member of a union, or the entries of a list."""
    return [one for member in _members(kind) for one in (member, *_members(_item_of(member))) if _is_section(one)]


def option_named(name: str) -> str | None:
    """The option that `name` means, here or in another tool, as a dotted path."""
    hint = HINTS.get(name)
    if hint is not None:
        return hint.key
    paths = list(dict.fromkeys(leaves()))
    exact = [path for path in paths if name in (path, path.rpartition(".")[2])]
    if exact:
        return exact[0]
    near = difflib.get_close_matches(name, [path.rpartition(".")[2] for path in paths], n=1, cutoff=0.8)
    return next(path for path in paths if path.endswith(f".{near[0]}")) if near else None
