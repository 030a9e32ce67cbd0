"""``vlmtune prepare``: tokenise the rows of a run once, for every later command."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.cli import environment
from vlmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    from vlmtune.config.schema import AnySource, RunConfig
    from vlmtune.data.prepared.prepare import Prepared
    from vlmtune.models.family import OpenedFolder

HELP = "tokenise the rows once into shards that check and train map: parallel, resumable, bounded memory"
EXAMPLES = """
vlmtune prepare run.yaml
vlmtune prepare run.yaml -o /scratch/prepared --workers 32
vlmtune prepare run.yaml --shard $SLURM_ARRAY_TASK_ID/16     # sbatch --array=1-16
vlmtune prepare run.yaml --merge                             # after the array: is every row there?
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that differ from the file")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of the shards, as data.prepared")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, instead of data.workers")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shard", type=_share, metavar="I/N", help="only the I-th of N parts of the work, I from 1")
    which.add_argument("--merge", action="store_true", help="only check that all parts are there, and finish the work")


def run(args: argparse.Namespace) -> int:
    from vlmtune.config.load import load_config

    overrides = list(args.overrides)
    if args.output is not None:
        overrides.append(f"data.prepared={args.output.expanduser().absolute()}")
    if args.workers is not None:
        overrides.append(f"data.workers={args.workers}")
    config = load_config(args.config, overrides)
    environment.allow_network(config.model.path, *config.hub_datasets)

    from vlmtune.models.load import open_folder

    opened = open_folder(config.model.path, config.media)
    bad = 0
    for title, sources in (("training", config.data.sources), ("eval", config.data.eval)):
        if sources:
            bad += _prepare(title, sources, config, opened, args)
    if bad:
        print(f"{bad:,} bad row{'' if bad == 1 else 's'}: `vlmtune check` lists them.")
    return DataError.exit_code if bad and config.data.bad_rows == "refuse" else 0


def _prepare(
    title: str, sources: tuple[AnySource, ...], config: RunConfig, opened: OpenedFolder, args: argparse.Namespace
) -> int:
    """Prepares the training or the eval sources and says so; the number of bad rows."""
    from vlmtune.data.prepared.prepare import merge, prepare, prepare_share, prepared_folder
    from vlmtune.data.rows.corpus import open_corpus

    into = prepared_folder(config)
    corpus = open_corpus(sources, allow=config.data.allow, memory=into)
    workers = config.data.workers
    if args.shard:
        part, parts = args.shard
        rows, made = prepare_share(corpus, opened, into=into, workers=workers, part=part, parts=parts)
        print(f"{title}: part {part} of {parts} has {rows:,} of {len(corpus):,} rows; {made:,} prepared now ({into})")
        return 0
    prepared = merge(corpus, opened, into) if args.merge else prepare(corpus, opened, into=into, workers=workers)
    bad = len(prepared.measured.bad)
    print(
        f"{title}: {len(corpus):,} items, {int(prepared.measured.num_tokens.sum()):,} tokens; "
        f"{prepared.num_made:,} prepared now, {prepared.num_kept:,} before ({into})"
    )
    _print_first(prepared, opened)
    return bad


def _print_first(prepared: Prepared, opened: OpenedFolder) -> None:
    """The first case, as the model will see it."""
    import numpy as np

    from vlmtune.data.preview import row_text
    from vlmtune.progress import Screen

    usable = np.flatnonzero(prepared.measured.num_tokens)
    if len(usable):
        first = int(usable[0])
        console = Screen(highlight=False)
        colourless = console.color_system is None or console.no_color
        text = row_text(prepared.rows.corpus.sample(first), prepared.rows.encoded(first), opened, brackets=colourless)
        console.print("The first case:", style="bold")
        console.print(text, end="\n\n", soft_wrap=not console.is_terminal)


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(
            f"is {text}", where="--shard", expected="I/N with I from 1 to N", remedy="With SLURM: sbatch --array=1-N."
        )
    return part, parts
