"""Every error that vlmtune raises on purpose.

    VlmtuneError                     1
    ├── UsageError                   2   the command line, or a request that makes no sense
    │   ├── ConfigError              2   the YAML or a key=value override
    │   └── RunFolderError           2   an output folder that is locked or belongs to another run
    ├── DataError                    3   a row, a picture, a source
    ├── WeightsError                 4   a model folder, a key, a shape, a checkpoint
    │   └── ExportError              4   an export that does not equal the model it came from
    ├── TrainingError                1   a run that cannot go on
    │   └── ProofError               1   the first step did not train what was promised
    └── Interrupted                130   Ctrl-C or SIGTERM, after a checkpoint was written

The number is the exit code. A message is one paragraph: *where: what was found; what was expected. What to do.*
"""

from __future__ import annotations


class VlmtuneError(Exception):
    """Base of all errors with a message meant for the user.

    Args:
        found: what was found, as a clause without a full stop.
        where: the place (``coco.jsonl:124``, ``run.yaml:7: train.epochs``, a folder); empty when there is none.
        expected: what was expected instead; empty when `found` says it all.
        remedy: what the user can do, as a sentence.
    """

    exit_code = 1

    def __init__(self, found: str, *, where: str = "", expected: str = "", remedy: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.where = where
        self.expected = expected
        self.remedy = remedy

    @property
    def reason(self) -> str:
        """The paragraph without the place, for lists that print the place in a column of its own."""
        text = self.found
        if self.expected:
            text += f"; expected {self.expected}"
        text = text if text.endswith((".", "!", "?")) else text + "."
        return f"{text} {self.remedy}".strip()

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Worker processes send errors back by pickle; the default would drop the keyword arguments.
        return _rebuild, (type(self), self.found, self.where, self.expected, self.remedy)


def _rebuild(kind: type[VlmtuneError], found: str, where: str, expected: str, remedy: str) -> VlmtuneError:
    return kind(found, where=where, expected=expected, remedy=remedy)


class UsageError(VlmtuneError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class RunFolderError(UsageError):
    pass


class DataError(VlmtuneError):
    exit_code = 3


class WeightsError(VlmtuneError):
    exit_code = 4


class ExportError(WeightsError):
    pass


class TrainingError(VlmtuneError):
    exit_code = 1


class ProofError(TrainingError):
    pass


class Interrupted(VlmtuneError):
    """Raised once the run has saved itself after a signal; `signal_number` makes the shell's exit code 128 + n."""

    exit_code = 130

    def __init__(
        self, found: str, *, signal_number: int = 2, where: str = "", expected: str = "", remedy: str = ""
    ) -> None:
        super().__init__(found, where=where, expected=expected, remedy=remedy)
        self.exit_code = 128 + signal_number
