"""Tokens per second of a training step: vlmtune against a bare PyTorch loop, and against TRL's SFTTrainer.

All in one call on the same tiny LLaVA-type model, rows and threads; the two are interleaved, and each line gives median
and range over the repetitions.

    python benchmarks/train.py                     # pairs of vlmtune and the bare loop, then TRL if it is installed
    python benchmarks/train.py --pairs 3 --steps 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made import machine, write_llava, write_pictures, write_rows
from torch.utils.data import DataLoader

import vlmtune
from vlmtune.config.schema import RunConfig
from vlmtune.data.loader import MicroBatches
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.prepared.prepare import prepare, prepared_folder
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.models.load import load_model, open_folder

ROWS_PER_STEP = 8
WARM_UP = 2  # steps at the beginning of every run that are not counted


def config_for(folder: Path, model: Path, steps: int, run: str, *, packing: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "data": {
                "sources": {"path": str(folder / "rows.jsonl"), "root": str(folder / "pictures")},
                "packing": packing,
                "max_length": 2048,
                "workers": 0,
            },
            "train": {
                "output_dir": str(folder / run),
                "epochs": 1000,
                "max_steps": steps,
                "global_batch_size": ROWS_PER_STEP,
                "micro_batch_size": ROWS_PER_STEP,
                "learning_rate": 1e-4,
                "log_every": 1,
                "first_step_proof": False,
            },
        }
    )


def speeds_of_vlmtune(config: RunConfig) -> list[float]:
    """Tokens per second of each counted step, as the run itself logs them."""
    result = vlmtune.train(config)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return speeds[WARM_UP:]


def speeds_of_bare_loop(config: RunConfig) -> list[float]:
    """The same plan, batches, model and optimizer, with nothing around them."""
    opened = open_folder(config.model.path)
    model = load_model(opened, dtype=torch.float32).train()
    corpus = open_corpus(config.data.sources)
    prepared = prepare(corpus, opened, into=prepared_folder(config), workers=0)
    packed = config.data.packing
    plan = make_plan(prepared.measured, corpus, config, world=1, packed=packed)
    data = MicroBatches(prepared.rows, opened, plan, stand_in=False, packed=packed, augment=False, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = iter(DataLoader(data, batch_size=None))
    speeds = []
    for _ in range(plan.num_steps):
        start = time.perf_counter()
        step = list(itertools.islice(batches, plan.micro_batches_per_step))
        trained = sum(len(batch.targets) for batch in step)
        for batch in step:
            logits = model(**batch.inputs).logits.reshape(-1, model.config.text_config.vocab_size)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum") / trained
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(sum(batch.num_tokens for batch in step) / (time.perf_counter() - start))
    return speeds[WARM_UP:]


def speeds_of_trl(config: RunConfig, steps: int) -> list[float]:
    """TRL's SFTTrainer on the same rows, padded (it refuses packing for pictures), with its own collator."""
    from datasets import Dataset, Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    source = config.data.sources[0]
    rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    root = Path(source.root or ".")
    table = Dataset.from_list(
        [
            {
                "images": [str(root / row["image"])],
                "messages": [
                    {"role": "user", "content": row["conversations"][0]["value"].removeprefix("<image>\n")},
                    {"role": "assistant", "content": row["conversations"][1]["value"]},
                ],
            }
            for row in rows
        ]
    ).cast_column("images", [Image()])
    processor = LlavaProcessor.from_pretrained(config.model.path)
    stamps: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    arguments = SFTConfig(
        output_dir=str(Path(str(config.train.output_dir)) / "trl"),
        per_device_train_batch_size=ROWS_PER_STEP,
        max_steps=steps,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        max_length=None,
        gradient_checkpointing=False,
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=LlavaForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32),
        args=arguments,
        train_dataset=table,
        processing_class=processor,
        callbacks=[Clock()],
    )
    trainer.train()
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(stamps)][WARM_UP - 1 :]


def line(name: str, speeds: list[float], against: float | None = None) -> str:
    low, middle, high = min(speeds), statistics.median(speeds), max(speeds)
    ratio = f"{middle / against:6.2f} ×" if against else ""
    return f"{name:<28}{middle:>10,.0f}{low:>10,.0f} … {high:<10,.0f}{ratio}"


def pairs(config: Callable[[str], RunConfig], repetitions: int) -> tuple[list[float], list[float], list[float]]:
    """Median speed of each repetition of both, and the ratio of each pair; the order changes from pair to pair."""
    toolkit, bare = [], []
    for number in range(repetitions):
        first_toolkit = number % 2 == 0
        for is_toolkit in (first_toolkit, not first_toolkit):
            if is_toolkit:
                toolkit.append(statistics.median(speeds_of_vlmtune(config(f"run{number}"))))
            else:
                bare.append(statistics.median(speeds_of_bare_loop(config(f"run{number}"))))
        print(f"  pair {number + 1}: {toolkit[-1] / bare[-1]:.3f}", file=sys.stderr)
    return toolkit, bare, [a / b for a, b in zip(toolkit, bare, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_llava(folder / "model", hidden_size=options.hidden, layers=options.layers)
        write_rows(folder / "rows.jsonl", 400, write_pictures(folder / "pictures", 50, (320, 240)))
        print(machine())

        def config(run: str) -> RunConfig:
            return config_for(folder, model, options.steps, run, packing=True)

        toolkit, bare, ratios = pairs(config, options.pairs)
        print(f"{'tokens/s':<28}{'median':>10}{'range':>16}")
        print(line("bare loop, packed", bare))
        print(line("vlmtune, packed", toolkit, statistics.median(bare)))
        print(f"ratio of each pair: median {statistics.median(ratios):.3f}, {min(ratios):.3f} … {max(ratios):.3f}")
        padded = config_for(folder, model, options.steps, "padded", packing=False)
        padded_speeds = speeds_of_vlmtune(padded)
        print(line("vlmtune, padded", padded_speeds))
        try:
            speeds = speeds_of_trl(padded, options.steps)
        except ImportError as error:
            print(f"TRL: not measured, {error}")
        else:
            print(line("TRL SFTTrainer, padded", speeds, statistics.median(padded_speeds)))


if __name__ == "__main__":
    main()
