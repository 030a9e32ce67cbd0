"""README.md and README_zh-CN.md say the same; every link of every page leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import PAGES, REPOSITORY, blocks, prose

ENGLISH = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "README_zh-CN.md").read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall(r"^(#+) .+$", prose(page), flags=re.MULTILINE)


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """The names that a code host gives to headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_both_have_the_same_sections() -> None:
    assert headings(CHINESE) == headings(ENGLISH)


def test_both_show_the_same_code() -> None:
    assert blocks(CHINESE) == blocks(ENGLISH)


def test_both_list_as_much() -> None:
    for pattern in (r"^- ", r"^- \*\*"):
        counts = [len(re.findall(pattern, page, flags=re.MULTILINE)) for page in (ENGLISH, CHINESE)]
        assert counts[0] == counts[1]


def test_both_link_to_the_same_pages() -> None:
    other = {"README.md": "README_zh-CN.md"}
    assert [other.get(link, link) for link in links(CHINESE)] == links(ENGLISH)


def test_the_chinese_page_is_chinese() -> None:
    lines = [line for line in prose(CHINESE).splitlines() if len(line) > 40 and "](" not in line]
    assert lines
    assert all(re.search(r"[\u4e00-\u9fff]", line) for line in lines)


def test_both_are_short() -> None:
    assert len(ENGLISH.splitlines()) <= 150
    assert len(CHINESE.splitlines()) <= 150


def test_every_page_of_the_documentation_is_linked() -> None:
    linked = {link.partition("#")[0] for link in links(ENGLISH)}
    assert {f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_tree_names_what_is_there() -> None:
    """Every folder of the repository and of the package has its phrase, and every name in the tree is a folder."""
    (tree,) = (block.text for block in blocks(ENGLISH) if block.language == "text")
    left = [line[:17].strip() for line in tree.splitlines()]
    assert {f"{name}/" for name in ("src/vlmtune", "tests", "benchmarks", "docs", "schema")} == {n for n in left if n}
    package = REPOSITORY / "src" / "vlmtune"
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    inside = "\n".join(line[17:] for line in tree.split("tests/", 1)[0].splitlines())
    named = {word for line in inside.splitlines() for word in re.split(r"\s{2,}", line)[0].split()}
    assert named == folders
    tested = tree.split("tests/", 1)[1].splitlines()[0]
    for name in re.findall(r"\b(unit|families|training|distributed|cli)\b", tested):
        assert (REPOSITORY / "tests" / name).is_dir()
