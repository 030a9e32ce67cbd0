"""The first-step proof, through real runs: it passes where training works and names what is cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import losses, make_config, write_rows

from vlmtune.errors import ProofError, TrainingError
from vlmtune.train import run
from vlmtune.train.run import train
from vlmtune.train.trainer import VlmTrainer


def _sabotaged(monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[Any], None]) -> None:
    class Trainer(VlmTrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            sabotage(model)
            super().__init__(model, *args, **kwargs)

    monkeypatch.setattr(run, "VlmTrainer", Trainer)


def _cut_projector(model: Any) -> None:
    """The projector's output no longer leads back to its weights."""
    model.get_submodule("model.multi_modal_projector").register_forward_hook(lambda module, args, out: out.detach())


def test_cut_off_projector_is_named(tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sabotaged(monkeypatch, _cut_projector)
    with pytest.raises(ProofError, match="gradient of zero") as caught:
        train(make_config(tmp_path, model, rows))
    assert "multi_modal_projector.linear_1.weight" in str(caught.value)
    assert "language_model" not in str(caught.value)  # what trains is not named
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_proof_can_be_switched_off(tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sabotaged(monkeypatch, _cut_projector)
    config = make_config(tmp_path, model, rows, train={"first_step_proof": False})
    assert train(config).best.is_dir()


def test_gradient_that_is_not_finite_is_named(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: Any) -> None:
        parameter = dict(model.named_parameters())["model.multi_modal_projector.linear_1.bias"]
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    _sabotaged(monkeypatch, poison)
    with pytest.raises(ProofError, match=r"not finite, in 1 tensor: .*linear_1\.bias"):
        train(make_config(tmp_path, model, rows))


def test_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later steps too: no checkpoint is written of a model that has come to nothing."""

    class Trainer(VlmTrainer):
        def _summed_loss(self, model: Any, batch: Any) -> torch.Tensor:
            loss = super()._summed_loss(model, batch)
            return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(run, "VlmTrainer", Trainer)
    with pytest.raises(TrainingError, match="step 2: the loss is not a finite number"):
        train(make_config(tmp_path, model, rows, train={"log_every": 100, "save_every": 2}))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def _forget(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def test_lora_a_is_demanded_once_b_has_moved(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B is frozen at zero after the start, so A never gets a gradient: lawful in step 1, an error in step 2."""

    def hold(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layers.0.self_attn.q_proj" in name:
                parameter.register_post_accumulate_grad_hook(_forget)

    _sabotaged(monkeypatch, hold)
    config = make_config(tmp_path, model, rows, tuning={"method": "lora", "rank": 2}, train={"epochs": 2})
    with pytest.raises(ProofError, match=r"1 tensor that .*layers\.0\.self_attn\.q_proj\.lora_A"):
        train(config)
    assert [step for step, _ in losses(tmp_path / "run")] == [1]


def test_warm_up_does_not_count_as_a_move(tmp_path: Path, model: Path, rows: Path) -> None:
    """With warm-up the first step has rate 0: B is still zero in the second, and A's gradient lawfully so."""
    tuning = {"method": "lora", "rank": 2}
    result = train(make_config(tmp_path, model, rows, tuning=tuning, train={"epochs": 2, "warmup": 0.5}))
    assert result.steps == 6


def test_a_run_too_short_for_lora_says_so(tmp_path: Path, model: Path, rows: Path) -> None:
    said: list[str] = []
    tuning = {"method": "lora", "rank": 2, "targets": ["language", "vision"]}
    train(make_config(tmp_path, model, rows, tuning=tuning, train={"max_steps": 1}), say=said.append)
    assert "of language could not be proven: the run was too short" in said[-1]
    assert "of vision could not be proven: the run was too short" in said[-1]
    assert said[-1].startswith("Done: 1 step.\n")


def test_tower_is_demanded_at_the_first_step_with_a_picture(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sabotaged(monkeypatch, _cut_projector)
    text = write_rows(tmp_path / "text", num=4, text_only=4)
    said: list[str] = []
    train(make_config(tmp_path / "a", model, text), say=said.append)
    for component in ("projector", "vision"):
        assert f"of {component} could not be proven: it needs a row with a picture" in said[-1]

    (tmp_path / "both").mkdir()
    pictures = write_rows(tmp_path / "pictures", num=4)
    sources = [{"path": str(text)}, {"path": str(pictures)}]
    config = make_config(tmp_path / "b", model, text, data={"sources": sources}, train={"global_batch_size": 1})
    with pytest.raises(ProofError, match="multi_modal_projector"):
        train(config)


@pytest.mark.parametrize("kind", ["internvl", "llava", "llava-merged", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "full"},
        {"method": "dora", "rank": 2, "targets": ["language", "vision", "projector"]},
        {"method": "lora", "rank": 2, "targets": ["language"], "train": ["vision", "projector"]},
    ],
    ids=["full", "dora", "lora+train"],
)
def test_every_family_is_proven_with_every_method(
    tmp_path: Path, tiny_folder: Callable[[str], Path], rows: Path, kind: str, tuning: dict[str, Any]
) -> None:
    """Nothing is excused that trains: after two steps no tensor is pending."""
    said: list[str] = []
    result = train(
        make_config(tmp_path, tiny_folder(kind), rows, tuning=tuning, train={"max_steps": 2}), say=said.append
    )
    assert "could not be proven" not in "".join(said)
    assert json.loads((result.run_dir / "finished.json").read_text())["steps"] == 2


DROP_PATH: dict[str, Any] = {"train": ["vision"], "drop_path": 0.8}


def test_branches_that_drop_path_left_out_are_demanded_later(tmp_path: Path, model: Path) -> None:
    """One tile a step: most steps drop a branch of the last layer, which then has no gradient at all."""
    rows = write_rows(tmp_path / "rows", num=24)
    data = {"sources": {"path": str(rows), "image": {"max_tiles": 1}}}
    said: list[str] = []
    for name, steps in (("short", 1), ("long", 24)):
        section = {"global_batch_size": 1, "max_steps": steps}
        train(make_config(tmp_path / name, model, rows, tuning=DROP_PATH, train=section, data=data), say=said.append)
        left_out = "of vision could not be proven: drop path left it out in every step so far" in said[-1]
        assert left_out == (name == "short"), said[-1]


def test_drop_path_excuses_nothing_for_ever(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that never trains is named once chance explains it no longer: at 0.1, in the tenth step."""

    def cut(model: Any) -> None:
        layer = model.get_submodule("model.vision_tower.encoder.layer.1.mlp")
        layer.register_forward_hook(lambda module, args, out: out.detach())

    _sabotaged(monkeypatch, cut)
    rows = write_rows(tmp_path / "rows", num=24)
    section = {"global_batch_size": 1, "max_steps": 24, "save_every": 1}
    tuning = {"train": ["vision"], "drop_path": 0.1}
    with pytest.raises(ProofError, match=r"layer\.1\.mlp\.fc1\.weight") as caught:
        train(make_config(tmp_path, model, rows, tuning=tuning, train=section))
    assert "layer.0" not in str(caught.value) and "attention" not in str(caught.value)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 10))
