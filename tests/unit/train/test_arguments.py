from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.utils import DistributedType

from vlmtune.config.schema import DataConfig, FullTuning, LoraTuning, ModelConfig, RunConfig, SourceConfig, TrainConfig
from vlmtune.errors import ConfigError, UsageError
from vlmtune.train import arguments


def _config(tuning: FullTuning | LoraTuning | None = None, **train: object) -> RunConfig:
    data = DataConfig(sources=(SourceConfig(path="/rows.jsonl"),))
    return RunConfig(
        model=ModelConfig(path="/model"),
        data=data,
        tuning=tuning or FullTuning(),
        train=TrainConfig(**train),  # type: ignore[arg-type]
    )


def test_every_option_of_the_optimisation_arrives(tmp_path: Path) -> None:
    config = _config(
        learning_rate=3e-4, schedule="constant", warmup=0.1, weight_decay=0.05, betas=(0.8, 0.9), max_grad_norm=0.5,
        precision="bfloat16", activation_checkpointing=True, seed=7, deterministic=False, extra={"adam_epsilon": 1e-7},
    )  # fmt: skip
    args = arguments.build(config, run_dir=tmp_path, num_steps=50, accumulation=4, strategy="single")
    assert (args.max_steps, args.gradient_accumulation_steps, args.per_device_train_batch_size) == (50, 4, 1)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (3e-4, 0.05, 0.8, 0.9)
    assert (args.max_grad_norm, args.bf16, args.activation_checkpointing, args.seed) == (0.5, True, True, 7)
    assert args.adam_epsilon == 1e-7 and args.get_warmup_steps(50) == 5
    assert args.lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize("strategy", ["fsdp2"])
def test_sharding_on_a_cpu_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match="fsdp2 on a CPU") as caught:
        arguments.resolve_strategy(TrainConfig(strategy=strategy), world=2)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_default_strategy_follows_the_number_of_processes() -> None:
    assert arguments.resolve_strategy(TrainConfig(), world=1) == "single"
    assert arguments.resolve_strategy(TrainConfig(), world=2) == "ddp"
    with pytest.raises(ConfigError, match="2 processes were started"):
        arguments.resolve_strategy(TrainConfig(strategy="single"), world=2)


def test_wrapper_that_is_not_what_was_asked_for_is_an_error() -> None:
    arguments.check_wrapper("ddp", DistributedType.MULTI_CPU)
    with pytest.raises(UsageError, match="strategy fsdp2 was asked for, but accelerate set up MULTI_CPU"):
        arguments.check_wrapper("fsdp2", DistributedType.MULTI_CPU)


@pytest.mark.parametrize(
    ("tuning", "strategy", "needed"),
    [
        (FullTuning(), "single", False),
        (FullTuning(), "ddp", True),
        (FullTuning(train=("language",)), "ddp", False),
        (FullTuning(train=("language",)), "zero3", True),
        (FullTuning(train=("projector",)), "zero2", True),
        (LoraTuning(), "ddp", False),
        (LoraTuning(targets=("language", "head")), "ddp", False),
        (LoraTuning(targets=("q_proj",)), "ddp", True),  # may hit the tower
        (LoraTuning(train=("projector",)), "ddp", True),
        (LoraTuning(targets=("vision",)), "fsdp2", True),
    ],
)
def test_stand_in_is_needed(tuning: FullTuning | LoraTuning, strategy: str, needed: bool) -> None:
    assert arguments.needs_stand_in(_config(tuning), strategy) is needed  # type: ignore[arg-type]
