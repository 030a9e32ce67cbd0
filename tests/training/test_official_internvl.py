"""Official InternVL folders (random weights, each decoder) through the runs of the pipelines that vlmtune replaces.

Packing, accumulation and stand-ins on official bases stand with those of other models in test_equivalence.py.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import start
from official_models import DECODERS
from runs import eval_losses, losses, make_config, write_rows, write_yaml
from safetensors.torch import load_file

from vlmtune.config.load import load_config
from vlmtune.export import verify
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.train.run import TrainResult, train

EXAMPLES = Path(__file__).parents[2] / "examples"
OFFICIAL_PARTS = {"vision": "vision_model.", "projector": "mlp1.", "language": "language_model."}
# What the official code adapts (wrap_backbone_lora, wrap_llm_lora), and the head, which XTuner adds.
ADAPTED = {
    "vision": r"vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight",
    "language": r"language_model\.model\.layers\.\d+\."
    r"(attention\.(wqkv|wo)|feed_forward\.w[123]|self_attn\.\w+_proj|mlp\.\w+_proj)\.weight",
    "head": r"language_model\.(output|lm_head)\.weight",
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "language": {"method": "lora", "rank": 8, "dropout": 0.05},
    "vision": {"method": "lora", "rank": 8, "targets": ["vision"]},
    "both": {"method": "lora", "rank": 8, "ranks": {"vision": 4}, "targets": ["language", "vision"], "drop_path": 0.2},
    "xtuner": {"method": "lora", "rank": 8, "alpha": 16, "targets": ["language", "head"], "train": ["projector"]},
    "qlora": {"method": "qlora", "rank": 8, "targets": ["language", "vision"], "train": ["projector"]},
}


def _train(folder: Path, model: Path, rows: Path, **sections: Any) -> TrainResult:
    data = {"max_length": 1024, **sections.pop("data", {})}
    return train(make_config(folder, model, rows, data=data, **sections))


def _changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ between two folders of the same names."""
    one, other = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def _trained(tuning: dict[str, Any], names: Iterable[str]) -> set[str]:
    """The official tensors that this tuning changes."""
    if tuning["method"] == "full":
        return set(names)
    adapted = "|".join(ADAPTED[target] for target in tuning.get("targets", ["language"]))
    in_full = tuple(OFFICIAL_PARTS[part] for part in tuning.get("train", []))
    return {name for name in names if re.fullmatch(adapted, name) or name.startswith(in_full)}


@pytest.mark.parametrize(
    ("decoder", "tuning"),
    [
        *((decoder, "full") for decoder in DECODERS),
        *((decoder, "qlora") for decoder in ("internlm2", "phi3")),  # the decoders whose layers are fused on disk
        ("qwen2", "language"),
        ("internlm2", "vision"),
        ("internlm2", "xtuner"),
        ("phi3", "both"),
    ],
)
def test_official_in_official_out(
    tmp_path: Path, official: Callable[[str], Path], rows: Path, decoder: str, tuning: str
) -> None:
    """The loss falls; the export has the official names, differs where it was trained only, and gives equal logits."""
    rate = 3e-3 if tuning == "full" else 3e-2
    enough = 0.5 if tuning == "vision" else 1.0  # what a picture of noise tells about its answer is soon learnt
    section = {"epochs": 6, "learning_rate": rate, "schedule": "constant"}
    result = _train(tmp_path, official(decoder), rows, tuning=TUNINGS[tuning], train=section)
    found = [loss for _, loss in losses(result.run_dir)]
    assert sum(found[-3:]) < sum(found[:3]) - enough, found

    out = export(result.run_dir, tmp_path / "out", layout="official", device="cpu").out
    assert _changed(official(decoder), out) == _trained(TUNINGS[tuning], load_file(out / "model.safetensors"))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["InternVLChatModel"]
    prompts = verify.fixed_prompts()
    before, after = load(result.run_dir, device="cpu"), load(out, device="cpu")
    for one, other in zip(before.logits(prompts), after.logits(prompts), strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)


@pytest.mark.parametrize("component", sorted(OFFICIAL_PARTS))
def test_each_part_is_frozen_by_itself(
    tmp_path: Path, official: Callable[[str], Path], rows: Path, component: str
) -> None:
    result = _train(tmp_path, official("internlm2"), rows, tuning={"train": [component]})
    out = export(result.run_dir, tmp_path / "out", layout="official", verify="none").out
    changed = _changed(official("internlm2"), out)
    everything = {n for n in load_file(out / "model.safetensors") if n.startswith(OFFICIAL_PARTS[component])}
    assert changed == everything


def test_a_killed_run_with_drop_path_goes_on_as_if_nothing_had_been(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    """Which tiles skip a branch is drawn from the random state that a checkpoint holds."""
    tuning = {**TUNINGS["both"], "dropout": 0.1, "drop_path": 0.5}
    section = {"epochs": 2, "save_every": 1, "activation_checkpointing": True}
    sections = {"tuning": tuning, "train": section, "data": {"max_length": 1024}}
    step = random.SystemRandom().randint(2, 6)
    runs = []
    for name, at in (("whole", 0), ("broken", step)):
        yaml = write_yaml(tmp_path / name, official("internlm2"), rows, sections)
        if at:
            assert start(yaml, at, int(signal.SIGKILL)).returncode == -signal.SIGKILL
        ended = start(yaml)
        assert ended.returncode == 0, ended.stderr
        runs.append(tmp_path / name / "run")
    assert losses(runs[0]) == losses(runs[1]), f"killed at step {step}"
    first, second = (load_file(run / "checkpoint-6" / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first), f"killed at step {step}"
    plain = {**sections, "tuning": {**tuning, "drop_path": 0.0}}
    without = train(load_config(write_yaml(tmp_path / "without", official("internlm2"), rows, plain)))
    assert losses(without.run_dir) != losses(runs[0])


def test_checkpointing_changes_nothing_where_branches_are_dropped(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    found = []
    for checkpointing in (False, True):
        tuning = {"method": "full", "drop_path": 0.5}
        section = {"activation_checkpointing": checkpointing, "extra": {"adam_epsilon": 1e-3}}
        result = _train(tmp_path / str(checkpointing), official("qwen2"), rows, tuning=tuning, train=section)
        found.append([loss for _, loss in losses(result.run_dir)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def _meta(folder: Path, rows: Path, repeat: int) -> Path:
    """A meta file of InternVL's scripts for one set of rows."""
    entry = {
        "root": str(rows.parent),
        "annotation": str(rows),
        "data_augment": False,
        "repeat_time": repeat,
        "length": 12,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rows.stem}.json").write_text(json.dumps({"ui-dataset": entry}))
    return folder / f"{rows.stem}.json"


def test_the_ui_agents_example_evaluates_stops_and_keeps_the_best(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    """The example as it is but for paths and size, and a drop that no evaluation after the first can make."""
    held_out = write_rows(tmp_path / "held_out", num=12, seed=2, name="held_out.jsonl")
    config = load_config(
        EXAMPLES / "internvl_ui_agent.yaml",
        [
            f"model.path={official('qwen2')}",
            f"data.sources.path={_meta(tmp_path, rows, 2)}",
            f"data.eval.path={_meta(tmp_path, held_out, 1)}",
            f"train.output_dir={tmp_path / 'run'}",
            "data.workers=0",
            "train.precision=float32",
            "train.global_batch_size=8",
            "train.learning_rate=1e-2",
            "train.early_stopping.min_delta=10",
        ],
    )
    result = train(config)
    evaluated = eval_losses(result.run_dir)
    assert [step for step, _ in evaluated] == [3, 6, 9, 12]  # 24 rows ÷ 8 an epoch; patience 3 after the first
    assert result.stopped_early and result.steps == 12
    best = min(evaluated, key=lambda pair: pair[1])
    assert result.best.name == f"checkpoint-{best[0]}" and result.eval_loss == best[1]
    assert evaluated[-1][1] < evaluated[0][1]


def test_xtuners_example_repeats_rows_one_and_a_half_times(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    """XTuner's three lists, and a fraction that it loses."""
    lists = json.dumps({"data_paths": [str(rows)], "image_folders": [str(rows.parent)], "repeat_times": [1.5]})
    config = load_config(
        EXAMPLES / "internvl_lora.yaml",
        [
            f"model.path={official('phi3')}",
            f"data.sources={lists}",
            f"train.output_dir={tmp_path / 'run'}",
            "data.workers=0",
            "train.global_batch_size=6",
            "train.precision=float32",
        ],
    )
    result = train(config)
    assert result.steps == 3  # 12 rows × 1.5 ÷ 6
    adapter = json.loads((result.best / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (128, 256, 0.05)
    kept = load_file(result.best / "adapter_model.safetensors")
    assert any(".multi_modal_projector." in name for name in kept)
