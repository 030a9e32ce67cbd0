"""``vlmtune embed``: marked regions of pictures become embedding files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.cli import environment
from vlmtune.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from vlmtune.embed.folder import EncoderFolder
    from vlmtune.embed.pages import Found
    from vlmtune.embed.regions import Page
    from vlmtune.embed.run import Job, Outcome
    from vlmtune.models.family import OpenedFolder

HELP = "turn marked regions of pictures into embedding files (pseudo-text), as rows and prompts name them"
EXAMPLES = """
vlmtune embed encoders/characters scroll.jpg -o scroll.safetensors
vlmtune embed encoders/characters scrolls -o scrolls/embeddings --rows scrolls/rows.json
vlmtune embed CalliReader/params scroll.jpg --model models/InternVL2-8B -o scroll.pt --dtype bfloat16
"""

_SHOWN = 5
_MARKS = ("<image>", "<embedding>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "encoder", type=Path, metavar="ENCODER", help="folder of a region encoder, or CalliReader's params"
    )
    parser.add_argument(
        "pages", type=Path, metavar="PICTURE|FOLDER",
        help="a picture, or a folder of them, each with the labelme JSON of its name beside it",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE|DIR", required=True,
        help="of one picture the file, .safetensors or .pt; of a folder the folder of its files",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="DIR", help="whose tower and embedding are used (what the encoder was fitted for)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the labelme JSON of a single picture, if it lies elsewhere"
    )
    parser.add_argument("--suffix", choices=(".safetensors", ".pt"), help="of the files of a folder (.safetensors)")
    parser.add_argument(
        "--file-dtype", choices=("float32", "bfloat16"), help="of the numbers in the files (that of the arithmetic)"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="write rows with `image` and `embedding` as well (.json, .jsonl)"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that paths in the rows start from (that of the rows)"
    )
    parser.add_argument("--ask", metavar="TEXT",
        help="the rows' question, behind picture and embedding, or with <image> and <embedding> where they belong; the "
        "answer is the regions' labels in order",
    )  # fmt: skip
    parser.add_argument("--joint", metavar="TEXT", default="", help="between two labels of an answer (nothing)")
    parser.add_argument(
        "--skip-bad-regions", action="store_true",
        help="leave out, and count, what cannot be encoded: regions outside of their picture or without area, pages "
        "without a region; else one of them refuses the whole",
    )  # fmt: skip
    parser.add_argument(
        "--keep-padding", action="store_true", help="keep vectors that are nearest to the padding token, too"
    )
    parser.add_argument(
        "--hard-vq", type=float, metavar="COSINE",
        help="replace vectors that are not nearer than this to any token by the nearest one (CalliReader: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="regions through the tower together (32)"
    )
    parser.add_argument("--max-image-pixels", type=int, metavar="N", help="larger pictures are refused (178956970)")
    parser.add_argument("--overwrite", action="store_true",
        help="encode every page of a folder again, replace the FILE of one picture and rows that are there",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (the checkpoint's own)")


def run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    if args.model:
        environment.allow_network(args.model)
    from vlmtune.embed.encoder import of_folder, tower_edge, with_options
    from vlmtune.embed.folder import read_encoder
    from vlmtune.embed.pages import find_pages
    from vlmtune.embed.regions import SquareRule
    from vlmtune.embed.run import claim, encode
    from vlmtune.infer.session import choose_device, torch_dtype
    from vlmtune.models.load import open_folder

    found = find_pages(args.pages, args.json)
    device = choose_device(args.device)
    stored = read_encoder(args.encoder)
    opened = open_folder(stored.model_path(args.model), _media(args))
    stored.check_model(opened.folder.path)
    rule = stored.config.regions or SquareRule.of_edge(tower_edge(opened.family, opened.spec, opened.config))
    jobs, failed = _jobs(args, found, opened, rule)
    if args.pages.is_dir():
        claim(args.output, jobs, _settings(args, stored, opened), overwrite=args.overwrite)
    encoder = of_folder(stored, opened, device=device, dtype=torch_dtype(args.dtype) if args.dtype else None)
    encoder = with_options(encoder, keep_padding=args.keep_padding, hard_below=args.hard_vq, batch_size=args.batch_size)
    dtype = torch_dtype(args.file_dtype) if args.file_dtype else encoder.features.embedding.dtype
    outcome = encode(jobs, encoder, dtype, keep=args.pages.is_dir())
    outcome.failed[:0] = failed
    _print(args, found, jobs, outcome, dtype, encoder.codebook.dim)
    if args.rows:
        _write_rows(args, jobs, outcome)
    return DataError.exit_code if outcome.failed and not args.skip_bad_regions else 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UsageError(f"is {args.batch_size}", where="--batch-size", expected="1 or more")
    if args.hard_vq is not None and not -1 <= args.hard_vq <= 1:
        raise UsageError(f"is {args.hard_vq}", where="--hard-vq", expected="a cosine, -1 to 1")
    if twice := [mark for mark in _MARKS if args.ask and args.ask.count(mark) > 1]:
        raise UsageError(f"holds {twice[0]} more than once", where="--ask", expected="one, or none: then in front")
    for name, needs in (("ask", "rows"), ("root", "rows"), ("joint", "ask")):
        if vars(args)[name] and not vars(args)[needs]:
            raise UsageError(f"--{name} needs --{needs}", where="vlmtune embed")
    if args.rows and args.rows.suffix not in (".json", ".jsonl"):
        raise UsageError(f"ends in {args.rows.suffix!r}", where="--rows", expected=".json or .jsonl")
    if args.pages.is_dir():
        if args.output.is_file() or args.output.suffix in (".safetensors", ".pt"):
            raise UsageError(f"{args.output} is a file", where="--output", expected="a folder: a folder is encoded")
    elif args.suffix:
        raise UsageError("--suffix belongs to a folder of pictures", where="vlmtune embed", remedy="Remove it.")
    elif args.output.suffix not in (".safetensors", ".pt"):
        raise UsageError(f"ends in {args.output.suffix!r}", where="--output", expected=".safetensors or .pt")
    elif args.output.exists() and not args.overwrite:
        raise UsageError("is there", where=str(args.output), remedy="Choose another name, or replace it: --overwrite.")


def _media(args: argparse.Namespace) -> Any:
    from vlmtune.config.schema import MediaOptions

    return MediaOptions() if args.max_image_pixels is None else MediaOptions(max_image_pixels=args.max_image_pixels)


def _jobs(args: argparse.Namespace, found: Found, opened: OpenedFolder, rule: Any) -> tuple[list[Job], list[str]]:
    """What is to be encoded, and messages on pages that are left out; everything that can be refused is, here."""
    from vlmtune.embed.regions import refuse_bad_regions
    from vlmtune.embed.rows import refuse_other_rows
    from vlmtune.embed.run import Job, read_pages

    pages, failed = read_pages(found.sources, opened.media, rule)
    if not args.skip_bad_regions:
        if failed:
            raise DataError(_listed(failed), remedy="Correct them, or leave them out with --skip-bad-regions.")
        refuse_bad_regions([page for _, page in pages])
    jobs = []
    for source, page in pages:
        if not page.regions:
            failed.append(f"{page.json}: none of its {len(page.bad)} regions can be cut out.")
            continue
        if args.pages.is_dir():
            out = args.output / source.stem.with_name(f"{source.stem.name}{args.suffix or '.safetensors'}")
        else:
            out = args.output
        jobs.append(Job(page, out))
    if args.rows:
        _check_labels(args, [job.page for job in jobs])
        rows = _rows(args, jobs)
        if not args.overwrite:
            refuse_other_rows(args.rows, rows)
    return jobs, failed


def _listed(messages: list[str]) -> str:
    shown = "\n".join(f"  {message}" for message in messages[: 4 * _SHOWN])
    more = f"\n  and {len(messages) - 4 * _SHOWN:,} more" if len(messages) > 4 * _SHOWN else ""
    return f"{len(messages):,} page{'s' if len(messages) > 1 else ''} cannot be encoded:\n{shown}{more}\n"


def _check_labels(args: argparse.Namespace, pages: list[Page]) -> None:
    """Refuses an answer made of nothing."""
    for page in pages if args.ask else ():
        if not all(region.label.strip() for region in page.regions):
            raise DataError(
                "a region has no label, so there is no answer to write", where=str(page.json),
                remedy="Label it, or leave out --ask and write the conversations yourself.",
            )  # fmt: skip


def _settings(args: argparse.Namespace, stored: EncoderFolder, opened: OpenedFolder) -> dict[str, Any]:
    """What two runs have to agree on for their outputs to be of one kind."""
    from vlmtune.weights.fingerprint import fingerprint

    return {
        "encoder": stored.sha256,
        "model": fingerprint(opened.folder.path),
        "dtype": args.dtype,
        "file_dtype": args.file_dtype,
        "keep_padding": args.keep_padding,
        "hard_vq": args.hard_vq,
        "skip_bad_regions": args.skip_bad_regions,
    }


def _rows(args: argparse.Namespace, jobs: list[Job]) -> list[dict[str, Any]]:
    """One row for each page."""
    from vlmtune.embed.pages import below

    root = args.root or args.rows.absolute().parent
    rows = []
    for job in jobs:
        image, embedding = below(root, [job.page.picture, job.out])
        labels = [region.label for region in job.page.regions]
        row: dict[str, Any] = {"id": embedding.rpartition(".")[0], "image": image, "embedding": embedding}
        if args.ask:
            front = "".join(f"{mark}\n" for mark in _MARKS if mark not in args.ask)
            row["conversations"] = [
                {"from": "human", "value": front + args.ask},
                {"from": "gpt", "value": args.joint.join(labels)},
            ]
        else:
            row["labels"] = labels
        rows.append(row)
    return rows


def _write_rows(args: argparse.Namespace, jobs: list[Job], outcome: Outcome) -> None:
    from vlmtune.embed.rows import write_rows_file

    rows = _rows(args, [job for job in jobs if job.out in outcome.rows])
    write_rows_file(args.rows, rows)
    print(f"wrote {args.rows}: {_many(len(rows), 'row')}" + ("" if args.ask else ", still without conversations"))


def _print(
    args: argparse.Namespace, found: Found, jobs: list[Job], outcome: Outcome, dtype: torch.dtype, dim: int
) -> None:
    from vlmtune.embed.run import SETTINGS

    made = len(outcome.rows) - outcome.kept
    print(
        f"{_many(made, 'page')}, {_many(outcome.regions, 'region')} -> "
        f"{_many(sum(outcome.rows.values()), 'vector')} of {dim} numbers ({str(dtype).removeprefix('torch.')}) in "
        f"{args.output}" + (f"; {_many(outcome.kept, 'page')} kept from before" if outcome.kept else "")
    )
    cut = sum(job.page.cut for job in jobs)
    bad = [f"{job.page.json}: region {words}" for job in jobs for words in job.page.bad]
    ours = {args.rows.absolute()} if args.rows else set()
    orphans = [file for file in found.orphans if file.name != SETTINGS and file.absolute() not in ours]
    for number, noun, words, names in (
        (outcome.dropped, "vector", "dropped: nearest to the padding token", []),
        (cut, "region", "cut at the edge of the picture, which it reaches beyond", []),
        (len(bad), "region", "left out", bad),
        (len(outcome.failed), "page", "without an embedding", outcome.failed),
        (len(found.bare), "picture", "without a JSON of its name beside it", [str(file) for file in found.bare]),
        (len(orphans), "JSON file", "without a picture of its name beside it", [str(file) for file in orphans]),
    ):
        if number:
            print(f"  {_many(number, noun)} {words}")
            for name in names[:_SHOWN]:
                print(f"    {name}")
            if len(names) > _SHOWN:
                print(f"    and {len(names) - _SHOWN:,} more")


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
