"""The HTML preview: rows as the model will see them, in one self-contained file that opens offline.

The rows come from `data.preview_page`; the template beside this file says how they look. All text is escaped, and the
page's own policy forbids every script and every address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.data.preview_page import ShownRow
from vlmtune.report.page import fill


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewPage:
    """facts: (name, value) of the configuration. epoch: lines on what an epoch holds."""

    title: str
    facts: Sequence[tuple[str, str]]
    epoch: Sequence[str]
    rows: Sequence[ShownRow]
    footer: str = ""

    @property
    def num_bad(self) -> int:
        return sum(bool(row.error) for row in self.rows)

    @property
    def num_left_out(self) -> int:
        """Tiles that are not on the page."""
        return sum(
            picture.num_left_out
            for row in self.rows
            for picture in (*row.pictures, *(frame for film in row.films for frame in film.pictures))
        )


def render_preview(page: PreviewPage) -> str:
    """The page as one HTML document."""
    return fill("preview.html", page=page)
