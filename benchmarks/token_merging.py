"""Merging a picture's tokens: quality, step time, tokens and memory at several ratios, side by side.

A LLaVA-type model with a CLIP tower of 12 layers at 224/14 (256 patches) and random weights. First comes the
prediction: the matrix products of a training step, by arithmetic. Then, of one micro batch, the time of forward,
backward and optimizer step, the ratios taken by turns; and what the forward keeps for the backward pass.

For the quality, the model learns to read the handwritten digits of `vlmtune quickstart`, drawn over the whole picture,
without merging. That is the shared base, which stands for a pretrained model. From there it is trained on at each
ratio: the same rows in the same order, the same number of steps. Exact answers on digits that no step has seen are
counted for the base with its tokens merged and not a step of training (`merged only`), and after (`trained`).

    OMP_NUM_THREADS=1 python benchmarks/token_merging.py
    OMP_NUM_THREADS=1 python benchmarks/token_merging.py --steps 2 --rounds 1 --limit 20    # whether it runs

Processor seconds are those of this process alone, so other work on the machine disturbs them less than wall time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from vlmtune.infer.locate import locate
from vlmtune.infer.session import load_located, to_device
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.token_merging import kept_tokens, merged_per_layer
from vlmtune.quickstart.data import SPLITS, write_data

RATIOS = (1.0, 0.5, 0.2, 0.1)
IMAGE, PATCH, TOWER_LAYERS = 224, 14, 12
MERGES = TOWER_LAYERS - 1  # the features are those of the last layer but one
BASE_SHARE = 4  # steps of the base, for one of each ratio
BASE_RATE, RATE = 2e-3, 1e-3  # learning rates at their peaks: random weights, and weights that can read
DEVIATION = 0.1  # of the random weights; transformers' 0.02 suits wider models


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step."""

    hidden: int
    layers: int
    rows: int

    @property
    def heads(self) -> int:
        return self.hidden // 32

    @property
    def inner(self) -> int:
        return 3 * self.hidden


@dataclass
class Case:
    """One ratio: its micro batch, and what is found out about it."""

    ratio: float
    tokens: int
    step: Callable[[], None]
    kept: int
    """Bytes that one forward keeps for the backward pass."""
    text: float
    """Tokens of a row beside the picture, in the mean."""
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    before: tuple[float, int] | None = None
    after: tuple[float, int] | None = None
    """Loss and number of exact answers: of the base, its tokens merged only; and trained."""


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
    seen, row = tokens[-1] - 1, tokens[-1] - 1 + text
    decoder = sizes.layers * (8 * row * d**2 + 4 * row**2 * d + 6 * row * d * inner)
    return float(tower), 3.0 * (4 * seen * d**2 + decoder)


def config_for(folder: Path, ratio: float, rows: int, *, start: str, steps: int, rate: float) -> RunConfig:
    """A run of `steps` steps from the model folder `start`; a ratio of 1 merges nothing."""
    rows_file = {"path": str(folder / "digits.train.json")}
    train = {
        "output_dir": str(folder / f"run-{start}-{ratio}"),
        "epochs": 1000,
        "max_steps": steps,
        "global_batch_size": rows,
        "micro_batch_size": rows,
        "learning_rate": rate,
        "warmup": 0.1,
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "keep_checkpoints": 1,
    }
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / start), "image": {"token_merge_ratio": ratio}},
            "data": {"sources": rows_file, "max_length": 512, "packing": False, "workers": 0},
            "train": train,
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
        loss()
    ratio = config.model.image.token_merge_ratio or 1.0
    return Case(ratio, seen, step, sum(stored.values()), batch.num_tokens / rows - seen)


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


def measure(config: RunConfig, weights: Path, folder: Path, limit: int) -> tuple[float, int]:
    """Loss (nats) and exact matches of the weights on held-out digits, with pictures as the configuration says."""
    session = load_located(replace(locate(weights), media=config.media))
    settings = EvalSettings(max_new_tokens=4, batch_size=20, limit=limit, max_length=512)
    corpus = open_corpus((config.data.sources[0].model_copy(update={"path": str(folder / "digits.test.json")}),))
    found = evaluate(session, corpus, settings)
    return found.loss, sum(one.exact for one in found.predictions)


def interval(right: int, of: int) -> tuple[float, float]:
    """Of a share, the range that is compatible with `right` of `of` (Wilson 1927, 95 %), in percent."""
    z, share = 1.96, right / of
    centre, reach = share + z**2 / (2 * of), z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    low, high = (100 * (centre + sign * reach) / (1 + z**2 / of) for sign in (-1, 1))
    return max(low, 0.0), min(high, 100.0)


def chance(folder: Path, limit: int) -> float:
    """Percent of the held-out rows that are right when one always says their most frequent answer."""
    rows = json.loads((folder / "digits.test.json").read_text(encoding="utf-8"))[:limit]
    return 100 * Counter(row["conversations"][-1]["value"] for row in rows).most_common(1)[0][1] / len(rows)


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
        print(f"{case.ratio:>6g}{tokens:>8}{tower / 1e9:>6.2f} GFLOP{decoder / 1e9:>6.2f} GFLOP{share:>7.2f}×")
    return shares


def train_all(cases: list[Case], folder: Path, options: argparse.Namespace) -> None:
    """The shared base without merging; then each ratio from there, measured before and after."""
    steps = BASE_SHARE * options.steps
    base = config_for(folder, 1.0, options.rows, start="model", steps=steps, rate=BASE_RATE)
    print(f"\n{steps} steps without merging, {BASE_RATE:g} at the peak; then {options.steps} at each ratio, {RATE:g}")
    vlmtune.export(vlmtune.train(base).run_dir, folder / "base")
    for case in cases:
        config = config_for(folder, case.ratio, options.rows, start="base", steps=options.steps, rate=RATE)
        case.before = measure(config, folder / "base", folder, options.limit)
        case.after = measure(config, vlmtune.train(config).run_dir, folder, options.limit)
        print(f"{case.ratio:>6g}: loss {case.before[0]:.3f}, then {case.after[0]:.3f}", flush=True)


def show(cases: list[Case], shares: list[float], limit: int) -> None:
    """What was measured, side by side, beside what was predicted; quality only where it was measured."""
    columns = f"\n{'ratio':>6}{'tokens':>8}{'predicted':>11}{'processor':>11}{'wall':>8}{'step':>9}{'kept':>10}"
    print(columns + (f"{'merged only':>13}{'trained':>10}{'95 %':>16}" if cases[0].after else ""))
    first = statistics.median(cases[0].processor), statistics.median(cases[0].wall)
    for case, share in zip(cases, shares, strict=True):
        processor, wall = statistics.median(case.processor), statistics.median(case.wall)
        line = f"{case.ratio:>6g}{case.tokens:>8}{share:>10.2f}×{processor / first[0]:>10.2f}×{wall / first[1]:>7.2f}×"
        line += f"{wall:>7.2f} s{case.kept / 2**20:>6,.0f} MiB"
        if case.before and case.after:
            low, high = interval(case.after[1], limit)
            line += f"{100 * case.before[1] / limit:>11.1f} %{100 * case.after[1] / limit:>8.1f} %"
            line += f"{low:>7.1f} … {high:.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="of training at each ratio; 0 leaves the quality out")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each ratio")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--hidden", type=int, default=64, help="width of tower and decoder, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder")
    parser.add_argument("--limit", type=int, default=SPLITS["test"], help="held-out rows")
    options = parser.parse_args()
    options.limit = min(options.limit, SPLITS["test"])
    sizes = Sizes(options.hidden, options.layers, options.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        made = {"layers": sizes.layers, "tower_layers": TOWER_LAYERS, "image_size": IMAGE, "patch_size": PATCH}
        write_llava(folder / "model", hidden_size=sizes.hidden, heads=sizes.heads, deviation=DEVIATION, **made)
        timed = {"start": "model", "steps": 1, "rate": RATE}
        cases = [make_case(config_for(folder, ratio, sizes.rows, **timed), device) for ratio in RATIOS]
        print(f"{machine()}; {device.type}, {torch.get_num_threads()} thread(s)")
        print(f"{TOWER_LAYERS} tower layers at {IMAGE}/{PATCH}, {sizes.layers} of the decoder, {sizes.hidden} wide")
        print(f"{sizes.rows} rows a step; medians of {options.rounds} steps")
        shares = predict(cases, sizes)
        time_steps(cases, options.rounds, device)
        if options.steps:
            train_all(cases, folder, options)
        show(cases, shares, options.limit)
        if options.steps:
            steps, often = BASE_SHARE * options.steps, chance(folder, options.limit)
            print(f"exact answers to {options.limit} held-out digits; the most frequent answer gives {often:.1f} %")
            print(f"merged only: {steps} steps without merging; trained: {options.steps} more at the ratio")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
