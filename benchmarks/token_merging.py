"""Merging a picture's tokens: quality, step time, tokens and memory at several ratios, side by side.

A LLaVA-type model with a CLIP tower of 12 layers at 224/14 (256 patches) and random weights learns to read the
handwritten digits of `vlmtune quickstart`, once for each ratio, from the same start and over the same rows. First comes
the prediction: the matrix products of a training step, by arithmetic. Then, of one micro batch, the time of forward,
backward and optimizer step, the ratios taken by turns; and what the forward keeps for the backward pass.

    OMP_NUM_THREADS=1 python benchmarks/token_merging.py
    OMP_NUM_THREADS=1 python benchmarks/token_merging.py --steps 30 --rounds 3 --hidden 64    # minutes less, no quality

Processor seconds are those of this process alone, so other work on the machine disturbs them less than wall time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from made import machine, write_llava
from torch.utils.data import DataLoader

import vlmtune
from vlmtune.config.schema import RunConfig
from vlmtune.data.loader import MicroBatches
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.prepared.prepare import prepare, prepared_folder
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Batch
from vlmtune.eval.run import EvalSettings, evaluate
from vlmtune.infer.session import load, to_device
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.token_merging import kept_tokens, merged_per_layer
from vlmtune.quickstart.data import write_data

RATIOS = (1.0, 0.5, 0.2, 0.1)
IMAGE, PATCH, TOWER_LAYERS = 224, 14, 12
MERGES = TOWER_LAYERS - 1  # the features are those of the last layer but one


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step."""

    hidden: int
    layers: int
    rows: int
    heads: int = 8

    @property
    def inner(self) -> int:
        return 3 * self.hidden


@dataclass
class Case:
    """One ratio: its micro batch, and what is found out about it."""

    ratio: float
    config: RunConfig
    tokens: int
    step: Callable[[], None]
    kept: int
    """Bytes that one forward keeps for the backward pass."""
    text: float
    """Tokens of a row beside the picture, in the mean."""
    wall: list[float]
    processor: list[float]


def tokens_by_layer(ratio: float) -> list[int]:
    """Tokens of a picture, the class token among them, before each layer that is used and behind the last."""
    patches = (IMAGE // PATCH) ** 2
    r = merged_per_layer(IMAGE, IMAGE, patch=PATCH, layers=TOWER_LAYERS, ratio=ratio)
    return [1 + kept_tokens(patches, r, merges=merges) for merges in range(MERGES + 1)]


def products(ratio: float, sizes: Sizes, text: float) -> tuple[float, float]:
    """Floating-point operations of the matrix products of one row's training step: tower, and projector with decoder.

    A product of m×k and k×n is 2·m·k·n, and the backward pass costs two of each. Left out: the output head (trained
    positions only, alike for all), norms, softmax, activations, the optimizer, and everything that moves numbers.
    """
    d, inner = sizes.hidden, sizes.inner
    tokens = tokens_by_layer(ratio)
    tower = 2 * 2 * (IMAGE // PATCH) ** 2 * 3 * PATCH**2 * d  # patch embedding; its input needs no gradient
    for before, after in itertools.pairwise(tokens):
        tower += 3 * (8 * before * d**2 + 4 * before**2 * d + 4 * after * d * inner)
        tower += 2 * (before / 2) ** 2 * (d / sizes.heads) if before != after else 0  # matching, no gradient
    seen = tokens[-1] - 1
    row = seen + text
    decoder = sizes.layers * (8 * row * d**2 + 4 * row**2 * d + 6 * row * d * inner)
    return float(tower), 3.0 * (4 * seen * d**2 + decoder)


def config_for(folder: Path, ratio: float, steps: int, rows: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "image": {"token_merge_ratio": ratio}},
            "data": {
                "sources": {"path": str(folder / "digits.train.json")},
                "max_length": 512,
                "packing": False,
                "workers": 0,
            },
            "train": {
                "output_dir": str(folder / f"run-{ratio:g}"),
                "epochs": 1000,
                "max_steps": steps,
                "global_batch_size": rows,
                "micro_batch_size": rows,
                "learning_rate": 3e-3,
                "warmup": 0.05,
                "weight_decay": 0.1,
                "keep_checkpoints": 1,
            },
        }
    )


def first_batch(config: RunConfig) -> tuple[Batch, Any]:
    """The first micro batch of the run, and the folder as the run opens it."""
    opened = open_folder(config.model.path, config.media)
    corpus = open_corpus(config.data.sources)
    prepared = prepare(corpus, opened, into=prepared_folder(config), workers=0)
    plan = make_plan(prepared.measured, corpus, config, world=1, packed=False)
    data = MicroBatches(prepared.rows, opened, plan, stand_in=False, packed=False, augment=False, seed=0)
    return next(iter(DataLoader(data, batch_size=None))), opened


def make_case(config: RunConfig, device: torch.device) -> Case:
    batch, opened = first_batch(config)
    model = load_model(opened, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs, targets = to_device(batch.inputs, device, torch.float32), batch.targets.to(device)
    rows = config.train.micro_batch_size
    placeholder = opened.config.to_dict()["image_token_index"]
    seen = int((batch.inputs["input_ids"] == placeholder).sum()) // rows
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, int] = {}

    def loss() -> torch.Tensor:
        logits = model(**hand_over(model, inputs)).logits
        return torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1).float(), targets)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = loss()
    del held
    ratio = config.model.image.token_merge_ratio or 1.0
    return Case(ratio, config, seen, step, sum(stored.values()), batch.num_tokens / rows - seen, [], [])


def time_steps(cases: list[Case], rounds: int, device: torch.device) -> None:
    """One warm-up of each, then by turns."""
    for number, case in itertools.product(range(rounds + 1), cases):
        wall, processor = time.perf_counter(), time.process_time()
        case.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            case.wall.append(time.perf_counter() - wall)
            case.processor.append(time.process_time() - processor)


def quality(config: RunConfig, folder: Path, limit: int) -> tuple[float, float]:
    """Loss (nats) and exact match (percent) on held-out digits, after training."""
    result = vlmtune.train(config)
    settings = EvalSettings(max_new_tokens=8, batch_size=20, limit=limit, max_length=512)
    corpus = open_corpus((config.data.sources[0].model_copy(update={"path": str(folder / "digits.test.json")}),))
    found = evaluate(load(result.run_dir), corpus, settings)
    return found.loss, 100.0 * found.metrics.exact_match


def predict(cases: list[Case], sizes: Sizes) -> list[float]:
    """Prints the prediction; of each ratio, its share of the operations at the first."""
    print(f"\nPredicted by the matrix products alone ({cases[0].text:.0f} tokens of text a row)")
    print(f"{'ratio':>6}{'tokens':>8}{'tower':>12}{'decoder':>12}{'step':>8}")
    counts = [products(case.ratio, sizes, case.text) for case in cases]
    shares = [sum(count) / sum(counts[0]) for count in counts]
    for case, (tower, decoder), share in zip(cases, counts, shares, strict=True):
        tokens = tokens_by_layer(case.ratio)[-1] - 1
        if tokens != case.tokens:
            raise SystemExit(f"{case.tokens} placeholders a picture, but by arithmetic {tokens}")
        print(
            f"{case.ratio:>6g}{tokens:>8}{tower / 1e9:>6.2f} GFLOP{decoder / 1e9:>6.2f} GFLOP{share:>7.2f}×", flush=True
        )
    return shares


def show(cases: list[Case], shares: list[float]) -> None:
    """The table of what was measured, beside what was predicted."""
    print(
        f"\n{'ratio':>6}{'tokens':>8}{'predicted':>11}{'processor':>11}{'wall':>8}{'step':>10}{'kept for backward':>19}"
    )
    first = statistics.median(cases[0].processor), statistics.median(cases[0].wall)
    for case, share in zip(cases, shares, strict=True):
        processor, wall = statistics.median(case.processor), statistics.median(case.wall)
        print(f"{case.ratio:>6g}{case.tokens:>8}{share:>10.2f}×{processor / first[0]:>10.2f}×", end="")
        print(f"{wall / first[1]:>7.2f}×{wall:>8.2f} s{case.kept / 2**20:>15,.0f} MiB", flush=True)


def train_all(cases: list[Case], folder: Path, limit: int) -> None:
    print(f"\n{'ratio':>6}{'tokens':>8}{'loss':>9}{'exact':>9}   of {limit} held-out digits, after training")
    for case in cases:
        loss, exact = quality(case.config, folder, limit)
        print(f"{case.ratio:>6g}{case.tokens:>8}{loss:>9.3f}{exact:>7.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training, for the quality; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each ratio")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--hidden", type=int, default=128, help="width of tower and decoder")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--limit", type=int, default=120, help="held-out rows")
    options = parser.parse_args()
    sizes = Sizes(options.hidden, options.layers, options.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        made = {"layers": sizes.layers, "tower_layers": TOWER_LAYERS, "image_size": IMAGE, "patch_size": PATCH}
        write_llava(folder / "model", hidden_size=sizes.hidden, **made)
        cases = [make_case(config_for(folder, ratio, max(options.steps, 1), sizes.rows), device) for ratio in RATIOS]
        print(f"{machine()}; {device.type}, {torch.get_num_threads()} thread(s)")
        print(f"{TOWER_LAYERS} tower layers at {IMAGE}/{PATCH}, {sizes.layers} of the decoder, {sizes.hidden} wide")
        print(f"{sizes.rows} rows a step; medians of {options.rounds} steps; {options.steps} steps of training")
        shares = predict(cases, sizes)
        time_steps(cases, options.rounds, device)
        show(cases, shares)
        if options.steps:
            train_all(cases, folder, options.limit)


if __name__ == "__main__":
    main()
