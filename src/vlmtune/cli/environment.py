"""What the process must know before a library is imported: network, noise, languages of the terminal.

Libraries read these variables once, while they are imported; that is why this runs first, and why it is variables.
A variable that the user has set is never changed.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from pathlib import Path

from vlmtune import progress
from vlmtune.config.hub import HUB_ID

_QUIET_AND_PRIVATE = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns in every worker that is forked
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP warns about find_unused_parameters, which text-only rows need
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard looks for TensorFlow
}

_NOISY = "torch|transformers|peft|accelerate|deepspeed|huggingface_hub|tensorboard|bitsandbytes|multiprocessing"


_offline_by_default = False


def prepare(*, offline: bool, debug: bool) -> None:
    """Set the variables, the log levels and the terminal. Call before any import of torch or transformers.

    Without `offline` the network stays closed all the same until `allow_network` meets a hub id.
    """
    global _offline_by_default
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        _offline_by_default = True
    if not debug:
        for name, value in _QUIET_AND_PRIVATE.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", module=rf"({_NOISY})(\.|$)")
        for name in _NOISY.split("|"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its level when it is imported, which is later; a filter stays.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    _log_to_stderr(debug)
    if rank() > 0:
        progress.mute()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end a run.
            stream.reconfigure(errors="replace")


def allow_network(*names: str) -> None:
    """Open the network if one of `names` is a hub id and no path; before anything imports transformers.

    `--offline` and a variable HF_HUB_OFFLINE of the user's own stand above it.
    """
    if _offline_by_default and any(HUB_ID.fullmatch(name) and not Path(name).exists() for name in names):
        os.environ.pop("HF_HUB_OFFLINE", None)
        # Gigabytes are on their way: let that be seen.
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)


def rank() -> int:
    """This process's number among those of the run, by torchrun's or SLURM's variable; 0 when alone."""
    value = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(value) if value.isdecimal() else 0


def _log_to_stderr(debug: bool) -> None:
    logger = logging.getLogger("vlmtune")
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank() == 0 else logging.WARNING)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    prefix = f"[rank {rank()}] " if rank() else ""
    layout = "%(asctime)s %(name)s %(levelname)s %(message)s" if debug else "%(message)s"
    logger.handlers[0].setFormatter(logging.Formatter(prefix + layout))
