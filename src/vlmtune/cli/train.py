"""``vlmtune train``: train a run, or go on with it where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmtune.cli import environment, launch

HELP = "train a run, or go on with it where it stopped"
EXAMPLES = """
vlmtune train ui.yaml
vlmtune train ui.yaml train.epochs=3 tuning.rank=32
NPROC_PER_NODE=2 vlmtune train ui.yaml train.strategy=zero2
srun -N 2 --ntasks-per-node 8 vlmtune train ui.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN.yaml", type=Path, help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML")


def run(args: argparse.Namespace) -> int:
    from vlmtune.config.load import load_config

    # Read before any process is started, so that a mistake is told once and at once.
    config = load_config(args.config, args.overrides)
    environment.allow_network(config.model.path, *config.hub_datasets)
    launch.adopt_slurm()
    num = 1 if config.train.strategy == "single" else launch.processes_to_start()
    if num > 1:
        options = [name for name in ("offline", "debug") if vars(args).get(name)]
        command = ["train", str(args.config), *args.overrides, *(f"--{name}" for name in options)]
        return launch.start(num, command)
    from vlmtune.train.run import train

    train(config, say=lambda line: print(line, flush=True))
    return 0
