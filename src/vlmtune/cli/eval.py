"""``vlmtune eval``: loss and generated answers on held-out rows."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.cli import environment
from vlmtune.errors import UsageError

if TYPE_CHECKING:
    from vlmtune.config.schema import RunConfig
    from vlmtune.eval.run import EvalResult, EvalSettings

HELP = "loss and generated answers on held-out rows, as a table, JSON and one line per row"
EXAMPLES = """
vlmtune eval ui.yaml                                      # the trained run on data.eval
vlmtune eval ui.yaml --model models/InternVL2-1B          # the model before training
vlmtune eval runs/ui --data ui/val.jsonl --root ui/images --limit 100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN.yaml|MODEL", help="a run's YAML, or a model, adapter or run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    parser.add_argument("--model", metavar="PATH", help="what to evaluate instead of the run's best checkpoint")
    parser.add_argument("--data", metavar="FILE", help="rows (.json, .jsonl); needed with a MODEL, replaces data.eval")
    parser.add_argument("--root", metavar="DIR", help="folder that media paths of --data start from (the file's own)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N rows")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="longest answer (eval.max_new_tokens, else 64)")
    parser.add_argument("--batch-size", metavar="N", type=int, help="rows generated together (eval.batch_size, else 8)")
    parser.add_argument("--checkpoint", default="best", help="of a run folder: best, last, or a step")
    parser.add_argument("--base", metavar="DIR", help="the model under an adapter, if it has moved")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (the checkpoint's own)")
    parser.add_argument("-o", "--output", metavar="DIR", help="for results.json and predictions.jsonl")


def run(args: argparse.Namespace) -> int:
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UsageError(f"is {value}", where=f"--{name.replace('_', '-')}", expected="1 or more")
    config = _config(args)
    model = args.model or (config.train.output_dir if config else args.target)
    assert model is not None  # load_config fills in output_dir
    if config and not args.model and not Path(model).is_dir():
        raise UsageError(
            "this run has not been trained yet",
            where=model,
            remedy=f"Train it, or give --model PATH; `--model {config.model.path}` evaluates the base model.",
        )
    environment.allow_network(model, *(config.hub_datasets if config else ()))
    from vlmtune.config.schema import AnySource, SourceConfig
    from vlmtune.data.rows.corpus import open_corpus
    from vlmtune.eval.run import evaluate, write_results
    from vlmtune.infer.locate import locate
    from vlmtune.infer.session import load_located

    if args.data:
        root = str(Path(args.root).absolute()) if args.root else None
        sources: tuple[AnySource, ...] = (SourceConfig(path=str(Path(args.data).absolute()), root=root),)
    else:
        assert config is not None
        sources = config.data.eval
    corpus = open_corpus(sources, allow=config.data.allow if config else ())
    located = locate(model, base=args.base, checkpoint=args.checkpoint)
    if config:  # the YAML, with its overrides, says how pictures are cut: for the model before training as well
        located = replace(located, media=config.media)
    session = load_located(located, device=args.device, dtype=args.dtype)
    settings = _settings(args, config)
    result = evaluate(session, corpus, settings)
    out = Path(args.output) if args.output else _default_output(args, config)
    written = write_results(out, result, session, corpus, settings)
    _print(result, str(session.located.path), corpus.names)
    print(f"\nwrote {written} and {written.with_name('predictions.jsonl').name}")
    return 0


def _config(args: argparse.Namespace) -> RunConfig | None:
    """The run's configuration, or None when the target is a model."""
    if not args.target.endswith((".yaml", ".yml")):
        if args.overrides:
            raise UsageError(f"{args.overrides[0]!r} changes a YAML; {args.target} is none", where="vlmtune eval")
        if args.model:
            raise UsageError("two models are named", where="vlmtune eval", expected="MODEL, or RUN.yaml --model PATH")
        if not args.data:
            raise UsageError(
                "a model needs rows to be evaluated on",
                where="vlmtune eval",
                remedy="Give --data FILE, or the run's YAML.",
            )
        return None
    from vlmtune.config.load import load_config

    config = load_config(Path(args.target), args.overrides)
    if not config.data.eval and not args.data:
        raise UsageError("there are no held-out rows", where=args.target, remedy="Set data.eval, or give --data FILE.")
    return config


def _settings(args: argparse.Namespace, config: RunConfig | None) -> EvalSettings:
    from vlmtune.config.schema import EvalConfig
    from vlmtune.eval.run import EvalSettings

    section = config.eval if config else EvalConfig()
    return EvalSettings(
        max_new_tokens=args.max_new_tokens or section.max_new_tokens,
        batch_size=args.batch_size or section.batch_size,
        limit=args.limit,
        max_length=config.data.max_length if config else None,
        too_long=config.data.too_long if config else "refuse",
    )


def _default_output(args: argparse.Namespace, config: RunConfig | None) -> Path:
    """Beside the run; for a model a folder of the working directory, since a model folder is nobody's notebook."""
    if config and not args.model:
        assert config.train.output_dir is not None
        return Path(config.train.output_dir) / "eval"
    data = Path(args.data or args.target).stem
    return Path(f"eval-{Path(args.model or args.target).resolve().name}-{data}")


def _print(result: EvalResult, model: str, data: list[str]) -> None:
    from rich.table import Table

    from vlmtune.progress import Screen

    metrics = result.metrics
    print(f"{model} on {', '.join(data)}")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    hits = sum(one.exact for one in result.predictions)
    rows = [
        ("rows", f"{result.count}" + (f" ({result.dropped} too long)" if result.dropped else "")),
        ("exact match", f"{100 * metrics.exact_match:.1f} % ({hits} of {result.count})"),
        ("match without case and punctuation", f"{100 * metrics.normalised_match:.1f} %"),
        ("BLEU", f"{metrics.bleu:.1f}"),
        ("chrF", f"{metrics.chrf:.1f}"),
        ("loss per trained token", f"{result.loss:.4f} ({result.trained_tokens} tokens)"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    Screen(highlight=False).print(table)
