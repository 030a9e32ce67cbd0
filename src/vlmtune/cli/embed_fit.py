"""``vlmtune embed fit``: marked and labelled regions become a region encoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.cli import environment
from vlmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from vlmtune.embed.fit import FitSettings, Fitted
    from vlmtune.embed.labels import Target
    from vlmtune.embed.regions import Page
    from vlmtune.models.family import OpenedFolder

HELP = "fit a region encoder to pages with labelled regions, for any model's tower and word embeddings"
EXAMPLES = """
vlmtune embed fit scrolls --model models/InternVL2-8B -o encoders/characters
vlmtune embed fit scrolls --model models/InternVL2-1B -o encoders/small --queries 4 --depth 2 --epochs 30
"""

_WHERE = "vlmtune embed fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pages", type=Path, metavar="FOLDER", help="pictures with labelme JSON files of the same names beside them"
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="whose tower and word embeddings are used")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="folder of the encoder")
    shape = parser.add_argument_group("the resampler (what is left out is CalliReader's)")
    shape.add_argument("--queries", type=int, default=3, metavar="N", help="most tokens of a label (3)")
    shape.add_argument("--depth", type=int, default=4, metavar="N", help="layers (4)")
    shape.add_argument("--heads", type=int, default=8, metavar="N", help="attention heads (8)")
    shape.add_argument("--head-width", type=int, default=64, metavar="N", help="width of a head (64)")
    shape.add_argument("--ff-mult", type=int, default=4, metavar="N", help="width of the MLP, in hidden sizes (4)")
    shape.add_argument(
        "--padding-id", type=int, metavar="ID",
        help="token that short labels are filled up with (0, or a special token where 0 cannot be)",
    )  # fmt: skip
    run = parser.add_argument_group("the fitting")
    run.add_argument("--epochs", type=int, default=60, metavar="N", help="passes over the regions (60)")
    run.add_argument("--batch-size", type=int, default=64, metavar="N", help="regions per step (64)")
    run.add_argument("--learning-rate", type=float, default=3e-4, metavar="RATE", help="at its highest (3e-4)")
    run.add_argument("--weight-decay", type=float, default=0.01, metavar="RATE", help="of matrices (0.01)")
    run.add_argument("--warmup", type=float, default=0.05, metavar="SHARE", help="of the steps (0.05)")
    run.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="of the regions, to measure the encoder on (0.1)"
    )
    run.add_argument(
        "--held-out-by", choices=("page", "region"), default="page", help="whole pages (default), or single regions"
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (0)")
    parser.add_argument(
        "--skip-bad-regions", action="store_true",
        help="leave out, and count, what cannot be learned: regions outside of their picture or without area, labels "
        "that are empty, too long or not in the tokenizer; else one of them refuses the whole",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an encoder that is there")
    parser.add_argument("--max-image-pixels", type=int, metavar="N", help="larger pictures are refused (178956970)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of tower and projector (the checkpoint's own)"
    )


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    environment.allow_network(args.model)
    from vlmtune.config.schema import MediaOptions
    from vlmtune.embed.labels import hold_out
    from vlmtune.embed.pages import find_pages
    from vlmtune.embed.run import SETTINGS
    from vlmtune.embed.save import refuse_taken
    from vlmtune.infer.session import choose_device, torch_dtype
    from vlmtune.models.load import open_folder

    refuse_taken(args.output, overwrite=args.overwrite)
    found = find_pages(args.pages)
    device = choose_device(args.device)
    pixels = {} if args.max_image_pixels is None else {"max_image_pixels": args.max_image_pixels}
    opened = open_folder(args.model, MediaOptions(**pixels))
    targets, left_out = _targets(args, found.sources, opened)
    held = hold_out(targets, settings.held_out, by=settings.held_out_by, seed=settings.seed)
    _print_before(targets, held, left_out, settings)
    orphans = [file for file in found.orphans if file.name != SETTINGS]  # which `vlmtune embed` leaves in its folder
    for number, noun in ((len(found.bare), "picture"), (len(orphans), "JSON file")):
        if number:
            print(f"  {number:,} {noun}{'s' if number > 1 else ''} without the other of its name")
    _fit(args, opened, targets, held, settings, device, torch_dtype(args.dtype) if args.dtype else None)
    return 0


def _settings(args: argparse.Namespace) -> FitSettings:
    for name in ("queries", "depth", "heads", "head_width", "ff_mult", "epochs", "batch_size"):
        if vars(args)[name] < 1:
            raise UsageError(f"is {vars(args)[name]}", where=f"--{name.replace('_', '-')}", expected="1 or more")
    if not args.learning_rate > 0 or not args.weight_decay >= 0:
        raise UsageError("a rate is negative, or a learning rate of 0", where=_WHERE)
    for name in ("held_out", "warmup"):
        if not 0 <= vars(args)[name] < 1:
            raise UsageError(f"is {vars(args)[name]}", where=f"--{name.replace('_', '-')}", expected="0 to less than 1")
    from vlmtune.embed.fit import FitSettings

    return FitSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        held_out=args.held_out,
        held_out_by=args.held_out_by,
        seed=args.seed,
    )


def _targets(args: argparse.Namespace, sources: Any, opened: OpenedFolder) -> tuple[list[Target], list[str]]:
    """The regions to learn, and a line on each that is left out."""
    from vlmtune.embed.encoder import tower_edge
    from vlmtune.embed.labels import refuse_bad_labels, targets_of
    from vlmtune.embed.regions import SquareRule, refuse_bad_regions
    from vlmtune.embed.run import read_pages

    rule = SquareRule.of_edge(tower_edge(opened.family, opened.spec, opened.config))
    found, failed = read_pages(sources, opened.media, rule)
    pages: list[Page] = [page for _, page in found]
    targets, bad = targets_of(pages, opened.text, opened.tokenizer, queries=args.queries)
    left_out = [*failed, *(f"{page.json}: region {words}" for page in pages for words in page.bad), *bad]
    if not args.skip_bad_regions:
        if failed:
            raise DataError(failed[0] + (f" (and {len(failed) - 1:,} other pages)" if len(failed) > 1 else ""))
        refuse_bad_regions(pages)
        refuse_bad_labels(bad, queries=args.queries)
    if not targets:
        raise DataError("no region is left to learn from", where=str(args.pages), remedy="\n".join(left_out[:5]))
    return targets, left_out


def _print_before(targets: list[Target], held: list[bool], left_out: list[str], settings: FitSettings) -> None:
    from vlmtune.embed.fit import unseen

    out = sum(held)
    lengths = sorted({len(target.ids) for target in targets})
    pages = len({id(target.page) for target in targets})
    print(
        f"{len(targets):,} regions of {pages:,} pages: {len(targets) - out:,} to learn from, {out:,} held out"
        + (f" ({'whole pages' if settings.held_out_by == 'page' else 'single regions'})" if out else "")
    )
    print(
        f"  {len({target.ids for target in targets}):,} different labels of "
        + (f"{lengths[0]} to {lengths[-1]} tokens" if len(lengths) > 1 else f"{lengths[0]} token(s)")
    )
    if number := unseen(targets, held):
        print(f"  {number:,} held-out regions have a token that is in no label to learn from")
    if left_out:
        print(f"  {len(left_out):,} left out:")
        for line in left_out[:5]:
            print(f"    {line}")


def _fit(
    args: argparse.Namespace,
    opened: OpenedFolder,
    targets: list[Target],
    held: list[bool],
    settings: FitSettings,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    from vlmtune.embed.fit import fit
    from vlmtune.embed.parts import open_parts
    from vlmtune.embed.resampler import ResamplerShape
    from vlmtune.embed.save import save_fitted
    from vlmtune.embed.seen import Seen

    parts = open_parts(opened, targets, padding_id=args.padding_id, device=device, dtype=dtype)
    if parts.padding_id != 0:
        token = f"token {parts.padding_id} ({parts.padding!r})"
        print(f"  short labels are filled up with {token}: 0 is in a label, or no row can be near to it")
    shape = ResamplerShape(
        dim=parts.codebook.dim, depth=args.depth, heads=args.heads, dim_head=args.head_width,
        num_learns=args.queries, ff_mult=args.ff_mult,
    )  # fmt: skip
    seen = Seen(parts.features, targets, batch_size=32)
    if not seen.kept:
        size = f"{seen.nbytes / 1e9:.1f} GB"
        print(f"  {size} of visual tokens do not fit into memory: regions go through the tower in every epoch")
    resampler = parts.new_resampler(shape, settings.seed)
    fitted = fit(
        resampler, seen, parts.codebook, targets, held, settings,
        padding_id=parts.padding_id, dtype=parts.features.embedding.dtype, say=print,
    )  # fmt: skip
    save_fitted(args.output, fitted, parts, settings, targets, held, opened, given=args.model)
    _print_after(args.output, fitted, targets, held)


def _print_after(out: Path, fitted: Fitted, targets: list[Target], held: list[bool]) -> None:
    from vlmtune.embed.fit import chance

    if fitted.held_out is None:
        print("Nothing was held out, so nobody knows how well new regions are read (--held-out).")
    else:
        found = fitted.held_out
        print(
            f"held out: {found.label_accuracy:.1%} of {len(found.readings):,} labels right, "
            f"{found.token_accuracy:.1%} of {found.tokens:,} tokens (always the commonest label: "
            f"{chance(targets, held):.1%}; learned from: {fitted.learned.label_accuracy:.1%} of the labels)"
        )
    print(f"wrote {out}: encoder.safetensors, config.json, metrics.jsonl" + ", held_out.jsonl" * bool(fitted.held_out))
