"""One self-contained HTML page about a job: curves, figures, samples, commands. It opens from a file, offline.

A page is a list of sections; each is data, and the template beside this file says how it looks. All text is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar

import jinja2

from vlmtune.report.curves import Chart

_MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    kind: ClassVar[str] = "charts"
    title: str
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """rows: as many cells as `head`, the first naming the row. strong: number of the column that matters most."""

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    strong: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model said. right: None where there is nothing to compare with."""

    by: str
    text: str
    right: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row with its answers. pictures: encoded files (PNG, JPEG, GIF, WebP), as they lie on disk."""

    pictures: Sequence[bytes]
    question: str
    reference: str
    answers: Sequence[Answer]
    origin: str = ""

    @property
    def sources(self) -> list[str]:
        """The pictures as `data:` addresses."""
        return [data_uri(picture) for picture in self.pictures]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    kind: ClassVar[str] = "examples"
    title: str
    examples: Sequence[Example]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """lines: (what for, the command)."""

    kind: ClassVar[str] = "commands"
    title: str
    lines: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """headlines: (figure, what it is), shown large at the top. footer: one line in small print."""

    title: str
    lead: str
    sections: Sequence[Charts | Table | Examples | Commands]
    headlines: Sequence[tuple[str, str]] = ()
    footer: str = ""


def render(page: Page) -> str:
    """The page as one HTML document."""
    return fill("page.html", page=page)


def fill(template: str, **values: object) -> str:
    """One of the templates beside this file, all text escaped; the pages share `style.css`."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_beside),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["data_uri"] = data_uri
    return environment.get_template(template).render(**values)


def _beside(name: str) -> str:
    return resources.files("vlmtune.report").joinpath(name).read_text(encoding="utf-8")


def data_uri(picture: bytes) -> str:
    """An encoded picture as an address that carries it.

    Raises:
        ValueError: bytes that no browser would show.
    """
    mime = next((mime for start, mime in _MIME.items() if picture.startswith(start)), None)
    if mime is None:
        raise ValueError(f"not a PNG, JPEG, GIF or WebP file: {picture[:8]!r}")
    return f"data:{mime};base64,{base64.b64encode(picture).decode('ascii')}"
