"""The quickstart: pictures, a tiny model, full training, LoRA, export, plain transformers, report.

Every step calls what a user's own run calls: `load_config`, `train`, `evaluate`, `export`. Nothing here knows how they
work, and nothing there knows of this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Literal

from vlmtune.config.load import load_config
from vlmtune.config.schema import SourceConfig
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.errors import ExportError
from vlmtune.eval.run import EvalSettings, evaluate, write_results
from vlmtune.export.write import export
from vlmtune.files import write_atomic
from vlmtune.infer.session import load
from vlmtune.quickstart import data, model, outcome
from vlmtune.quickstart.places import Places, Record, enter
from vlmtune.train.run import train

Say = Callable[[str], None]


def make_data(root: Path, *, say: Say) -> None:
    """Writes the pictures and rows, unless they are there.

    Raises:
        UsageError: `root` is in use for something else.
    """
    _write_data(enter(root), say)


def make_model(root: Path, *, say: Say) -> None:
    """Writes the tiny model with random weights, unless it is there.

    Raises:
        UsageError: `root` is in use for something else.
    """
    _write_model(enter(root), say)


def tell(root: Path, *, say: Say) -> None:
    """The whole story, or the rest of it where an earlier call stopped.

    Args:
        root: a new or empty folder, or that of an earlier quickstart.
        say: gets every line for the user.

    Raises:
        UsageError: `root` is in use for something else.
        VlmtuneError: what training, evaluation and export raise.
    """
    record = enter(root)
    places = record.places
    if record.finished:
        say(f"The quickstart in {places.root} is finished; here is its result again.")
    say("== 1 of 6: handwritten digits as pictures, with questions and answers")
    _write_data(record, say)
    say("== 2 of 6: a tiny vision-language model with random weights")
    _write_model(record, say)
    say("== 3 of 6: full training, one picture: which digit is this?")
    if not record.once("full", lambda: _train_fully(places, say)):
        say(f"done before: {places.run('full')}, {places.digits}")
    say("== 4 of 6: LoRA, two pictures: which digit is larger?")
    if not record.once("lora", lambda: _train_lora(places, say)):
        say(f"done before: {places.run('lora')}")
    say("== 5 of 6: export, and the same questions in plain transformers")
    if not record.once("export", lambda: _export(places, "lora", places.model, say)):
        say(f"done before: {places.model}")
    record.once("plain", lambda: _ask_plainly(places, say))
    say("== 6 of 6: result")
    record.once("report", lambda: outcome.write_report(record))
    for line in outcome.closing_lines(record):
        say(line)


def _write_data(record: Record, say: Say) -> None:
    places = record.places
    record.once("data", lambda: data.write_data(places.data))
    rows = [f"{count} {split}" for split, count in data.SPLITS.items()]
    say(f"{data.NUM_DIGITS} pictures and their rows ({', '.join(rows)}) in {places.data}")
    rows = [f"{count} {split}" for split, count in data.NUM_PAIRS.items()]
    say(f"rows about two of these pictures: {', '.join(rows)}")


def _write_model(record: Record, say: Say) -> None:
    places = record.places
    record.once("tiny", lambda: model.write_model(places.tiny, data.texts()))
    size = sum(file.stat().st_size for file in places.tiny.glob("*.safetensors"))
    say(f"InternVL, {size / 4e6:.2f} million parameters, tokenizer trained on the spot, in {places.tiny}")


def _train_fully(places: Places, say: Say) -> None:
    _evaluate(places, "start", places.tiny, say)
    _train(places, "full", say)
    _export(places, "full", places.digits, say)
    _evaluate(places, "full", places.run("full"), say)


def _train_lora(places: Places, say: Say) -> None:
    _train(places, "lora", say)
    _evaluate(places, "lora", places.run("lora"), say)


def _train(places: Places, stage: Literal["full", "lora"], say: Say) -> None:
    file = places.config(stage)
    if not file.exists():
        write_atomic(file, resources.files("vlmtune.quickstart").joinpath(file.name).read_text(encoding="utf-8"))
    say(f"$ vlmtune train {file}")
    train(load_config(file), say=say)


def _evaluate(places: Places, stage: str, weights: Path, say: Say) -> None:
    """Both tasks, on pictures that no training step and no choice of a checkpoint has seen."""
    session = load(weights)
    settings = EvalSettings(max_new_tokens=16, batch_size=60)
    for task in outcome.TASKS:
        rows = places.rows(task, "test")
        say(f"$ vlmtune eval {weights} --data {rows}")
        corpus = open_corpus((SourceConfig(path=str(rows)),), allow=())
        result = evaluate(session, corpus, settings)
        write_results(places.evaluation(stage, task), result, session, corpus, settings)
        say(f"{outcome.STAGES[stage]}: {100 * result.metrics.exact_match:.1f} % of {result.count} {task} rows right")


def _export(places: Places, stage: str, out: Path, say: Say) -> None:
    say(f"$ vlmtune export {places.run(stage)} -o {out}")
    # An earlier call that was interrupted after its export may have left one.
    result = export(places.run(stage), out, overwrite=True)
    worst = max(one.difference for one in result.comparisons)
    say(f"logits of the written folder differ from the trained model's by at most {worst:.1e}")


def _ask_plainly(places: Places, say: Say) -> None:
    """The exported folder must give the answers that vlmtune gave, in a process that never imports vlmtune."""
    write_atomic(
        places.script, resources.files("vlmtune.quickstart").joinpath("ask_plain.txt").read_text(encoding="utf-8")
    )
    say(f"$ python {places.script}")
    done = subprocess.run([sys.executable, "-I", str(places.script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(
            f"does not run in plain transformers:\n{done.stderr.strip()[-2000:]}", where=str(places.model)
        )
    plain = [json.loads(line) for line in done.stdout.splitlines()]
    ours = {task: outcome.predictions(places, "lora", task) for task in outcome.TASKS}
    compared = []
    for task in outcome.TASKS:
        answers = [line["answer"].strip() for line in plain if line["task"] == task]
        compared += list(zip(answers, [one["prediction"].strip() for one in ours[task]], strict=False))
    differing = [(theirs, mine) for theirs, mine in compared if theirs != mine]
    if differing:
        theirs, mine = differing[0]
        raise ExportError(
            f"{len(differing)} of {len(compared)} answers differ, the first one {theirs!r} instead of {mine!r}",
            where=str(places.model),
            expected="the same answers from plain transformers as from vlmtune",
        )
    outcome.write_agreement(places, len(compared))
    say(f"plain transformers, without vlmtune: {len(compared)} of {len(compared)} answers are the same")
