"""What lies where in the folder of a quickstart, and which stages of it are over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlmtune.errors import UsageError
from vlmtune.files import write_atomic

FORMAT_VERSION = 1
RECORD = "quickstart.json"
STAGES = ("data", "tiny", "full", "lora", "export", "plain", "report")


@dataclass(frozen=True, slots=True)
class Places:
    """Paths inside one quickstart folder."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def tiny(self) -> Path:
        """The tiny model with random weights."""
        return self.root / "tiny"

    @property
    def digits(self) -> Path:
        """The model after full training, exported."""
        return self.root / "digits"

    @property
    def model(self) -> Path:
        """The model after LoRA, merged and exported."""
        return self.root / "model"

    def config(self, stage: str) -> Path:
        return self.root / f"{stage}.yaml"

    def run(self, stage: str) -> Path:
        return self.root / "runs" / stage

    def rows(self, task: str, split: str) -> Path:
        return self.data / f"{task}.{split}.json"

    def evaluation(self, stage: str, task: str) -> Path:
        """Folder of results.json and predictions.jsonl of the model after `stage` on the test rows of `task`."""
        return self.root / "eval" / f"{stage}-{task}"

    @property
    def script(self) -> Path:
        return self.root / "ask_plain.py"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


@dataclass(slots=True)
class Record:
    """The file that says which stages are over and how many seconds each took.

    A stage is entered only once it is over, so an interrupted quickstart does its last stage again (or goes on with
    it: a training run resumes from its last checkpoint).
    """

    places: Places
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(stage in self.seconds for stage in STAGES)

    def once(self, stage: str, work: Callable[[], None]) -> bool:
        """Does the work unless an earlier call did it; whether it was done now."""
        if stage in self.seconds:
            return False
        began = time.perf_counter()
        work()
        self.seconds[stage] = round(time.perf_counter() - began, 1)
        record = {"version": FORMAT_VERSION, "seconds": self.seconds}
        write_atomic(self.places.root / RECORD, json.dumps(record, indent=2) + "\n")
        return True


def enter(root: Path) -> Record:
    """The record of a new or unfinished (or finished) quickstart in `root`, which need not exist.

    Raises:
        UsageError: the folder holds something else, or a quickstart of another format.
    """
    places = Places(root.expanduser().absolute())
    file = places.root / RECORD
    if file.is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            version, seconds = record["version"], dict(record["seconds"])
        except (ValueError, KeyError, TypeError):
            raise UsageError("cannot be read", where=str(file), remedy="Remove the folder, or name another.") from None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"has format {version}",
                where=str(file),
                expected=f"format {FORMAT_VERSION}",
                remedy="Remove the folder, or name another.",
            )
        return Record(places, seconds)
    if places.root.exists() and (not places.root.is_dir() or any(places.root.iterdir())):
        raise UsageError(
            "is not empty and not a quickstart" if places.root.is_dir() else "is a file",
            where=str(places.root),
            expected="a new or empty folder",
            remedy="Name another: vlmtune quickstart DIR.",
        )
    # Written at once, so that a quickstart that is killed in its first stage can go on.
    write_atomic(file, json.dumps({"version": FORMAT_VERSION, "seconds": {}}) + "\n")
    return Record(places)
