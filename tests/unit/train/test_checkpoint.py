"""Seals, leftovers and rotation on folders with a few bytes in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.errors import RunFolderError
from vlmtune.train import checkpoint
from vlmtune.train.best import Evaluated


def _sealed(run_dir: Path, step: int, strategy: str = "single", world: int = 1) -> Path:
    folder = checkpoint.folder_of(run_dir, step)
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * step)
    (folder / "deep" / "state").write_bytes(b"y")
    checkpoint.seal(folder, strategy=strategy, world=world)
    return folder


def test_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = _sealed(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"weights", "deep/state"}
    assert manifest["files"]["weights"]["size"] == 7 and len(manifest["files"]["weights"]["sha256"]) == 64
    assert manifest["step"] == 7


@pytest.mark.parametrize("harm", ["unlink", "cut", "grow", "manifest", "half a manifest"])
def test_whole_means_every_file_as_listed(tmp_path: Path, harm: str) -> None:
    folder = _sealed(tmp_path, 7)
    assert checkpoint.is_whole(folder)
    if harm == "unlink":
        (folder / "deep" / "state").unlink()
    elif harm == "manifest":
        (folder / "manifest.json").unlink()
    elif harm == "half a manifest":
        (folder / "manifest.json").write_text('{"files": {"wei')
    else:
        (folder / "weights").write_bytes(b"x" * (3 if harm == "cut" else 30))
    assert not checkpoint.is_whole(folder)
    assert checkpoint.remove_leftovers(tmp_path) == ["checkpoint-7"]
    assert not folder.exists()


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        _sealed(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()  # not ours
    assert [checkpoint.step_of(folder) for folder in checkpoint.whole(tmp_path)] == [9, 20, 100]
    assert checkpoint.remove_leftovers(tmp_path) == []


@pytest.mark.parametrize(("best", "kept"), [(None, [4, 5]), (1, [1, 4, 5]), (5, [4, 5])])
def test_rotation(tmp_path: Path, best: int | None, kept: list[int]) -> None:
    for step in range(1, 6):
        _sealed(tmp_path, step)
    checkpoint.rotate(tmp_path, keep=2, best_step=best)
    assert [checkpoint.step_of(folder) for folder in checkpoint.whole(tmp_path)] == kept


def test_best_file_names_the_latest_without_evaluation(tmp_path: Path) -> None:
    latest = _sealed(tmp_path, 3)
    checkpoint.write_best(tmp_path, None, latest)
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "checkpoint-3", "eval_loss": None}
    checkpoint.write_best(tmp_path, Evaluated(2, 0.5), latest)
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "checkpoint-2", "eval_loss": 0.5}


@pytest.mark.parametrize(
    ("there", "here", "fits"),
    [
        (("single", 1), ("ddp", 4), True),
        (("ddp", 2), ("single", 1), True),
        (("fsdp2", 2), ("fsdp2", 4), True),
        (("zero2", 2), ("zero2", 2), True),
        (("zero2", 2), ("zero2", 4), False),
        (("zero2", 2), ("zero3", 2), False),
        (("single", 1), ("fsdp2", 2), False),
    ],
)
def test_what_can_go_on_from_what(tmp_path: Path, there: tuple[str, int], here: tuple[str, int], fits: bool) -> None:
    folder = _sealed(tmp_path, 1, strategy=there[0], world=there[1])
    if fits:
        checkpoint.check_resumable(folder, strategy=here[0], world=here[1])
    else:
        with pytest.raises(RunFolderError, match=f"strategy {there[0]} on {there[1]}"):
            checkpoint.check_resumable(folder, strategy=here[0], world=here[1])
