"""What the pages and help texts show can be typed: every command line parses, every YAML loads, every key exists."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from documents import PAGES, REPOSITORY, blocks, prose, shell_lines

from vlmtune.cli import main
from vlmtune.config.explain import leaves, option_named
from vlmtune.config.load import load_config
from vlmtune.config.schema import ImageOptions
from vlmtune.errors import ConfigError

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(lines: list[str]) -> list[list[str]]:
    """The arguments of every `vlmtune …`, behind variables, srun or torchrun, as a job of an array would see them."""
    found = []
    for line in lines:
        words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)
        if "vlmtune" in words:
            found.append(words[words.index("vlmtune") + 1 :])
    return found


def parses(argv: list[str]) -> None:
    if argv != ["--version"]:
        module, rest = main._split(argv)
        main._parse(module, main._load(module), rest)


@pytest.mark.parametrize("module", [*main.VERBS, *main.SUBVERBS.values()])
def test_the_examples_of_a_help_text_parse(module: str) -> None:
    examples = commands(main._load(module).EXAMPLES.splitlines())
    assert examples
    for argv in examples:
        assert main._split(argv)[0] == module
        parses(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for argv in commands(shell_lines(text)):
        parses(argv)
    for words in re.findall(r"`vlmtune ([^`]+)`", prose(text)):
        verb, *rest = words.split()
        assert verb in main.VERBS, words
        if "…" not in words:
            options = [word for word in rest if word.startswith("--")]
            parses_options(main._split(words.split())[0], options)


def parses_options(verb: str, options: list[str]) -> None:
    """Whether a verb knows the options; in running text their values and the verb's other arguments may be left out."""
    parser = argparse.ArgumentParser()
    main._load(verb).add_arguments(parser)
    assert set(options) <= {*parser._option_string_actions, "--debug", "--offline"}


def test_the_readme_shows_every_verb() -> None:
    shown = {argv[0] for argv in commands(shell_lines(README))}
    assert set(main.VERBS) - {"quickstart"} <= shown  # `make demo` is the quickstart


def test_the_targets_of_the_readme_are_in_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    assert set(targets) <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_configurations_of_a_page_load(page: Path, tmp_path: Path) -> None:
    """A page may show a part of a YAML; what is required is added to it."""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "yaml":
            values = yaml.safe_load(block.text)
            values.setdefault("model", {"path": "model"})
            values.setdefault("data", {}).setdefault("sources", {"path": "rows.jsonl"})
            (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
            load_config(tmp_path / "run.yaml")
        elif block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_that_a_page_names_exist(page: Path) -> None:
    known = {*leaves(), *(f"model.image.{name}" for name in ImageOptions.model_fields)}
    text = prose(page.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:model|tuning|data|train|eval)\.[a-z_.]+[a-z_])(?:[:=][^`]*)?`", text):
        module = REPOSITORY / "src" / "vlmtune" / f"{name.replace('.', '/')}.py"
        file = name.endswith((".json", ".jsonl", ".txt"))
        is_module = module.is_file() or (module.with_suffix("") / "__init__.py").is_file()
        assert name in known or file or name.startswith("train.extra.") or is_module, name


def test_names_of_other_tools_are_understood_as_the_page_says() -> None:
    """Every name of another tool that a message understands in the way the table says, where it is a single option."""
    table = (REPOSITORY / "docs" / "coming-from.md").read_text(encoding="utf-8")
    pairs = re.findall(
        r"^\| `-{0,2}(\w+)`[^|]*\| `((?:model|tuning|data|train|eval)\.[\w.]+)", table, flags=re.MULTILINE
    )
    assert len(pairs) >= 10
    for theirs, ours in pairs:
        meant = option_named(theirs)
        assert meant is None or meant == ours, (theirs, meant, ours)


def test_the_mistake_of_the_readme_is_told_as_shown(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^error: (command line: .+)$", README, flags=re.MULTILINE)
    (tmp_path / "ui.yaml").write_text(next(block.text for block in blocks(README) if block.language == "yaml"))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "ui.yaml", ["train.learnig_rate=1e-4"])
    assert str(caught.value) == shown
