"""Official InternVL folders against transformers' own way with the native copy of the same model.

Random weights, InternLM2's fused attention, a vocabulary of 92,553. Loading, exporting with a merged adapter, and
comparing take a model of about 1 B parameters in bfloat16, in shards. Each measurement is a process of its own, after
its imports, interleaved in pairs whose order changes; files lie in the page cache, and on a machine that is shared the
seconds of the processor tell more than those of the clock. Memory is the peak of the process over what it was before.
A step of LoRA takes a small float32 model that keeps the vocabulary.

    OMP_NUM_THREADS=2 python benchmarks/internvl.py
    python benchmarks/internvl.py --parts loading export --pairs 3
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made import cut_into_shards, machine, write_internvl, write_pictures, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import InternVLForConditionalGeneration

import vlmtune
from vlmtune.config.schema import LoraTuning, RunConfig
from vlmtune.data.loader import MicroBatches
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.prepared.prepare import prepare, prepared_folder
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.export.merge import fill_with_stand_ins
from vlmtune.export.write import export
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning import adapters
from vlmtune.weights.names import skeleton
from vlmtune.weights.shards import Shards

VOCABULARY = 92_553
SHARD_BYTES = 500_000_000
LARGE = {
    "text": {"vocab_size": VOCABULARY, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 16,
             "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 4096},
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
               "image_size": 448, "patch_size": 14},
}  # fmt: skip
SMALL = {
    "text": {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 112, "patch_size": 14},
}  # fmt: skip
ROWS_PER_STEP = 2  # full logits of 92,553 tokens a position are slow on a CPU
WARM_UP = 2


# ---- one measurement, in a process of its own --------------------------------------------------------------


def touch(model: torch.nn.Module) -> None:
    """One number of every page: files that are only mapped are not loaded yet."""
    for parameter in model.parameters():
        parameter.data.flatten()[:: 4096 // parameter.element_size()].sum()


def native_model(native: Path) -> Any:
    return InternVLForConditionalGeneration.from_pretrained(native, dtype="auto")


def save_merged(native: Path, adapter: Path, out: Path) -> None:
    PeftModel.from_pretrained(native_model(native), str(adapter)).merge_and_unload().save_pretrained(out)


def work_of(name: str, folder: Path) -> Callable[[], object]:
    official, native, adapter, out = (folder / one for one in ("official", "native", "adapter", "out"))

    opened = open_folder(official)  # tokenizer and settings, which transformers' model class does not read

    def exported(layout: str, verify: Any) -> None:
        export(adapter, out, base=official, layout=layout, verify=verify, device="cpu")

    return {
        "loading, official": lambda: touch(load_model(opened)),
        "loading, transformers": lambda: touch(native_model(native)),
        "export, official -> native": lambda: exported("native", "none"),
        "export, official -> official": lambda: exported("official", "none"),
        "export, transformers": lambda: save_merged(native, adapter, out),
        "compared, layers": lambda: exported("official", "layers"),
        "compared, full": lambda: exported("official", "full"),
    }[name]


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, folder: Path) -> None:
    work = work_of(name, folder)
    gc.collect()
    gc.freeze()  # or a collection of what the imports left falls into one measurement and not into another
    before, start, processor = memory("VmRSS"), time.perf_counter(), time.process_time()
    work()
    for file in (folder / "out").glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream)  # what was written counts when it is on the disk
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "bytes": memory("VmHWM") - before}))


# ---- pairs of them ---------------------------------------------------------------------------------------


def in_process(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(folder / "out", ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(ours: str, theirs: str, folder: Path, pairs: int) -> None:
    found: dict[str, list[dict[str, float]]] = {ours: [], theirs: []}
    for number in range(pairs):
        for name in (ours, theirs) if number % 2 else (theirs, ours):
            found[name].append(in_process(name, folder))
    for unit, shown, scale in (("seconds", "s", 1.0), ("processor", "s of processor", 1.0), ("bytes", "GB", 1e9)):
        values = {name: [one[unit] / scale for one in found[name]] for name in found}
        ratios = [a / b for a, b in zip(values[ours], values[theirs], strict=True)]
        sides = "  ".join(f"{name} {span(values[name])} {shown}" for name in found)
        print(f"{sides}  ratio {span(ratios)}", flush=True)


def span(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def write_large(folder: Path) -> None:
    official = write_internvl(folder / "official", **LARGE, shard_bytes=SHARD_BYTES)
    export(official, folder / "native", layout="native", verify="none")
    cut_into_shards(folder / "native", SHARD_BYTES)
    opened = open_folder(official)
    model = skeleton(opened)
    fill_with_stand_ins(model)
    wrapped = adapters.prepare(model, opened, LoraTuning(rank=16, targets=("language",)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    wrapped.save_pretrained(str(folder / "adapter"))
    numbers = sum(info.num_elements for info in Shards(official).infos.values())
    print(f"{numbers / 1e9:.2f} B parameters, {len(list(official.glob('*.safetensors')))} shards", flush=True)


# ---- a step of LoRA --------------------------------------------------------------------------------------


def config_for(folder: Path, steps: int, run: str, answer: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / "official")},
            "tuning": {"method": "lora", "rank": 16, "alpha": 32},
            "data": {
                "sources": {"path": str(folder / f"rows{answer}.jsonl"), "root": str(folder / "pictures")},
                "packing": False,
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


def ours(config: RunConfig) -> float:
    result = vlmtune.train(config)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][WARM_UP:])


def theirs(config: RunConfig, native: Path) -> float:
    """transformers' class on the same padded batches, called with `labels`; PEFT, AdamW, and nothing around them."""
    opened = open_folder(config.model.path)
    corpus = open_corpus(config.data.sources)
    prepared = prepare(corpus, opened, into=prepared_folder(config), workers=0)
    plan = make_plan(prepared.measured, corpus, config, world=1, packed=False)
    data = MicroBatches(prepared.rows, opened, plan, stand_in=False, packed=False, augment=False, seed=0)
    targets = adapters.target_regex(adapters.target_modules(skeleton(opened), opened, ["language"]))
    bare: Any = InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32)
    model: Any = get_peft_model(bare, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = iter(DataLoader(data, batch_size=None))
    speeds = []
    for _ in range(plan.num_steps):
        start, count = time.perf_counter(), 0
        for batch in itertools.islice(batches, plan.micro_batches_per_step):
            inputs = dict(batch.inputs)
            keep = inputs.pop("logits_to_keep")
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, 1:][keep[:, :-1]] = batch.targets
            model(**inputs, labels=labels).loss.backward()
            count += batch.num_tokens
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds[WARM_UP:])


def training(folder: Path, pairs: int, steps: int) -> None:
    write_internvl(folder / "official", **SMALL, dtype="float32")
    export(folder / "official", folder / "native", layout="native", verify="none")
    pictures = write_pictures(folder / "pictures", 50, (320, 240))
    for answer in (10, 200):
        write_rows(folder / f"rows{answer}.jsonl", 200, pictures, words=(20, answer))
        speeds: dict[str, list[float]] = {"vlmtune": [], "transformers with labels": []}
        for number in range(pairs):
            config = config_for(folder, steps, f"run{answer}-{number}", answer)
            for name in list(speeds) if number % 2 else list(speeds)[::-1]:
                speeds[name].append(ours(config) if name == "vlmtune" else theirs(config, folder / "native"))
        ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
        for name, values in speeds.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"answers of {answer} words, {name}: {middle:,.0f} tokens/s ({low:,.0f} … {high:,.0f})")
        print(f"ratio of each pair: {span(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("loading", "export", "compared", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if set(options.parts) - {"training"}:
            write_large(folder)
        if "loading" in options.parts:
            compare("loading, official", "loading, transformers", folder, options.pairs)
        if "export" in options.parts:
            for layout in ("native", "official"):
                compare(f"export, official -> {layout}", "export, transformers", folder, options.pairs)
        if "compared" in options.parts:
            compare("compared, layers", "compared, full", folder, min(options.pairs, 3))
        if "training" in options.parts:
            training(folder / "small", options.pairs, options.steps)
        print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
