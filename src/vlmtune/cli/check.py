"""``vlmtune check``: read all data of a run without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmtune.cli import environment

HELP = "every bad row with file, line and reason; lengths, packs, batch arithmetic"
EXAMPLES = """
vlmtune check run.yaml
vlmtune check run.yaml --quick
vlmtune check run.yaml --decode --json check.json
vlmtune check run.yaml data.max_length=2048 data.too_long=drop --devices 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that differ from the file")
    parser.add_argument(
        "--decode", action="store_true", help="open every pixel: finds truncated pictures, takes longer"
    )
    parser.add_argument(
        "--quick", action="store_true", help="rows, marks and picture headers alone: no tokens, no packs, much faster"
    )
    parser.add_argument("--devices", type=_positive, default=1, metavar="N", help="plan the batches for N devices (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report, all bad rows included")


def run(args: argparse.Namespace) -> int:
    from vlmtune.config.load import load_config

    config = load_config(args.config, args.overrides)
    environment.allow_network(config.model.path, *config.hub_datasets)

    import json

    from vlmtune.data.checks.render import render
    from vlmtune.data.checks.report import check
    from vlmtune.data.plan.bad_rows import write_bad_rows
    from vlmtune.errors import DataError
    from vlmtune.files import write_atomic
    from vlmtune.models.load import open_folder
    from vlmtune.progress import Screen

    opened = open_folder(config.model.path, config.media)
    report = check(config, opened, world=args.devices, decode=args.decode, quick=args.quick)
    assert config.train.output_dir is not None  # load_config sees to it
    listed = write_bad_rows(Path(config.train.output_dir), report.bad)
    if args.json:
        write_atomic(args.json, json.dumps(report.as_dict(), ensure_ascii=False, indent=1) + "\n")
    console = Screen(highlight=False)
    for piece in render(report, listed):
        console.print(piece)
    if args.json:
        console.print(f"The whole report is in {args.json}.", markup=False)
    return DataError.exit_code if report.refuses else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
