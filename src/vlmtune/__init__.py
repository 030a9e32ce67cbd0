"""Fine-tune vision-language models.

The Python face is as small as the command line::

    import vlmtune
    from vlmtune.config.load import load_config

    result = vlmtune.train(load_config(Path("ui.yaml"), ["train.epochs=3"]))
    session = vlmtune.load("runs/ui")
    session.generate([sample], max_new_tokens=64)
    vlmtune.export("runs/ui", "exported/ui", dtype="bfloat16")

Importing this package imports neither torch nor transformers; the first call does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmtune.config.schema import RunConfig
    from vlmtune.export.layers import Mode
    from vlmtune.export.write import ExportResult
    from vlmtune.infer.session import DtypeName, Session
    from vlmtune.train.run import TrainResult

    def train(config: RunConfig, *, say: Callable[[str], None] | None = None) -> TrainResult:
        """Run a training, or go on with it. See `vlmtune.train.run.train`."""

    def export(
        path: str | Path,
        out: str | Path,
        *,
        layout: str | None = None,
        checkpoint: str = "best",
        dtype: DtypeName | None = None,
        base: str | Path | None = None,
        verify: Mode | None = None,
        overwrite: bool = False,
        device: str | None = None,
        lora_alpha: float | None = None,
        second_adapter: str | Path | None = None,
    ) -> ExportResult:
        """Write a plain transformers folder of a trained model. See `vlmtune.export.write.export`."""

else:
    from vlmtune import export, train

__all__ = ["__version__", "export", "load", "train"]


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    checkpoint: str = "best",
    device: str | None = None,
    dtype: DtypeName | None = None,
) -> Session:
    """Load a model folder, an adapter or a run folder to ask it questions. See `vlmtune.infer.session.load`.

    Args:
        path: a model folder, an adapter folder, or a run folder.
        base: the model folder under an adapter, when it is not where the adapter says.
        checkpoint: of a run folder: ``best``, ``last``, or a step.
        device: ``cpu``, ``cuda``, ``cuda:1``; a GPU when there is one, if left out.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's own if left out.

    Raises:
        UsageError: no such folder, checkpoint or device.
        WeightsError: weights that are missing or do not fit.
    """
    from vlmtune.infer import session

    return session.load(path, base=base, checkpoint=checkpoint, device=device, dtype=dtype)
