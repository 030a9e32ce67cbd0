"""Where figures go: TensorBoard and metrics.jsonl in the run folder, both without doubles after a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vlmtune.files import write_atomic

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

# metrics.jsonl key -> TensorBoard tag; dictionaries become one curve per key.
_TAGS = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "trained_share": "train/trained_share",
    "epoch": "train/epoch",
    "learning_rate": "learning_rate",
}


class MetricsLog:
    """Writes on the first rank only; made when training begins, closed when it ends.

    Args:
        first_step: the step that training goes on from; later entries of an earlier process are dropped.
    """

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        self._file = run_dir / METRICS_FILE
        if self._file.exists():
            kept = [line for line in read_metrics(run_dir) if line["step"] <= first_step]
            write_atomic(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one line; a value is a number, or a mapping from component to number."""
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            parts = (
                {f"{_TAGS[key]}/{name}": part for name, part in value.items()}
                if isinstance(value, Mapping)
                else {_TAGS[key]: value}
            )
            for tag, number in parts.items():
                self._board.add_scalar(tag, number, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl, in order; a last line that a killed process left unfinished is skipped."""
    lines = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
