"""``vlmtune VERB …``: finds the verb, runs it, and is the one place that prints an error.

Each verb is a module of this package with ``HELP``, ``EXAMPLES``, ``add_arguments(parser)`` and ``run(args) -> int``.
Importing it must not import torch: `run` imports what it needs.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import itertools
import os
import select
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from vlmtune.cli import environment
from vlmtune.errors import Interrupted, UsageError, VlmtuneError
from vlmtune.version import __version__

# In the order of a job.
VERBS = (
    "quickstart", "init", "embed", "check", "preview", "prepare", "train", "eval", "export", "assemble", "chat", "info",
)  # fmt: skip

SUBVERBS = {("embed", "fit"): "embed_fit", ("embed", "gather"): "embed_gather"}
"""Two words that are a verb of their own -> its module."""

EXIT_CODES = "exit codes: 0 done, 2 usage or configuration, 3 data, 4 weights, 1 anything else"

KEYBOARD_INTERRUPT = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


class Verb(Protocol):
    HELP: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit code."""
    try:
        return _run(argv)
    except BrokenPipeError as error:
        gone = [stream for stream in (1, 2) if _reader_has_gone(stream)]
        if not gone:  # a pipe of the program's own: to a worker that died
            _say_error(_unforeseen(error, keep_traceback=True))
            return 1
        # `vlmtune preview … | head`: Python would complain once more when it closes the stream.
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return BROKEN_PIPE


def _reader_has_gone(stream: int) -> bool:
    """Of a file descriptor that may be a pipe."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _run(argv: Sequence[str]) -> int:
    debug = "--debug" in argv
    try:
        code = _dispatch(list(argv), debug)
        sys.stdout.flush()
        return code
    except Interrupted as stop:
        if environment.rank() == 0:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except VlmtuneError as error:
        if debug:
            traceback.print_exc()
        _say_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return KEYBOARD_INTERRUPT
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say_error(_unforeseen(error, keep_traceback=not debug))
        return 1


def _dispatch(argv: list[str], debug: bool) -> int:
    flags = list(itertools.takewhile(lambda argument: argument in ("--debug", "--offline"), argv))
    argv = argv[len(flags) :] and argv[len(flags) :] + flags  # before the verb they mean the same
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] in ("-V", "--version"):
        print(f"vlmtune {__version__}")
        return 0
    name = argv[0]
    if name not in VERBS:
        raise UsageError(f"there is no verb {name!r}", remedy=_nearest(name, VERBS) or "`vlmtune --help` lists them.")
    module, rest = _split(argv)
    verb = _load(module)
    args = _parse(module, verb, rest)
    environment.prepare(offline=args.offline, debug=debug)
    return verb.run(args)


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The module of the verb that a command line begins with, and what is left of it."""
    module = SUBVERBS.get((argv[0], argv[1])) if len(argv) > 1 else None
    return (module, list(argv[2:])) if module else (argv[0], list(argv[1:]))


def _load(name: str) -> Verb:
    return cast(Verb, importlib.import_module(f"vlmtune.cli.{name}"))


def _overview() -> str:
    lines = []
    for name in VERBS:
        names = {name: name, **{" ".join(words): module for words, module in SUBVERBS.items() if words[0] == name}}
        lines += [f"  {shown:<12} {_load(module).HELP}" for shown, module in names.items()]
    return "\n".join(
        [
            f"vlmtune {__version__}: fine-tune vision-language models.",
            "",
            "usage: vlmtune VERB …      vlmtune VERB --help      vlmtune --version",
            "",
            *lines,
            "",
            "A job: vlmtune init auto_lora, then check auto_lora.yaml, train auto_lora.yaml, chat runs/auto_lora.",
            "Options of every verb: --debug (tracebacks and all messages), --offline (never the network).",
            EXIT_CODES,
        ]
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, remedy=f"`{self.prog} --help` shows what it takes.")


def _parse(name: str, verb: Verb, argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=f"vlmtune {name.replace('_', ' ')}",
        description=verb.HELP[0].upper() + verb.HELP[1:] + ("" if verb.HELP.endswith(".") else "."),
        epilog=f"examples:\n{textwrap.indent(textwrap.dedent(verb.EXAMPLES).strip(), '  ')}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    for action in parser._actions:
        # Python 3.11 counts a positional that may be empty among those that are missing.
        action.required = action.required and action.nargs != argparse.ZERO_OR_MORE
    parser.add_argument("--offline", action="store_true", help="never use the network, even if the model is a hub id")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the messages of all libraries")
    args, unknown = parser.parse_known_args(argv)
    if "overrides" in vars(args):
        # argparse takes positionals up to the first option; overrides may stand behind it as well.
        late = [argument for argument in unknown if not argument.startswith("-")]
        args.overrides = [*(args.overrides or ()), *late]
        unknown = [argument for argument in unknown if argument.startswith("-")]
    if unknown:
        raise _unknown_argument(parser, unknown[0])
    return args


def _unknown_argument(parser: argparse.ArgumentParser, argument: str) -> UsageError:
    option = argument.partition("=")[0]
    remedy = _nearest(option, [*parser._option_string_actions]) if option.startswith("-") else ""
    return UsageError(
        f"does not know the argument {argument!r}",
        where=parser.prog,
        remedy=remedy or _as_override(parser, option) or f"`{parser.prog} --help` shows what it takes.",
    )


def _as_override(parser: argparse.ArgumentParser, option: str) -> str:
    """`--num_train_epochs` -> how an option of the configuration is set, for verbs that take overrides."""
    if not any(action.dest == "overrides" for action in parser._actions):
        return ""
    from vlmtune.config.explain import option_named

    key = option_named(option.lstrip("-").replace("-", "_"))
    return f"Options of the configuration are written {key}=VALUE, without dashes." if key else ""


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _unforeseen(error: Exception, *, keep_traceback: bool) -> str:
    """A paragraph for an exception that nobody turned into a message."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return (
            f"out of memory ({_first_line(error)}). Lower train.micro_batch_size or data.max_length, set "
            "train.activation_checkpointing: true, or share the model over devices with strategy: zero3 or fsdp2."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename or 'a file'}: cannot be written ({error.strerror}). Free some space, then run it again."
        )
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: permission denied."
    text = (
        f"{type(error).__name__}: {_first_line(error)}\nThis should not happen: a defect of vlmtune, or of a library."
    )
    if keep_traceback:
        with tempfile.NamedTemporaryFile("w", prefix="vlmtune-", suffix=".txt", delete=False, encoding="utf-8") as file:
            traceback.print_exc(file=file)
        text += f" The traceback is in {file.name}; please report it."
    return text


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or "no message"


def _say_error(text: str) -> None:
    rank = environment.rank()
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}error: {text}", file=sys.stderr)
