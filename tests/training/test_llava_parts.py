"""Runs that begin from a folder of XTuner's three parts: what a checkpoint is, and that it goes on as the run did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import llava_models
import pytest
import torch
from runs import make_config, write_rows

from vlmtune.export.verify import fixed_prompts
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.models.load import open_folder
from vlmtune.train.run import train
from vlmtune.weights.shards import Shards

STEPS = {"max_steps": 2, "global_batch_size": 2, "learning_rate": 1e-2, "warmup": 0.0, "save_every": 2}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_projector_alone(form: llava_models.Form, tmp_path: Path) -> None:
    base = llava_models.xtuner_folder(tmp_path / "base", form=form)
    rows = write_rows(tmp_path / "rows", num=6, text_only=1)
    tuning = {"method": "full", "train": ["projector"]}
    config = make_config(tmp_path / "run", base, rows, tuning=tuning, train=STEPS)
    image = config.model.image.model_copy(update={"token_merge_ratio": 0.5})
    result = train(config.model_copy(update={"model": config.model.model_copy(update={"image": image})}))
    checkpoint = next(result.run_dir.glob("checkpoint-*"))
    opened, before = open_folder(checkpoint), open_folder(base)
    assert opened.layout == "native" and opened.family.home_layout(opened.folder) == "xtuner"
    assert opened.chat == before.chat and opened.spec.ratio == 0.5 and opened.spec.fit == "pad_square"
    exported = export(result.run_dir, tmp_path / "out")
    assert exported.layout == "xtuner" and all(one.holds for one in exported.comparisons)
    source, written = Shards(base), Shards(tmp_path / "out")
    assert set(written.infos) == set(source.infos)
    changed = {name for name in source.infos if not torch.equal(source.read(name), written.read(name))}
    assert changed == {name for name, _ in llava_models.projector_shapes()}
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["vlmtune"]["token_merge_ratio"] == 0.5 and said["vocab_size"] == llava_models.VOCABULARY
    spec = open_folder(tmp_path / "out").spec
    assert spec.image_processor.to_dict() == opened.spec.image_processor.to_dict()
    assert replace(spec, image_processor=None) == replace(opened.spec, image_processor=None)


def test_an_adapter_and_its_three_exports(tmp_path: Path) -> None:
    base = llava_models.xtuner_folder(tmp_path / "base", merging=True)
    rows = write_rows(tmp_path / "rows", num=6, text_only=1)
    tuning = {"method": "lora", "rank": 4, "targets": ["language", "vision"], "train": ["projector"]}
    result = train(make_config(tmp_path / "run", base, rows, tuning=tuning, train=STEPS))
    for layout in ("xtuner", "native", "llava"):
        exported = export(result.run_dir, tmp_path / layout, layout=layout)
        assert all(one.holds for one in exported.comparisons) and exported.counts["merged"]
    prompts = fixed_prompts()
    answers = [load(tmp_path / layout).generate(prompts, max_new_tokens=8) for layout in ("xtuner", "native", "llava")]
    assert answers[0] == answers[1] == answers[2]
