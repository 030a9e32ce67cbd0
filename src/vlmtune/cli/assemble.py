"""``vlmtune assemble``: a language model, a vision tower and a fresh projector become a LLaVA model."""

from __future__ import annotations

import argparse

from vlmtune.cli import environment

HELP = "make a new LLaVA model of a language model, a CLIP or SigLIP tower and a fresh projector"
EXAMPLES = """
vlmtune assemble models/vicuna-7b-v1.5 models/DFN5B-CLIP-ViT-H-14-378 -o models/fresh
vlmtune assemble models/Qwen2-0.5B models/siglip-so400m-patch14-384 -o models/fresh --layout native
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("language", metavar="LLM", help="folder of a language model")
    parser.add_argument("tower", metavar="TOWER", help="folder of a CLIP or SigLIP model, whole or the tower alone")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument(
        "--layout", default="xtuner", metavar="NAME", help="xtuner (the parts stay as they are; the default), native "
        "(transformers' own; rows for <image> are added to the vocabulary), or llava (official LLaVA's)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the projector's random weights")


def run(args: argparse.Namespace) -> int:
    environment.allow_network(args.language)
    environment.allow_network(args.tower)
    from vlmtune.export.assemble import assemble

    out = assemble(args.language, args.tower, args.output, layout=args.layout, seed=args.seed)
    print(f"wrote {out} (layout {args.layout}); its projector is untrained: train it first, with the rest frozen")
    return 0
