"""One rank of a distributed test: `entry.py CASES.json`, started by `launch.start`.

CASES.json lists runs: {"config": run.yaml, "wrapper": what the model must be wrapped in, "stop_at": a step or 0}. They
are trained one after the other in one process group, since a start costs ten times as much as a tiny run. At `stop_at`
the last rank gets a SIGTERM; all ranks must stop together, and the run then goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from vlmtune import compat


def shard_on_cpu() -> None:
    """Lets accelerate apply FSDP on a CPU; without this it silently trains DDP, which is why the product refuses."""
    original = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def watch_conversions() -> None:
    """Under ZeRO-3 `compat.forget_unused_conversions` must find something to forget, else the defect is gone."""
    original = compat.forget_unused_conversions

    def checked(model: Any) -> None:
        before = len(model._weight_conversions)
        original(model)
        if is_deepspeed_zero3_enabled():
            assert len(model._weight_conversions) < before, "the defect is gone: remove forget_unused_conversions"

    compat.forget_unused_conversions = checked


def tell(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    watch_conversions()
    cases = json.loads(Path(sys.argv[1]).read_text())
    from vlmtune.config.load import load_config
    from vlmtune.errors import Interrupted
    from vlmtune.train import arguments, run
    from vlmtune.train.trainer import VlmTrainer

    if any("FSDP" in case["wrapper"] for case in cases):
        shard_on_cpu()
        arguments.SHARDING_DEVICES |= {"cpu"}
    expected, stop_at = "", 0

    class Trainer(VlmTrainer):
        def get_batch_samples(self, *args: Any) -> Any:
            if stop_at == self.state.global_step + 1 and self.accelerator.is_last_process:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().get_batch_samples(*args)

        def _prepare_for_training(self, *args: Any) -> Any:
            model, loader = super()._prepare_for_training(*args)
            wrapper = type(model).__name__
            assert wrapper.startswith(expected), f"wrapped in {wrapper}, not {expected}"
            if expected == "FSDP":
                assert self.accelerator.distributed_type == DistributedType.FSDP
                assert any(type(p).__name__ == "DTensor" for p in model.parameters())
            return model, loader

    run.VlmTrainer = Trainer  # type: ignore[misc]
    for case in cases:
        expected = case["wrapper"]
        config = load_config(Path(case["config"]))
        if stop_at := case["stop_at"]:
            unset_hf_deepspeed_config()  # of the case before
            try:
                run.train(config, say=tell)
            except Interrupted as error:
                assert error.exit_code == 143
            else:
                raise AssertionError("the signal did not stop the run")
            stop_at = 0
        unset_hf_deepspeed_config()
        run.train(config, say=tell)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
