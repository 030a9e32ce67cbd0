"""The documents of the repository, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
SHELL = ("sh", "bash", "shell")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the word behind the opening fence, and the lines inside."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks in order; fences inside lists may be indented."""
    found: list[Block] = []
    language: str | None = None
    inside: list[str] = []
    for line in page.splitlines():
        fence = re.fullmatch(r"\s*```(\S*)\s*", line)
        if fence and language is None:
            language, inside = fence[1], []
        elif fence:
            found.append(Block(str(language), "".join(f"{one}\n" for one in inside)))
            language = None
        elif language is not None:
            inside.append(line)
    assert language is None, "a fence is not closed"
    return found


def shell_lines(page: str) -> list[str]:
    """What a reader would type: the lines of shell blocks, and the lines behind `$` of all others."""
    lines = []
    for block in blocks(page):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                lines.append(line[2:])
            elif block.language in SHELL:
                lines.append(line)
    return lines


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", page, flags=re.MULTILINE | re.DOTALL)
