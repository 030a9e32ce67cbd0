"""``vlmtune info``: versions and devices; with a model, what it is and what pictures cost."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from vlmtune.cli import environment

if TYPE_CHECKING:
    from vlmtune.infer.describe import Description

HELP = "versions and devices; with a model: family, chat format, parameters, tokens per picture"
EXAMPLES = """
vlmtune info
vlmtune info models/InternVL2-1B
vlmtune info runs/ui --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, an adapter, or a run folder")
    parser.add_argument("--base", metavar="DIR", help="the model under an adapter, if it has moved")
    parser.add_argument("--checkpoint", default="best", help="of a run folder: best, last, or a step")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.model:
        environment.allow_network(args.model)
    machine = _machine()
    model = None
    if args.model:
        from vlmtune.infer.describe import describe
        from vlmtune.infer.locate import locate

        model = describe(locate(args.model, base=args.base, checkpoint=args.checkpoint))
    if args.json:
        print(json.dumps({**machine, "model": model.as_dict() if model else None}, ensure_ascii=False, indent=2))
        return 0
    for name, version in machine["versions"].items():
        print(f"{name:<14} {version}")
    for device in machine["devices"]:
        print(f"{'device':<14} {device}")
    if model:
        print()
        _print(model)
    return 0


def _machine() -> dict[str, Any]:
    import torch

    from vlmtune.versions import PACKAGES, versions

    devices = [f"cpu, cores {os.cpu_count()}, threads {torch.get_num_threads()}"]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}, {found.name}, {found.total_memory / 2**30:.0f} GiB")
    extras = ("deepspeed", "bitsandbytes", "torchvision", "av", "datasets")
    return {"versions": versions(PACKAGES + extras), "platform": sys.platform, "devices": devices}


_UNITS = {"thousand": "0–1000 of the picture", "pixels": "pixels after the resize", "unit": "0–1 of the picture"}


def _print(model: Description) -> None:
    chat = model.chat
    total = sum(model.parameters.values())
    shares = ", ".join(f"{name} {_short(count)}" for name, count in model.parameters.items())
    lines = [("model", model.path)]
    if model.base and model.adapter:
        size = _short(model.adapter["parameters"])
        rank = " and ".join(map(str, model.adapter["ranks"])) or model.adapter["rank"]
        detail = f"{model.adapter['type']}, rank {rank}, {size} parameters"
        lines += [("adapter", detail), ("base", model.base)]
        if model.adapter["trained_in_full"]:
            lines.append(("in full", ", ".join(model.adapter["trained_in_full"])))
    lines += [
        ("family", f"{model.family} ({model.architecture})"),
        ("layout", model.layout),
        ("weights", ", ".join(f"{name} {_short(count)}" for name, count in model.dtypes.items())),
        ("parameters", f"{_short(total)}: {shares}"),
        ("prompt", repr(chat["prompt"])),
        ("answer", f"{chat['answer']!r}, ends at the ids {', '.join(map(str, chat['stop_ids']))}"),
        *([("pictures", model.about_pictures)] if model.about_pictures else []),
        ("video", repr(model.video)),
        ("box", f"{model.box[0]!r} for left 10 %, top 10 %, right 50 %, bottom 50 % ({_UNITS[model.box[1]]})"),
        ("system turn", "yes" if chat["system"] else "not in this template"),
        ("packing", "yes" if model.why_not_packed is None else f"no, rows are padded: {model.why_not_packed}"),
    ]
    if model.unknown or model.missing:
        lines.append(("warning", f"tensors that the model does not take: {model.unknown}; missing: {model.missing}"))
    for name, text in lines:
        print(f"{name:<14} {text}")
    differs = model.first_frames != model.frames
    more = ", of the first frame of a video and of each further one" if differs else ", tokens of a frame"
    print(f"\nwidth×height -> tokens and tiles of a picture{more}")
    for size, (tokens, tiles) in model.pictures.items():
        first = f" {model.first_frames[size][0]:>6}" if differs else ""
        print(f"  {size:<12} {tokens:>6} {tiles:>4}{first} {model.frames[size][0]:>6}")


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
