"""``vlmtune chat``: ask a model in a terminal, or once from a script."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from vlmtune.cli import environment
from vlmtune.errors import UsageError

if TYPE_CHECKING:
    from vlmtune.infer.repl import Conversation

HELP = "ask a model about pictures and videos: an interactive conversation, or one answer with --ask"
EXAMPLES = """
vlmtune chat runs/ui --image screen.png
vlmtune chat exported/ui --image a.png --image b.png --ask "Which one is larger?"
vlmtune chat exported/ui --image a.png --image b.png --ask "First: <image>, second: <image>. Which one is larger?"
vlmtune chat exported/ui --image a.png --ask "What is this?" --json
vlmtune chat exported/ui --video clip.mp4 --ask "What happens?"
vlmtune chat exported/scroll --image scroll.jpg --embedding scroll.pt --ask "The characters are <embedding>. Read them."
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, an adapter, or a run folder")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture for the first turn: where the question says <image> (or <ImageHere>), else in front of it; "
        "may be repeated",
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video, or a folder of its frames, for the first turn: where the question says <video>, else in front "
        "of it, behind the pictures; may be repeated",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="pseudo-text of `vlmtune embed` (page.pt, store.safetensors#name) for the first turn: where the question "
        "says <embedding>, else in front of it, behind the pictures; may be repeated",
    )
    parser.add_argument("--ask", metavar="TEXT", help="answer once and exit")
    parser.add_argument("--json", action="store_true", help="with --ask: the answer as one JSON object")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--checkpoint", default="best", help="of a run folder: best, last, or a step")
    parser.add_argument("--base", metavar="DIR", help="the model under an adapter, if it has moved")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (the checkpoint's own)")


def run(args: argparse.Namespace) -> int:
    if args.json and args.ask is None:
        raise UsageError("--json needs --ask TEXT", where="vlmtune chat")
    if args.max_new_tokens < 1:
        raise UsageError(f"is {args.max_new_tokens}", where="--max-new-tokens", expected="1 or more")
    environment.allow_network(args.model)
    from vlmtune.infer.locate import locate
    from vlmtune.infer.repl import Conversation, converse, counted, open_embedding, open_picture, open_video
    from vlmtune.infer.session import load_located
    from vlmtune.models.load import open_folder

    located = locate(args.model, base=args.base, checkpoint=args.checkpoint)
    # A wrong picture, or an embedding for another model, is told before the model is loaded, which takes longer.
    pictures = [open_picture(path, located.media) for path in args.image]
    videos = [open_video(path, located.media) for path in args.video]
    opened = open_folder(str(located.model_folder), located.media)
    embeddings = [open_embedding(path, opened) for path in args.embedding]
    session = load_located(located, device=args.device, dtype=args.dtype, opened=opened)
    conversation = Conversation(session, args.max_new_tokens, pending=[*pictures, *videos, *embeddings])
    if args.ask is not None:
        return _answer_once(conversation, args)
    if conversation.pending:
        _write(f"{counted(conversation.pending)} in your first turn\n")
    converse(conversation, _read, _write, _complain)
    return 0


def _answer_once(conversation: Conversation, args: argparse.Namespace) -> int:
    pieces = conversation.ask(args.ask)
    if args.json:
        answer = "".join(pieces)
        record = {
            "model": args.model,
            "images": args.image,
            "videos": args.video,
            "embeddings": args.embedding,
            "question": args.ask,
            "answer": answer,
        }
        print(json.dumps(record, ensure_ascii=False))
        return 0
    for piece in pieces:
        _write(piece)
    _write("\n")
    return 0


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
