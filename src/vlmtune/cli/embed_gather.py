"""``vlmtune embed gather``: many embedding files as one store, and the rows that name it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmtune.errors import UsageError

HELP = "put the embedding files that rows name into one store, and write rows that name their tensors there"
EXAMPLES = """
vlmtune embed gather samples.json -o embeddings.safetensors --rows gathered.json
vlmtune embed gather samples.jsonl -o data/embeddings.safetensors --rows gathered.jsonl --root data
"""

_ROWS = (".json", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows_in", type=Path, metavar="ROWS", help="rows with `embedding`, .json or .jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="the store, a .safetensors file"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", required=True, help="the same rows with the store's names (.json, .jsonl)"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder that paths in the rows start from (ROWS' own)")
    parser.add_argument("--overwrite", action="store_true", help="replace a store and rows that are there")


def run(args: argparse.Namespace) -> int:
    for path, where, suffixes in (
        (args.rows_in, "ROWS", _ROWS),
        (args.rows, "--rows", _ROWS),
        (args.output, "-o", (".safetensors",)),
    ):
        if path.suffix not in suffixes:
            raise UsageError(f"is {path}", where=where, expected=f"a file with the suffix {' or '.join(suffixes)}")
    from vlmtune.embed.gather import gather

    done = gather(args.rows_in, args.output, args.rows, root=args.root, overwrite=args.overwrite)
    print(
        f"{done.files:,} embeddings of {done.vectors:,} vectors ({done.num_bytes / 1e6:,.1f} MB) in {args.output}; "
        f"wrote {args.rows}: {done.rows:,} rows"
    )
    return 0
