"""``vlmtune quickstart``: the whole job on a small case."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "the whole job on handwritten digits, on a CPU in minutes: data, training, LoRA, export, report"
EXAMPLES = """
vlmtune quickstart
vlmtune quickstart /tmp/digits
vlmtune quickstart small --only data      # just the pictures and rows
vlmtune quickstart small --only model     # just a tiny model folder to try things on
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", nargs="?", type=Path, default=Path("quickstart"), metavar="DIR",
        help="a new folder, or one whose quickstart was interrupted (default: quickstart)",
    )  # fmt: skip
    parser.add_argument("--only", choices=("data", "model"), help="write only the pictures and rows, or the tiny model")


def run(args: argparse.Namespace) -> int:
    import torch

    from vlmtune.quickstart import story

    # Matrices this small gain next to nothing from a second thread, and lose a lot to one that has to wait for a core.
    torch.set_num_threads(1)
    steps = {None: story.tell, "data": story.make_data, "model": story.make_model}
    steps[args.only](args.dir, say=lambda line: print(line, flush=True))
    return 0
