"""The disk is looked at before the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.config.schema import RunConfig
from vlmtune.errors import RunFolderError
from vlmtune.train import space
from vlmtune.tuning.components import ComponentRow

ROWS = [ComponentRow("vision", 0, 1000, None), ComponentRow("language", 500, 3000, 1e-4)]


def config(method: str, keep: int = 2) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "tuning": {"method": method},
            "data": {"sources": {"path": "x.jsonl"}},
            "train": {"keep_checkpoints": keep},
        }
    )


def test_size_of_a_checkpoint() -> None:
    assert space.checkpoint_bytes(config("full"), ROWS) == 4000 * 4 + 500 * 8
    assert space.checkpoint_bytes(config("lora"), ROWS) == 500 * 4 + 500 * 8


@pytest.mark.parametrize(("free", "fits"), [(4 * 6000, True), (4 * 6000 - 1, False)])
def test_kept_best_and_the_one_in_work_must_fit(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: free)
    if fits:
        space.check(tmp_path, config("lora"), ROWS)
    else:
        with pytest.raises(RunFolderError, match="up to 4 checkpoints") as caught:
            space.check(tmp_path, config("lora"), ROWS)
        assert caught.value.exit_code == 2
