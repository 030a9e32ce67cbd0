"""``vlmtune preview``: rows as the model will see them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.cli import environment
from vlmtune.errors import DataError

if TYPE_CHECKING:
    from vlmtune.config.schema import RunConfig
    from vlmtune.data.row_encoder import RowEncoder

HELP = "rows as the model will see them: trained and masked tokens in colour (⟦ ⟧ without colours)"
EXAMPLES = """
vlmtune preview run.yaml
vlmtune preview run.yaml -n 3 model.image.max_tiles=2
vlmtune preview run.yaml --row 124
vlmtune preview run.yaml --row coco.jsonl:124
vlmtune preview run.yaml --html preview.html      # tiles, frames and boxes too, as one page
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that differ from the file")
    parser.add_argument("-n", type=int, default=8, metavar="N", help="how many rows, in the order of training (8)")
    parser.add_argument(
        "--row", metavar="N", help="one row: its line or number, with the file's name if there are several"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with the pictures as the model sees them"
    )


def run(args: argparse.Namespace) -> int:
    from vlmtune.config.load import load_config

    config = load_config(args.config, args.overrides)
    environment.allow_network(config.model.path, *config.hub_datasets)

    from vlmtune.data.prepared.prepare import prepared_folder
    from vlmtune.data.preview import first_rows
    from vlmtune.data.row_encoder import RowEncoder
    from vlmtune.data.rows.corpus import open_corpus
    from vlmtune.models.load import open_folder

    known = prepared_folder(config)  # the indices that check and prepare left; a look at rows makes no folder
    memory = known if known.is_dir() else None
    corpus = open_corpus(config.data.sources, allow=config.data.allow, memory=memory)
    rows = [corpus.find(args.row)] if args.row else first_rows(corpus, config, max(args.n, 1))
    encoder = RowEncoder(corpus, open_folder(config.model.path, config.media))
    if args.html is not None:
        return _write_page(args.html, f"Preview of {args.config.name}", rows, encoder, config)
    return _print_rows(rows, encoder, config)


def _print_rows(rows: Sequence[int], encoder: RowEncoder, config: RunConfig) -> int:
    from rich.text import Text

    from vlmtune.data.preview import epoch_lines, legend, row_text
    from vlmtune.progress import Screen

    console = Screen(highlight=False)
    colourless = console.color_system is None or console.no_color  # a pipe, a file, NO_COLOR
    unwrapped = not console.is_terminal  # a line of the text stays one line for `grep`
    console.print(legend(brackets=colourless), end="\n\n", soft_wrap=unwrapped)
    code = 0
    for row in rows:
        try:
            text = row_text(*encoder.row(row), encoder.opened(row), brackets=colourless)
            console.print(text, end="\n\n", soft_wrap=unwrapped)
        except DataError as error:
            console.print(Text(str(error), "red"), end="\n\n", soft_wrap=unwrapped)
            code = error.exit_code
    for line in epoch_lines(encoder.corpus, config):
        console.print(line, markup=False, soft_wrap=unwrapped)
    return code


def _write_page(file: Path, title: str, rows: Sequence[int], encoder: RowEncoder, config: RunConfig) -> int:
    from vlmtune.data.preview import epoch_lines
    from vlmtune.data.preview_page import facts, show_rows
    from vlmtune.files import write_atomic
    from vlmtune.progress import track
    from vlmtune.report.preview import PreviewPage, render_preview
    from vlmtune.version import __version__

    shown = list(track(show_rows(rows, encoder, config.data.max_length), total=len(rows), label="preview"))
    html = render_preview(
        PreviewPage(
            title=title,
            facts=facts(config, encoder),
            epoch=list(epoch_lines(encoder.corpus, config)),
            rows=shown,
            footer=f"vlmtune {__version__} preview",
        )
    )
    write_atomic(file, html)
    bad = [row for row in shown if row.error]
    for row in bad:
        print(f"{row.origin}: {row.error}")
    size = len(html.encode()) / 1e6
    print(f"{file}: {len(shown)} row{'' if len(shown) == 1 else 's'}, {len(bad)} bad, {size:.2f} MB")
    return DataError.exit_code if bad else 0
