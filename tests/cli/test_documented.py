"""What README and help texts show can be typed: every command line parses, every YAML loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vlmtune.cli import main
from vlmtune.config.load import load_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `vlmtune …` of a text of shell lines, behind variables, srun or torchrun."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if "vlmtune" in words:
            found.append(words[words.index("vlmtune") + 1 :])
    return found


def parses(argv: list[str]) -> None:
    if argv != ["--version"]:
        main._parse(argv[0], main._load(argv[0]), argv[1:])


@pytest.mark.parametrize("name", main.VERBS)
def test_the_examples_of_a_help_text_parse(name: str) -> None:
    examples = commands(main._load(name).EXAMPLES)
    assert examples
    for argv in examples:
        assert argv[0] == name
        parses(argv)


def test_the_commands_of_the_readme_parse() -> None:
    found = [argv for block in blocks(README, "(?:sh|bash|console|shell)?") for argv in commands(block)]
    assert {"check", "train", "export", "chat"} <= {argv[0] for argv in found}
    for argv in found:
        parses(argv)


def test_the_targets_of_the_readme_are_in_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    assert set(targets) <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


def test_the_configurations_of_the_readme_load(tmp_path: Path) -> None:
    found = blocks(README, "yaml")
    assert found
    for block in found:
        (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
        load_config(tmp_path / "run.yaml")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
