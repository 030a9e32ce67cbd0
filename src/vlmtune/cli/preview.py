"""``vlmtune preview``: rows as the model will see them."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmtune.cli import environment

HELP = "rows as the model will see them: trained and masked tokens in colour (⟦ ⟧ without colours)"
EXAMPLES = """
vlmtune preview run.yaml
vlmtune preview run.yaml -n 3 model.image.max_tiles=2
vlmtune preview run.yaml --row 124
vlmtune preview run.yaml --row coco.jsonl:124
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that differ from the file")
    parser.add_argument("-n", type=int, default=8, metavar="N", help="how many rows, in the order of training (8)")
    parser.add_argument(
        "--row", metavar="N", help="one row: its line or number, with the file's name if there are several"
    )


def run(args: argparse.Namespace) -> int:
    from vlmtune.config.load import load_config

    config = load_config(args.config, args.overrides)
    environment.allow_network(config.model.path)

    from rich.console import Console
    from rich.text import Text

    from vlmtune.data.encode import encode
    from vlmtune.data.preview import epoch_lines, first_rows, legend, row_text
    from vlmtune.data.sources import open_corpus
    from vlmtune.errors import DataError
    from vlmtune.models.load import open_folder

    corpus = open_corpus(config.data.sources, allow=config.data.allow)
    rows = [corpus.find(args.row)] if args.row else first_rows(corpus, config, max(args.n, 1))
    opened = open_folder(config.model.path, config.media)
    console = Console(highlight=False)
    colourless = console.color_system is None or console.no_color  # a pipe, a file, NO_COLOR
    unwrapped = not console.is_terminal  # a line of the text stays one line for `grep`
    console.print(legend(brackets=colourless), end="\n\n", soft_wrap=unwrapped)
    code = 0
    for row in rows:
        try:
            sample = corpus.sample(row)
            encoded = encode(sample, opened)
            console.print(row_text(sample, encoded, opened, brackets=colourless), end="\n\n", soft_wrap=unwrapped)
        except DataError as error:
            console.print(Text(str(error), "red"), end="\n\n", soft_wrap=unwrapped)
            code = error.exit_code
    for line in epoch_lines(corpus, config):
        console.print(line, markup=False, soft_wrap=unwrapped)
    return code
