"""A whole run: what it leaves behind, and that it refuses before it starts what cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import eval_losses, losses, make_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

from vlmtune.config.schema import SourceConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.errors import ConfigError, DataError, RunFolderError
from vlmtune.models.load import open_folder
from vlmtune.train import checkpoint
from vlmtune.train.run import train


def test_full_run_leaves_a_plain_transformers_folder(tmp_path: Path, model: Path, rows: Path, eval_rows: Path) -> None:
    said: list[str] = []
    config = make_config(tmp_path, model, rows, data={"eval": {"path": str(eval_rows)}}, train={"epochs": 2})
    result = train(config, say=said.append)

    assert result.steps == 6
    assert [step for step, _ in losses(result.run_dir)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in eval_losses(result.run_dir)] == [3, 6]  # once an epoch
    assert result.eval_loss == min(loss for _, loss in eval_losses(result.run_dir))
    best = json.loads((result.run_dir / "best.json").read_text())
    assert result.best == result.run_dir / best["checkpoint"]
    assert checkpoint.is_whole(result.best)
    text = "\n".join(said)
    assert "learning rate" in text and "global batch size" in text and str(result.best) in text
    assert f"12 rows prepared now, in {tmp_path / '.prepared'}." in text

    kept = {path.name for path in result.best.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    } < kept
    assert {"generation_config.json", "run.yaml", "provenance.json", "manifest.json", "optimizer.pt"} < kept
    assert not [name for name in kept if name.endswith(".bin")]


def test_checkpoint_loads_in_a_process_without_vlmtune(tmp_path: Path, model: Path, rows: Path) -> None:
    result = train(make_config(tmp_path, model, rows))
    assert load_file(result.best / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    script = (
        "import sys, transformers; from transformers import AutoModelForImageTextToText, AutoTokenizer\n"
        "model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys'], info\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1]).chat_template\n"
        "assert 'vlmtune' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(result.best)], check=True, timeout=120)


def test_checkpoint_keeps_the_config_of_its_base(tmp_path: Path, model: Path, rows: Path) -> None:
    result = train(make_config(tmp_path, model, rows))
    base, ours = (json.loads((folder / "config.json").read_text()) for folder in (model, result.best))
    for config in (base, ours):
        for part in ("text_config", "vision_config"):
            config[part].pop("dtype", None)  # `save_pretrained` repeats it there
    assert ours == base  # use_cache above all, which Trainer would switch off for good


def test_tensorboard_has_the_curves(tmp_path: Path, model: Path, rows: Path, eval_rows: Path) -> None:
    rates = {"vision": 1e-4, "projector": 5e-4}
    result = train(
        make_config(tmp_path, model, rows, data={"eval": {"path": str(eval_rows)}}, tuning={"learning_rates": rates})
    )
    events = EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"loss/train", "loss/eval", "train/grad_norm", "train/tokens_per_second", "train/trained_share"}
    assert expected | {"train/epoch"} <= tags
    first = {name: events.Scalars(f"learning_rate/{name}")[0].value for name in ("vision", "projector", "language")}
    assert first == pytest.approx({**rates, "language": 1e-3})


def test_lora_saves_the_adapter_only(tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path) -> None:
    model = tiny_folder("llava")
    tuning = {"method": "lora", "rank": 4, "targets": ["language", "head"], "train": ["projector"]}
    result = train(make_config(tmp_path, model, rows, tuning=tuning))
    saved = load_file(result.best / "adapter_model.safetensors")
    assert all(".lora_" in name or ".multi_modal_projector." in name for name in saved)
    assert any(name.endswith("lm_head.lora_A.weight") for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert not (result.best / "config.json").exists()
    assert json.loads((result.best / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [
        ("internvl", {"method": "full"}),
        ("llava", {"method": "dora", "rank": 2, "targets": ["language", "vision"]}),
        # The projector of Qwen-VL lies inside the tower; both are trained beside the adapter.
        ("qwen2_5_vl", {"method": "lora", "rank": 2, "train": ["vision", "projector"]}),
        ("qwen3_vl", {"method": "rslora", "rank": 2, "targets": ["q_proj", "head"], "train": ["projector"]}),
    ],
)
def test_checkpoint_alone_gives_the_eval_loss_of_the_run(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, eval_rows: Path, kind: str, tuning: dict[str, Any]
) -> None:
    """Loaded by transformers and PEFT as they are, and the loss computed row by row with the model's own `labels=`."""
    base = tiny_folder(kind)
    result = train(make_config(tmp_path, base, rows, data={"eval": {"path": str(eval_rows)}}, tuning=tuning))
    if tuning["method"] == "full":
        model = AutoModelForImageTextToText.from_pretrained(result.best, dtype=torch.float32)
    else:
        bare = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(bare, result.best)
    opened = open_folder(base)
    corpus = open_corpus((SourceConfig(path=str(eval_rows)),), allow=())
    total, tokens = 0.0, 0
    for i in range(len(corpus)):
        sample = encode(corpus.sample(i), opened)
        inputs = dict(collate([[sample]], opened, stand_in=False).inputs)
        del inputs["logits_to_keep"]
        labels = torch.from_numpy(sample.labels.astype("int64"))[None]
        with torch.no_grad():
            mean = float(model.eval()(**inputs, labels=labels).loss)
        total, tokens = total + mean * sample.num_trained, tokens + sample.num_trained
    assert result.eval_loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("tuning", [{"method": "full"}, {"method": "lora", "rank": 4}])
def test_bfloat16_keeps_what_trains_in_float32(tmp_path: Path, model: Path, rows: Path, tuning: dict[str, Any]) -> None:
    exact = train(make_config(tmp_path / "a", model, rows, tuning=tuning))
    half = train(make_config(tmp_path / "b", model, rows, tuning=tuning, train={"precision": "bfloat16"}))
    assert losses(exact.run_dir) != losses(half.run_dir)
    for (_, one), (_, other) in zip(losses(exact.run_dir), losses(half.run_dir), strict=True):
        assert one == pytest.approx(other, rel=2e-2)
    (file,) = half.best.glob("*model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("component", ["vision", "projector", "language"])
def test_full_changes_its_component_only(tmp_path: Path, model: Path, rows: Path, component: str) -> None:
    result = train(make_config(tmp_path, model, rows, tuning={"train": [component]}))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, result.best))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    words = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}
    assert changed and all(
        words[component] in name or (component, name) == ("language", "lm_head.weight") for name in changed
    )


def test_nothing_is_printed_without_a_reader(
    tmp_path: Path, model: Path, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(make_config(tmp_path, model, rows))
    assert capfd.readouterr().out == ""


def test_head_that_is_tied_is_refused(tmp_path: Path, model: Path, rows: Path) -> None:
    with pytest.raises(ConfigError, match="Leave out `head`"):
        train(make_config(tmp_path, model, rows, tuning={"method": "lora", "targets": ["language", "head"]}))


def test_a_second_run_trains_on_the_rows_that_were_prepared_for_the_first(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(make_config(tmp_path, model, rows, train={"max_steps": 2}))

    def lay_again(*args: object, **options: object) -> None:
        raise AssertionError("a prepared row was laid down again")

    monkeypatch.setattr("vlmtune.data.encode._draft", lay_again)
    said: list[str] = []
    again = {"max_steps": 2, "output_dir": str(tmp_path / "again")}
    second = train(make_config(tmp_path, model, rows, train=again), say=said.append)
    assert said[0] == f"12 rows were prepared before, in {tmp_path / '.prepared'}."
    assert losses(second.run_dir) == losses(first.run_dir)


def test_finished_run_says_so(tmp_path: Path, model: Path, rows: Path) -> None:
    config = make_config(tmp_path, model, rows)
    first = train(config)
    said: list[str] = []
    second = train(config, say=said.append)
    assert second.already_finished and second.best == first.best
    assert "finished" in said[0]


def test_folder_of_another_run_is_refused_by_its_keys(tmp_path: Path, model: Path, rows: Path) -> None:
    train(make_config(tmp_path, model, rows))
    with pytest.raises(RunFolderError, match=r"train.learning_rate \(there 0.001, here 0.002\)") as caught:
        train(make_config(tmp_path, model, rows, train={"learning_rate": 2e-3, "log_every": 7}))
    assert "log_every" not in str(caught.value) and caught.value.exit_code == 2


def test_changed_rows_are_refused(tmp_path: Path, model: Path, rows: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_text(rows.read_text())
    config = make_config(tmp_path, model, mine, data={"sources": {"path": str(mine), "root": str(rows.parent)}})
    result = train(config)
    (result.run_dir / "finished.json").unlink()
    mine.write_text(rows.read_text().replace("seven", "eight"))
    with pytest.raises(RunFolderError, match=r"rows \(changed\)"):
        train(config)


def test_bad_rows_are_refused_before_the_start(tmp_path: Path, model: Path, rows: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_text(rows.read_text().replace("rows.jsonl-3.png", "gone.png").replace("rows.jsonl-5.png", "lost.png"))
    config = make_config(tmp_path, model, mine, data={"sources": {"path": str(mine), "root": str(rows.parent)}})
    with pytest.raises(DataError, match=r"rows.jsonl:4: .*1 more row"):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adam_epsilonn": 1e-6}, "Did you mean adam_epsilon"),
        ({"learning_rate": 1.0}, "set by vlmtune itself"),
        ({"label_smoothing_factor": 0.1}, "no effect"),
        ({"optim": "no_such_optimizer"}, "transformers refuses"),
    ],
)
def test_extra_arguments_are_checked(
    tmp_path: Path, model: Path, rows: Path, extra: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(make_config(tmp_path, model, rows, train={"extra": extra}))


def test_extra_arguments_arrive(tmp_path: Path, model: Path, rows: Path) -> None:
    plain = train(make_config(tmp_path / "a", model, rows))
    other = train(make_config(tmp_path / "b", model, rows, train={"extra": {"adam_epsilon": 1.0}}))
    assert losses(plain.run_dir)[0] == losses(other.run_dir)[0]
    assert losses(plain.run_dir)[2] != losses(other.run_dir)[2]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_strategies_of_several_processes_are_refused_for_one(
    tmp_path: Path, model: Path, rows: Path, strategy: str
) -> None:
    with pytest.raises(ConfigError, match="NPROC_PER_NODE"):
        train(make_config(tmp_path, model, rows, train={"strategy": strategy}))


def test_bad_rows_are_left_out_where_the_config_says_so(tmp_path: Path, model: Path, rows: Path) -> None:
    lines = rows.read_text().splitlines()
    mixed = rows.with_name("mixed.jsonl")
    mixed.write_text("\n".join([*lines[:2], '{"broken": ', *lines[2:]]))
    refused = make_config(tmp_path, model, mixed)
    with pytest.raises(DataError, match=r"^mixed\.jsonl:3: broken JSON"):
        train(refused)
    said: list[str] = []
    dropping = {"bad_rows": "drop", "max_bad_share": 0.2}
    result = train(make_config(tmp_path, model, mixed, data=dropping), say=said.append)
    listed = result.run_dir / "bad_rows.jsonl"
    assert f"1 bad row is left out (data.bad_rows: drop), listed in {listed}." in said
    (entry,) = [json.loads(line) for line in listed.read_text().splitlines()]
    assert (entry["origin"], entry["kind"], entry["in"]) == ("mixed.jsonl:3", "row", "data.sources")
    assert "The row breaks off: complete it" in entry["reason"]
    plain = train(make_config(tmp_path / "plain", model, rows))
    assert len(losses(result.run_dir)) == len(losses(plain.run_dir)) and not (plain.run_dir / "bad_rows.jsonl").exists()
