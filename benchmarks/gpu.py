"""Correctness and speed on an accelerator, in one call: what the tests show on a CPU, shown again where it matters.

First every tiny architecture: logits on the device against the CPU in float32, packed rows against single ones, some
of them with pseudo-text; and one LoRA and one full run in bfloat16 whose loss must fall. Then the time of a step of a
LLaVA-type model, packed sample by sample against transformers' mask of the whole row, and padded. Prints a short table
last.

    python benchmarks/gpu.py                      # needs CUDA
    python benchmarks/gpu.py --device cpu --hidden 256 --layers 2 --length 512    # a rehearsal of the script itself
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from made import machine, write_llava, write_pictures, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import official_models
import xcomposer2_models
from rows import embedded_samples, varied_samples
from tiny import KINDS, save_tiny

import vlmtune
from vlmtune.config.schema import RunConfig, SourceConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Batch, Encoded
from vlmtune.infer.session import to_device
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over

OFFICIAL = "official-internlm2"


def batch_of(rows: list[list[Encoded]], opened: OpenedFolder) -> Batch:
    return collate(rows, opened, stand_in=False)


def logits(model: torch.nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode():
        found = model(**hand_over(model, to_device(batch.inputs, device, dtype))).logits
    return found.reshape(len(batch.targets), -1).float().cpu()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def tiny_folder(kind: str, into: Path) -> Path:
    if kind == OFFICIAL:
        return official_models.official_folder("internlm2", into)
    return xcomposer2_models.official_folder(kind, into) if kind in xcomposer2_models.KINDS else save_tiny(kind, into)


def check_kind(kind: str, folder: Path, device: torch.device) -> list[str]:
    opened = open_folder(tiny_folder(kind, folder / kind))
    length = opened.config.get_text_config().hidden_size
    rows = [encode(sample, opened) for sample in [*varied_samples(folder), *embedded_samples(folder, length)]]
    pack, singles = batch_of([rows], opened), [batch_of([[row]], opened) for row in rows]
    reference_model = load_model(opened, dtype=torch.float32).eval()
    reference = torch.cat([logits(reference_model, one, torch.device("cpu"), torch.float32) for one in singles])
    lines = []
    # On a CPU bfloat16 alone makes 0.01 to 0.05, and packs equal single rows. Which tokens are merged is a choice: in
    # bfloat16 another one may be taken, which no limit can judge.
    for name, limit in (("float32", 1e-4), ("bfloat16", float("inf") if "merged" in kind else 0.1)):
        dtype = getattr(torch, name)
        model = load_model(opened, dtype=dtype).eval().to(device)
        packed = logits(model, pack, device, dtype)
        single = torch.cat([logits(model, one, device, dtype) for one in singles])
        errors = relative(packed, reference), relative(single, reference), relative(packed, single)
        verdict = "ok" if max(errors) < limit else "WRONG"
        lines.append(f"{kind:<20}{name:<10}" + "".join(f"{error:>12.1e}" for error in errors) + f"  {verdict}")
    return lines


def run_config(model: Path, folder: Path, name: str, tuning: dict[str, object], precision: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "tuning": tuning,
            "data": {"sources": {"path": str(folder / "rows.jsonl"), "root": str(folder / "pictures")}},
            "train": {
                "output_dir": str(folder / name),
                "epochs": 100,
                "max_steps": 12,
                "learning_rate": 1e-3,
                "log_every": 1,
                "precision": precision,
            },
        }
    )


def falls(config: RunConfig) -> tuple[float, float]:
    """Loss of the first and of the last step."""
    result = vlmtune.train(config)
    losses = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in losses if "loss" in line]
    return values[0], values[-1]


def seconds(step: Callable[[], None], device: torch.device, repeats: int = 10) -> float:
    """Median time of a step, the device idle before and after each."""
    times = []
    for number in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_steps(opened: OpenedFolder, rows: list[Encoded], device: torch.device, dtype: torch.dtype) -> list[str]:
    tokens = sum(row.num_tokens for row in rows)
    lines = []
    for name, attention, batch in (
        ("packed, sample by sample", "sdpa", batch_of([rows], opened)),
        ("packed, mask of the row", "masked", batch_of([rows], opened)),
        ("padded", "sdpa", batch_of([[row] for row in rows], opened)),
    ):
        model = load_model(opened, dtype=dtype).train().to(device)
        if attention == "masked":
            model.set_attn_implementation("sdpa")
            batch.inputs.pop("pack_lengths")
        inputs, targets = to_device(batch.inputs, device, dtype), batch.targets.to(device)

        def step(model: torch.nn.Module = model, inputs: dict = inputs, targets: torch.Tensor = targets) -> None:
            scores = model(**inputs).logits
            torch.nn.functional.cross_entropy(scores.reshape(len(targets), -1).float(), targets).backward()
            model.zero_grad()

        taken = seconds(step, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        lines.append(f"{name:<28}{taken * 1e3:>10.1f} ms{tokens / taken:>12,.0f} tokens/s{peak:>8.1f} GiB")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=8192, help="tokens in the timed pack")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu rehearses the script")
    report = [machine() + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else "")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report.append(f"{'':<30}{'pack/CPU':>12}{'single/CPU':>12}{'pack/single':>12}")
        for kind in (*KINDS, OFFICIAL, *xcomposer2_models.KINDS):
            report += check_kind(kind, folder, device)
        write_rows(folder / "rows.jsonl", 400, write_pictures(folder / "pictures", 20, (320, 240)))
        for tuning in ({"method": "full"}, {"method": "lora", "rank": 8}):
            precision = "bfloat16" if device.type == "cuda" else "float32"
            config = run_config(folder / "llava", folder, str(tuning["method"]), tuning, precision)
            first, last = falls(config)
            verdict = "ok" if last < first else "WRONG"
            report.append(f"{tuning['method']:<12}{precision:<10} loss {first:.3f} -> {last:.3f}  {verdict}")
        model = write_llava(folder / "large", hidden_size=options.hidden, layers=options.layers)
        opened = open_folder(model)
        corpus = open_corpus([SourceConfig(path=str(folder / "rows.jsonl"), root=str(folder / "pictures"))])
        rows: list[Encoded] = []
        for number in range(len(corpus)):
            row = encode(corpus.sample(number), opened)
            if sum(one.num_tokens for one in rows) + row.num_tokens > options.length:
                break
            rows.append(row)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        report.append(f"a step of {len(rows)} rows, {sum(row.num_tokens for row in rows):,} tokens")
        report += time_steps(opened, rows, device, dtype)
    print("\n".join(report))


if __name__ == "__main__":
    main()
