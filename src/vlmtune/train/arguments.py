"""RunConfig -> TrainingArguments, DeepSpeed and FSDP2 settings: the only file that knows them."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from vlmtune import compat
from vlmtune.config.schema import RunConfig, TrainConfig
from vlmtune.errors import ConfigError, UsageError

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]

# Devices on which accelerate really shards; elsewhere it would train plain DDP without a word.
SHARDING_DEVICES: frozenset[str] = frozenset({"cuda", "xpu", "npu"})

# Names of TrainingArguments that have no effect here, because vlmtune does that part of the loop itself.
REPLACED = {
    "label_smoothing_factor": "the loss is computed over trained tokens only",
    "num_train_epochs": "set train.epochs",
    "auto_find_batch_size": "batches are planned before the start",
    "load_best_model_at_end": "the best checkpoint is kept and named in best.json",
    "metric_for_best_model": "the best checkpoint is the one with the smallest eval loss",
    "greater_is_better": "the best checkpoint is the one with the smallest eval loss",
    "logging_steps": "set train.log_every",
    "logging_first_step": "set train.log_every",
    "eval_steps": "set train.eval_every",
    "eval_delay": "set train.eval_every",
    "eval_on_start": "run `vlmtune eval` on the model folder",
    "per_device_eval_batch_size": "evaluation uses the micro batches of training",
    "save_steps": "set train.save_every",
    "save_total_limit": "set train.keep_checkpoints",
    "save_only_model": "a checkpoint holds everything needed to resume",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM save by themselves",
    "resume_from_checkpoint": "the same command started again resumes",
    "gradient_checkpointing": "set train.activation_checkpointing",
    "fp16": "set train.precision",
    "data_seed": "set train.seed",
    "push_to_hub": "export first, then upload the folder",
}


def resolve_precision(train: TrainConfig) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 where the GPU has it, and float32 on a CPU."""
    if train.precision != "auto":
        return train.precision
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def resolve_strategy(train: TrainConfig, world: int) -> Strategy:
    """The strategy for `world` processes.

    Raises:
        ConfigError: a strategy that this number of processes, this device or this installation cannot run.
    """
    strategy: Strategy = train.strategy or ("single" if world == 1 else "ddp")
    where = "train.strategy"
    if strategy == "single" and world > 1:
        raise ConfigError(
            f"single, but {world} processes were started", where=where, remedy="Leave it out, or set ddp."
        )
    if strategy != "single" and world == 1:
        raise ConfigError(
            f"{strategy} needs several processes, and there is one",
            where=where,
            remedy="Set NPROC_PER_NODE=2 (or more) before the command, or leave the strategy out.",
        )
    device = _device()
    if strategy == "fsdp2" and device not in SHARDING_DEVICES:
        raise ConfigError(
            f"fsdp2 on a {device.upper()}: it would not shard anything and silently train ddp",
            where=where,
            remedy="Use ddp or zero2 here.",
        )
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{strategy} needs DeepSpeed", where=where, remedy='Run: pip install "vlmtune[deepspeed]".')
    return strategy


def _device() -> str:
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else "cpu"


def expected_type(strategy: Strategy) -> set[DistributedType]:
    """What accelerate must have made of the strategy; `run` asserts it, so that nothing else trains in its place."""
    if strategy.startswith("zero"):
        return {DistributedType.DEEPSPEED}
    if strategy == "fsdp2":
        return {DistributedType.FSDP}
    if strategy == "ddp":
        return {kind for kind in DistributedType if kind.value.startswith("MULTI_")}
    return {DistributedType.NO}


def needs_stand_in(config: RunConfig, strategy: Strategy) -> bool:
    """Whether a micro batch without pictures must run the tower on a stand-in picture.

    Several processes must call a trained or sharded tower equally often, or they wait for each other for ever.
    """
    tuning = config.tuning
    named: set[str] = set(tuning.train) | (set(tuning.targets) if tuning.method != "full" else set())
    trained = named & {"vision", "projector"} or named - {"language", "head"}  # a suffix may hit the tower
    return strategy != "single" and bool(trained or strategy in ("zero3", "fsdp2"))


def build(
    config: RunConfig, *, run_dir: Path, num_steps: int, accumulation: int, strategy: Strategy
) -> TrainingArguments:
    """TrainingArguments of the run. Under ZeRO-3 the model must be loaded while the result is alive.

    Args:
        num_steps: optimizer steps of the whole plan.
        accumulation: micro batches per process and step.

    Raises:
        ConfigError: a name in `train.extra` that is unknown, or that vlmtune sets or does itself.
    """
    train = config.train
    ours = _arguments(config, run_dir, num_steps, accumulation)
    if strategy.startswith("zero"):
        _join_deepspeed()
        ours["deepspeed"] = _deepspeed(int(strategy[-1]))
    elif strategy == "fsdp2":
        ours["fsdp"] = True
        ours["fsdp_config"] = {
            "version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            "activation_checkpointing": train.activation_checkpointing,
        }
        ours["activation_checkpointing"] = False  # FSDP brings its own
    _check_extra(train.extra, ours)
    try:
        args = TrainingArguments(**ours, **train.extra)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses these arguments: {error}", where="train.extra") from error
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one GPU; Trainer would wrap the model in DataParallel
    return args


def _arguments(config: RunConfig, run_dir: Path, num_steps: int, accumulation: int) -> dict[str, Any]:
    train = config.train
    return {
        "output_dir": str(run_dir),
        "max_steps": num_steps,
        "per_device_train_batch_size": 1,  # the plan has made the micro batches already
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "accelerator_config": {"split_batches": False, "dispatch_batches": False, "even_batches": True},
        "dataloader_num_workers": config.data.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": False,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        "warmup_steps": train.warmup,  # a float below 1 is a share of the steps
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "max_grad_norm": train.max_grad_norm,
        "bf16": resolve_precision(train) == "bfloat16",
        "use_cpu": _device() == "cpu",
        "activation_checkpointing": train.activation_checkpointing,
        "seed": train.seed,
        "full_determinism": train.deterministic,
        # Logging, evaluation and saving follow `callbacks.Schedule`.
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _check_extra(extra: dict[str, Any], ours: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in extra:
        where = f"train.extra.{name}"
        if name in REPLACED:
            raise ConfigError("has no effect in vlmtune", where=where, remedy=f"{_sentence(REPLACED[name])}.")
        if name in ours:
            raise ConfigError("is set by vlmtune itself", where=where, remedy="Use vlmtune's own key, or leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                "transformers.TrainingArguments has no such argument",
                where=where,
                remedy=f"Did you mean {near[0]}?" if near else "",
            )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _join_deepspeed() -> None:
    """Makes DeepSpeed use the process group that exists already; ZeRO-3 asks for it while the model is loaded."""
    import deepspeed

    compat.disable_deepspeed_shm_comm()
    deepspeed.init_distributed()


def _deepspeed(stage: int) -> dict[str, Any]:
    """Settings shown to work with torch's AdamW on GPUs and, without its own compiled kernels, on a CPU."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": _device() != "cpu", "contiguous_gradients": True}
    if stage == 3:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2**31,
    }


def check_wrapper(strategy: Strategy, found: DistributedType) -> None:
    """Raises `UsageError` when accelerate made something else of the strategy than it promises."""
    if found not in expected_type(strategy):
        raise UsageError(
            f"strategy {strategy} was asked for, but accelerate set up {found.value}", where="train.strategy"
        )
