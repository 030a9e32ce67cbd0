"""``vlmtune init``: copy an example configuration."""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import sys
from importlib.resources.abc import Traversable
from pathlib import Path

from vlmtune.errors import UsageError
from vlmtune.files import write_atomic

HELP = "copy an example configuration to start from; without a name, list them"
EXAMPLES = """
vlmtune init
vlmtune init auto_lora
vlmtune init auto_lora -o ui.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="name of an example")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write it (NAME.yaml); - for the terminal")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    examples = _examples()
    if args.name is None:
        width = max(len(name) for name in examples)
        for name, file in examples.items():
            print(f"{name:<{width}}  {_title(file)}")
        return 0
    name = args.name.removesuffix(".yaml")
    if name not in examples:
        near = difflib.get_close_matches(name, examples, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(examples)}."
        raise UsageError(f"there is no example {name!r}", where="vlmtune init", remedy=remedy)
    text = examples[name].read_text(encoding="utf-8")
    if args.output == "-":
        sys.stdout.write(text)
        return 0
    target = Path(args.output or f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists() and not args.force:
        raise UsageError("is already there", where=str(target), remedy="Give another name with -o, or --force.")
    write_atomic(target, text)
    print(f"wrote {target}: set model.path and data.sources in it, then\n")
    print(f"  vlmtune check {target}\n  vlmtune train {target}")
    return 0


def _examples() -> dict[str, Traversable]:
    folder = importlib.resources.files("vlmtune") / "examples"
    files = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)}


def _title(file: Traversable) -> str:
    return file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
