"""What came out of a quickstart: the figures, the report page, what to try next."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.eval.run import PREDICTIONS_FILE, RESULTS_FILE
from vlmtune.files import write_atomic
from vlmtune.quickstart.data import PAIR_QUESTION
from vlmtune.quickstart.places import Places, Record
from vlmtune.report.curves import loss_chart
from vlmtune.report.page import Answer, Charts, Commands, Example, Examples, Page, Table, render
from vlmtune.versions import versions

TASKS = {"digits": "Which digit is this?", "pairs": "Two pictures: which digit is larger?"}
STAGES = {"start": "random weights", "full": "after full training", "lora": "after LoRA"}
_AGREEMENT = "plain.json"


def exact_match(places: Places, stage: str, task: str) -> float:
    """Share of the test rows that were answered word for word, in percent."""
    record = json.loads((places.evaluation(stage, task) / RESULTS_FILE).read_text(encoding="utf-8"))
    return 100.0 * record["metrics"]["exact_match"]


def predictions(places: Places, stage: str, task: str) -> list[dict[str, Any]]:
    """One dictionary per test row, in the order of the rows."""
    lines = (places.evaluation(stage, task) / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_agreement(places: Places, count: int) -> None:
    """Notes that `count` answers of plain transformers were the same; differing ones are an error before this."""
    write_atomic(places.root / "eval" / _AGREEMENT, json.dumps({"same": count, "asked": count}) + "\n")


def closing_lines(record: Record) -> list[str]:
    """Figures and next steps for the terminal."""
    places = record.places
    figures = {(stage, task): f"{exact_match(places, stage, task):.1f} %" for stage in STAGES for task in TASKS}
    return [
        f"exact match, held-out digits: {figures['full', 'digits']} (random weights: {figures['start', 'digits']})",
        f"exact match, held-out pairs:  {figures['lora', 'pairs']} (before LoRA: {figures['full', 'pairs']})",
        f"after LoRA, the model in {_shown(places.model)}: {figures['lora', 'digits']} of the digits, "
        f"{figures['lora', 'pairs']} of the pairs",
        f"{sum(record.seconds.values()):.0f} s in all. Report: {places.report}",
        "",
        "What to try next:",
        *(f"  # {purpose}\n  {command}" for purpose, command in _next(places)),
    ]


def _next(places: Places) -> list[tuple[str, str]]:
    """(what for, command), runnable from the working folder."""
    picture, other = (_shown(places.data / "images" / f"{number:04d}.png") for number in (7, 12))
    model, full = _shown(places.model), _shown(places.config("full"))
    larger = PAIR_QUESTION.replace("<image>\n", "")
    return [
        ("ask it yourself", f"vlmtune chat {model} --image {picture}"),
        ("two pictures, one answer", f'vlmtune chat {model} --image {picture} --image {other} --ask "{larger}"'),
        ("what the model is trained on, token by token", f"vlmtune preview {full}"),
        ("edit the file, train again", f"vlmtune train {full} train.epochs=4 train.output_dir=runs/mine"),
        ("all curves", f"tensorboard --logdir {_shown(places.root / 'runs')}"),
        ("the same model without vlmtune", f"python {_shown(places.script)}"),
    ]


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return shlex.quote(os.path.relpath(path))


def write_report(record: Record) -> None:
    """Writes report.html from what the earlier stages left."""
    write_atomic(record.places.report, render(_page(record)))


def _page(record: Record) -> Page:
    places = record.places
    agreed = json.loads((places.root / "eval" / _AGREEMENT).read_text(encoding="utf-8"))
    seconds = sum(record.seconds.values())
    found = versions()
    return Page(
        title="vlmtune quickstart",
        lead="A vision-language model with 0.5 million random weights learned to read handwritten digits by full "
        "training, then to compare two of them by LoRA, and left as a plain transformers folder. Everything was "
        "measured on pictures that were kept apart from training.",
        headlines=[
            (f"{exact_match(places, 'full', 'digits'):.1f} %", "of the held-out digits read right after full training"),
            (f"{exact_match(places, 'lora', 'pairs'):.1f} %", "of the held-out pairs compared right after LoRA"),
            (f"{agreed['same']} of {agreed['asked']}", "answers are the same in plain transformers"),
            (f"{seconds // 60:.0f} min {seconds % 60:.0f} s", "for all of it, on this machine"),
        ],
        sections=[
            _figures(places),
            Charts(
                title="Loss",
                note="Mean over the trained tokens. The eval rows steer the choice of the checkpoint, so the figures "
                "above come from other rows.",
                charts=[
                    loss_chart(places.run("full"), "Full training, one picture per row"),
                    loss_chart(places.run("lora"), "LoRA, two pictures per row"),
                ],
            ),
            Examples(
                title="Ten held-out pictures",
                note="The first ten of the test rows, not chosen by their answers.",
                examples=_examples(places, "digits", ("start", "full"), range(10)),
            ),
            Examples(
                title="Six held-out pairs",
                note="The first six; the answer counts as right only if every character is.",
                examples=_examples(places, "pairs", ("full", "lora"), range(6)),
            ),
            *_mistakes(places),
            Commands(
                title="Go on",
                note=f"From the folder {Path.cwd()}, where the quickstart was started.",
                lines=[(purpose[0].upper() + purpose[1:], command) for purpose, command in _next(places)],
            ),
        ],
        footer="Digits: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, CC BY 4.0. Made with "
        + ", ".join(f"{name} {found[name]}" for name in ("vlmtune", "torch", "transformers", "peft") if name in found)
        + ".",
    )


def _figures(places: Places) -> Table:
    rows = []
    for task, question in TASKS.items():
        count = len(predictions(places, "start", task))
        rows.append([question, f"{count}", *(f"{exact_match(places, stage, task):.1f} %" for stage in STAGES)])
    return Table(
        title="Before and after",
        note="Share of the held-out rows that were answered word for word. The model after LoRA is the one that was "
        f"merged and exported to {places.model.name}/.",
        head=["question", "rows", *list(STAGES.values())[:-1], "after LoRA (exported)"],
        rows=rows,
        strong=4,
    )


def _mistakes(places: Places) -> list[Examples]:
    """The wrong answers to single digits, as far as they fill two lines; nothing if there are none."""
    wrong = [number for number, one in enumerate(predictions(places, "full", "digits")) if not one["exact"]]
    if not wrong:
        return []
    shown = wrong[:10]
    all_of = f"All {len(wrong)}" if len(shown) == len(wrong) else f"The first {len(shown)} of {len(wrong)}"
    return [
        Examples(
            title="What it got wrong",
            note=f"{all_of} held-out digits that were misread after full training.",
            examples=_examples(places, "digits", ("full", "lora"), shown),
        )
    ]


def _examples(places: Places, task: str, stages: Sequence[str], numbers: Sequence[int]) -> list[Example]:
    """Test rows by number, with the answers that the model gave after each of the stages."""
    rows = json.loads(places.rows(task, "test").read_text(encoding="utf-8"))
    answers = {stage: predictions(places, stage, task) for stage in stages}
    examples = []
    for number in numbers:
        row = rows[number]
        images = [row["image"]] if isinstance(row["image"], str) else row["image"]
        question, reference = (turn["value"] for turn in row["conversations"])
        examples.append(
            Example(
                pictures=[(places.data / image).read_bytes() for image in images],
                question=question.replace("<image>\n", ""),
                reference=reference,
                answers=[
                    Answer(
                        by=STAGES[stage],
                        text=answers[stage][number]["prediction"],
                        right=answers[stage][number]["exact"],
                    )
                    for stage in stages
                ],
                origin=answers[stages[0]][number]["origin"],
            )
        )
    return examples
