"""``vlmtune export``: a trained model as a folder that plain transformers loads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vlmtune.cli import environment

if TYPE_CHECKING:
    from vlmtune.export.write import ExportResult

HELP = "write a plain transformers folder (adapters merged) and compare it with the trained model"
EXAMPLES = """
vlmtune export runs/ui -o exported/ui
vlmtune export runs/ui -o exported/ui-16bit --dtype bfloat16 --checkpoint last
vlmtune export adapters/ui -o exported/ui --base models/InternVL2-1B
vlmtune export work_dirs/iter_500.pth -o exported/ui --base models/InternVL2-8B --layout official
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="a run folder, a checkpoint, an adapter, or a model; or what another "
        "trainer wrote: iter_N.pth of XTuner, a DeepSpeed folder, or the folders of InternVL's official trainer",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument(
        "--layout", metavar="NAME", help="how the weights are named: native (transformers'), official (InternVL's own, "
        "for LMDeploy, vLLM and evaluation kits), xtuner or llava (LLaVA's); that of the base if left out",
    )  # fmt: skip
    parser.add_argument("--checkpoint", default="best", help="of a run folder: best, last, or a step")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (as they are: of the base, after full tuning of the checkpoint)",
    )
    parser.add_argument(
        "--base", metavar="DIR",
        help="the model under an adapter, if it has moved, or under another trainer's checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--lora-alpha", metavar="N", type=float, help="of another trainer's LoRA, if its checkpoint does not hold it"
    )
    parser.add_argument(
        "--second-adapter", metavar="DIR",
        help="the other of two adapters that InternVL's official code saved apart (language and vision)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=("full", "layers", "none"),
        help="compare the logits of the written folder with the trained model's. full: one model in memory at a time, "
        "in float32; layers: one module at a time, for models that do not fit; none: not at all. If left out, full "
        "where the model fits, else layers",
    )  # fmt: skip
    parser.add_argument("--device", help="where the comparison runs: cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is an earlier export")


def run(args: argparse.Namespace) -> int:
    environment.allow_network(args.model)
    from vlmtune.export.write import export

    result = export(
        args.model,
        args.output,
        layout=args.layout,
        checkpoint=args.checkpoint,
        dtype=args.dtype,
        base=args.base,
        verify=args.verify,
        overwrite=args.overwrite,
        device=args.device,
        lora_alpha=args.lora_alpha,
        second_adapter=args.second_adapter,
    )
    _print(result)
    return 0


def _print(result: ExportResult) -> None:
    print(f"{result.source} merged into {result.base}" if result.base else f"from {result.source}")
    print("tensors: " + ", ".join(f"{number} {kind}" for kind, number in result.counts.items() if number))
    if result.whole_model:
        print(f"merged in memory, not tensor by tensor: {result.whole_model}")
    if result.comparisons:
        where = "in memory" if result.weights_in_memory is None else (
            f"at most {result.weights_in_memory / 1e9:.2g} GB of the weights in memory at once"
        )  # fmt: skip
        print(f"comparison: --verify {result.verify}, {where}")
    for one in result.comparisons:
        cast = f" = 2 × the difference of one merge and cast to {result.dtype}" if one.limit == 2 * one.one_cast else ""
        print(
            f"compared on a {one.prompt} ({one.num_positions} positions): largest difference of a logit "
            f"{one.difference:.1e}, allowed {one.limit:.1e}{cast}"
        )
    if result.gap and result.gap.skipped:
        print(f"gap to the 4-bit model of the training: not measured ({result.gap.skipped})")
    elif result.gap:
        gaps = ", ".join(f"{gap:.2g} on a {prompt}" for prompt, gap in result.gap.differences.items())
        print(f"gap to the 4-bit model of the training, for information: a logit differs by at most {gaps}")
    if not result.comparisons:
        print("not compared with the trained model (--verify none)")
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.out} ({result.dtype}, layout {result.layout})")
