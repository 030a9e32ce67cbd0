"""Small runs for the tests of training: pictures, rows and configurations, all from fixed seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.config.load import load_config
from vlmtune.config.schema import RunConfig

QUESTIONS = ("What is in this picture?", "Which digit is this?", "Describe the screen.")
ANSWERS = ("It is a seven.", "A cat on a red mat, beside two small dogs.", "yes", "The button says OK.", "Three")


def write_rows(folder: Path, *, num: int, text_only: int = 0, seed: int = 0, name: str = "rows.jsonl") -> Path:
    """A LLaVA-style file of `num` rows with one small picture each, the last `text_only` of them without."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lines = []
    for i in range(num):
        turns = []
        for turn in range(int(random.integers(1, 3))):
            question = QUESTIONS[int(random.integers(len(QUESTIONS)))]
            picture = "<image>\n" if turn == 0 and i < num - text_only else ""
            turns += [
                {"from": "human", "value": picture + question},
                {"from": "gpt", "value": ANSWERS[int(random.integers(len(ANSWERS)))]},
            ]
        row: dict[str, Any] = {"id": f"{name}-{i}", "conversations": turns}
        if i < num - text_only:
            row["image"] = f"{name}-{i}.png"
            pixels = random.integers(0, 256, (int(random.integers(24, 48)), int(random.integers(24, 48)), 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / row["image"])
        lines.append(json.dumps(row))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def write_yaml(folder: Path, model: Path, rows: Path, sections: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """run.yaml of a tiny run; `sections` are merged over the defaults, key by key."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "tuning": {"method": "full"},
        "data": {"sources": {"path": str(rows)}, "max_length": 256, "workers": 0},
        "train": {
            "output_dir": str(folder / "run"),
            "global_batch_size": 4,
            "epochs": 1,
            "learning_rate": 1e-3,
            "warmup": 0.0,
            "log_every": 1,
        },
    }
    for section, values in (sections or {}).items():
        base.setdefault(section, {}).update(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(base))  # JSON is YAML
    return folder / "run.yaml"


def make_config(folder: Path, model: Path, rows: Path, /, **sections: Mapping[str, Any]) -> RunConfig:
    return load_config(write_yaml(folder, model, rows, sections))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, training loss) of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def eval_losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
