"""Runs that begin from a folder of XTuner's three parts: what a checkpoint is, and that it goes on as the run did."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import llava_models
import pytest
import torch
from runs import make_config, write_rows

from vlmtune.cli.main import main
from vlmtune.config.schema import LoraTuning
from vlmtune.export.verify import fixed_prompts
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.models.load import load_model, open_folder
from vlmtune.train.run import train
from vlmtune.tuning.quantised import load_quantised
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


def test_pickled_weights_answer_and_score_as_safetensors(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", num=3, text_only=1)
    answers, scores = [], []
    for form in ("safetensors", "bin"):
        folder = llava_models.xtuner_folder(tmp_path / form, form=form, merging=True)
        answers.append(load(folder).generate(fixed_prompts(), max_new_tokens=8))
        out = tmp_path / f"eval-{form}"
        assert main(["eval", str(folder), "--data", str(rows), "--max-new-tokens", "4", "-o", str(out)]) == 0
        scores.append(json.loads((out / "results.json").read_text())["loss"])
    assert answers[0] == answers[1] and scores[0] == scores[1]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_four_bits_from_a_folder_in_parts(form: llava_models.Form, tmp_path: Path) -> None:
    base = llava_models.xtuner_folder(tmp_path / "base", form=form, merging=True)
    opened = open_folder(base)
    tuning = LoraTuning(method="qlora", rank=4, train=("projector",))
    model = load_quantised(opened, tuning, dtype=torch.float32, device=torch.device("cpu"))
    exact = dict(load_model(opened).named_parameters())
    packed = {name for name, one in model.named_modules() if type(one).__name__ == "Linear4bit"}
    assert packed == {
        name.removesuffix(".weight")
        for name in exact
        if ".language_model.layers." in name and name.endswith("_proj.weight")
    }
    for name, one in model.named_parameters():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(one, exact[name]), name
    rows = write_rows(tmp_path / "rows", num=4, text_only=1)
    section = {"method": "qlora", "rank": 4, "train": ["projector"]}
    result = train(make_config(tmp_path / "run", base, rows, tuning=section, train=STEPS))
    exported = export(result.run_dir, tmp_path / "out")
    assert exported.layout == "xtuner" and all(one.holds for one in exported.comparisons) and exported.counts["merged"]
