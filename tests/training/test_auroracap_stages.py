"""AuroraCap's three stages in a row, from the examples, on tiny parts, and what each trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_models import TOWER_LAYERS, write_language, write_tower
from runs import losses, write_rows
from safetensors.torch import load_file
from videos import write_video

from vlmtune.config.load import load_config
from vlmtune.export.assemble import assemble
from vlmtune.export.write import export
from vlmtune.models.load import open_folder
from vlmtune.train.run import TrainResult, train

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS = {"vision": "visual_encoder", "projector": "projector", "language": ""}
UNSEEN = ("vision_model.post_layernorm.", f"vision_model.encoder.layers.{TOWER_LAYERS - 1}.")
"""Behind the layer whose features are used: never trained, in the reference neither."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 rows with a picture, 2 without, and 2 with a short video, as JSON for `data.sources`."""
    folder = tmp_path_factory.mktemp("stages")
    pictures = write_rows(folder, num=10, text_only=2)
    write_video(folder / "clip.mp4", codec="libx264", num_frames=6)
    turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "The bars count to five."}]
    films = folder / "films.jsonl"
    films.write_text(
        "".join(json.dumps({"id": f"f{n}", "video": "clip.mp4", "conversations": turns}) + "\n" for n in "ab")
    )
    return json.dumps([{"path": str(pictures)}, {"path": str(films)}])


def _stage(folder: Path, example: str, model: Path, sources: str, *more: str) -> TrainResult:
    """The example as it is but for paths and size."""
    overrides = [
        f"model.path={model}",
        f"data.sources={sources}",
        f"train.output_dir={folder / 'runs' / example}",
        "data.workers=0",
        "data.max_length=1024",
        "train.precision=float32",
        "train.strategy=single",
        "train.global_batch_size=4",
        "train.epochs=3",
        "train.learning_rate=2e-3",
        "train.log_every=1",
    ]
    return train(load_config(EXAMPLES / f"auroracap_{example}.yaml", [*overrides, *more]))


def _changed(before: Path, after: Path, part: str) -> tuple[set[str], set[str]]:
    """Names of the tensors of an xtuner folder's part that differ, and of those that are the same bit by bit."""
    one, other = (load_file(folder / PARTS[part] / "model.safetensors") for folder in (before, after))
    assert one.keys() == other.keys()
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    return differ, one.keys() - differ


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["vlmtune"]


def _tokens(folder: Path) -> list[int]:
    """Of a square picture, and of the frames of a video of three, by what the folder alone says."""
    opened = open_folder(str(folder))
    square = (64, 64)
    plans = opened.family.plan([square], opened.spec), opened.family.plan([square] * 3, opened.spec, (0, 1, 2))
    return [plan.num_tokens for some in plans for plan in some]


def test_three_stages_in_a_row(tmp_path: Path, sources: str) -> None:
    parts = write_language(tmp_path / "text"), write_tower(tmp_path / "clip")
    start = assemble(*map(str, parts), tmp_path / "start")
    trained = {"projector": ["projector"], "vision": ["vision", "projector"], "language": list(PARTS)}
    options: dict[str, list[str]] = {
        "projector": ["model.image.size=48"],
        "vision": ["model.image.token_merge_ratio=0.5"],
        "language": ["model.video={num_frames: 3, slow_fast: true}"],
    }
    folder = start
    for stage, named in trained.items():
        result = _stage(tmp_path, stage, folder, sources, *options[stage])
        found = [loss for _, loss in losses(result.run_dir)]
        assert sum(found[-3:]) < sum(found[:3]), (stage, found)
        after = export(result.run_dir, tmp_path / stage, layout="xtuner", device="cpu").out
        for part in PARTS:
            differ, same = _changed(folder, after, part)
            if part not in named:
                assert not differ, (stage, part, differ)
            else:
                assert same == {name for name in same | differ if part == "vision" and name.startswith(UNSEEN)}
                assert differ, (stage, part)
        folder = after
    share = {stage: _record(tmp_path / stage) for stage in trained}
    assert [share[stage]["token_merge_ratio"] for stage in trained] == [1.0, 0.5, 0.5]
    assert [share[stage]["slow_fast"] for stage in trained] == [False, False, True]
    assert {entry["fit"] for entry in share.values()} == {"pad_square"}
    # 36 patches; r = int(36 × 0.5 ÷ 4) = 4 in three of four layers: 36 - 12 are left
    assert _tokens(tmp_path / "projector") == [36, 36, 36, 36]
    assert _tokens(tmp_path / "vision") == [24, 24, 24, 24]
    assert _tokens(tmp_path / "language") == [24, 36, 24, 24]
