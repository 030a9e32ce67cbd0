"""One rank that writes DeepSpeed checkpoints: `zero_entry.py CASES.json`, started by `launch.start`.

CASES.json maps the name of a checkpoint to {"stage", "bf16", "exclude_frozen"}. Each is trained for two steps and saved
by DeepSpeed itself; beside it lies what DeepSpeed says that the float32 weights are (`NAME.safetensors`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from vlmtune import compat


class Model(torch.nn.Module):
    """Odd sizes (every vector needs padding), frozen parameters, a buffer and a tied head, under a trainer's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.frozen = torch.nn.Linear(5, 7)
        self.frozen.requires_grad_(False)
        self.middle = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([1.5, 0.25]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(torch.tanh(self.frozen(self.embed(ids) * self.scale[0])))
        return torch.nn.functional.cross_entropy(self.head(self.norm(hidden)).float(), ids.flip(0))


class Wrapped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)


def settings(stage: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "sub_group_size": 40},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def expected(engine: Any) -> dict[str, torch.Tensor]:
    """Trained weights in float32, frozen ones and buffers as they are; gathered by DeepSpeed."""
    found = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            found[name] = (parameter.detach() if whole is None else whole).clone()  # None: there is no ZeRO
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
    return found | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


def main() -> None:
    torch.set_num_threads(1)
    compat.disable_deepspeed_shm_comm()
    deepspeed.init_distributed("gloo")
    file = Path(sys.argv[1])
    for name, case in json.loads(file.read_text()).items():
        torch.manual_seed(0)
        model = Wrapped()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=settings(case["stage"], case["bf16"])
        )
        for step in range(2):
            torch.manual_seed(step + 10 * torch.distributed.get_rank())
            engine.backward(engine(torch.randint(0, 11, (6,))))
            engine.step()
        engine.save_checkpoint(
            str(file.parent), tag=name, client_state={"meta": {"cfg": "llm_lora = dict(r=4, lora_alpha=8)"}},
            exclude_frozen_parameters=case["exclude_frozen"],
        )  # fmt: skip
        weights = expected(engine)
        if torch.distributed.get_rank() == 0:
            save_file(weights, file.parent / f"{name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
