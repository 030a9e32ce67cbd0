"""The report page: everything in one file, every word escaped."""

from __future__ import annotations

import base64
import io

import PIL.Image
import pytest
from pages import Reader

from vlmtune.report.curves import Chart, Curve
from vlmtune.report.page import Answer, Charts, Commands, Example, Examples, Page, Table, data_uri, render

EVIL = "<script>alert('x')</script> & \"y\""


def png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (4, 4), 200).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def html() -> str:
    answers = [Answer(by=EVIL, text=EVIL, right=False), Answer(by="b", text=" "), Answer(by="c", text="7", right=True)]
    example = Example(pictures=[png(), png()], question=EVIL, reference=EVIL, answers=answers, origin=EVIL)
    chart = Chart(title=EVIL, curves=[Curve(label=EVIL, points=[(1, 1.0), (2, 0.5)], style="marks")])
    return render(
        Page(
            title=EVIL,
            lead=EVIL,
            headlines=[(EVIL, EVIL)],
            sections=[
                Charts(title=EVIL, charts=[chart], note=EVIL),
                Table(title=EVIL, head=["a", EVIL], rows=[[EVIL, EVIL]], strong=1, note=EVIL),
                Examples(title=EVIL, examples=[example], note=EVIL),
                Commands(title=EVIL, lines=[(EVIL, EVIL)], note=EVIL),
            ],
            footer=EVIL,
        )
    )


def test_every_text_is_shown_as_it_stands(html: str) -> None:
    page = Reader(html)
    assert not page.of("script") and not page.of("b")
    # title, h1, lead, headline 2, charts 4 + curve label, table 5, examples 5, commands 4, footer; more in attributes
    assert page.text.count(EVIL) >= 24


def test_nothing_is_fetched(html: str) -> None:
    page = Reader(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes and "xlink:href" not in attributes
    assert [attributes["src"] for attributes in page.of("img")] == [data_uri(png())] * 2
    assert "url(" not in html and "@import" not in html
    policy = next(attributes["content"] for attributes in page.of("meta") if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_verdicts_and_silence_are_words_not_only_colours(html: str) -> None:
    text = Reader(html).text
    assert text.count("✗ wrong") == 1 and text.count("✓ right") == 1 and "(nothing)" in text


def test_pictures_travel_as_they_are() -> None:
    kind, _, payload = data_uri(png()).partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(payload) == png()
    file = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(file, "JPEG")
    assert data_uri(file.getvalue()).startswith("data:image/jpeg;")
    with pytest.raises(ValueError, match="not a PNG"):
        data_uri(b"BM..")
