"""The HTML preview: complete, escaped, bounded, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pages import Reader, browse, find_browser
from videos import number_of, write_video

from vlmtune.config.schema import RunConfig
from vlmtune.data import preview_page
from vlmtune.data.preview_page import ShownRow, facts, show_rows
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.models.load import open_folder
from vlmtune.report.preview import PreviewPage, render_preview

EVIL = "<script>document.title = 'executed'</script><img src=x onerror=\"document.body.textContent = 'gone'\">"
GREEN = (0, 200, 80)


@pytest.fixture(scope="module")
def large_tiles(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL whose pictures are cut as those of the real one are: up to 12 tiles of 448 and a thumbnail."""
    folder = tmp_path_factory.mktemp("large") / "internvl"
    shutil.copytree(tiny_folder("internvl"), folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "size": {"height": 448, "width": 448}, "max_patches": 12}))
    return folder


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def show(folder: Path, model: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[list[ShownRow], str]:
    """The rows of a run over `rows`, and the page."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"path": str(folder / "rows.jsonl")}]
    config = RunConfig.model_validate({"model": {"path": str(model)}, "data": {"sources": sources, **data}})
    encoder = RowEncoder(open_corpus(config.data.sources), open_folder(config.model.path, config.media))
    shown = list(show_rows(range(len(rows)), encoder, config.data.max_length))
    page = PreviewPage(title=EVIL, facts=facts(config, encoder), epoch=[EVIL], rows=shown, footer=EVIL)
    return shown, render_preview(page)


def decoded(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def text_of(row: ShownRow) -> str:
    return "".join(token.text for stretch in row.stretches for token in stretch.tokens)


@pytest.mark.parametrize("kind", ["internvl", "llava", "qwen2_5_vl", "smolvlm"])
def test_every_token_is_there_with_its_id(tmp_path: Path, tiny_folder: Callable[[str], Path], kind: str) -> None:
    model = tiny_folder(kind)
    PIL.Image.new("RGB", (70, 40), GREEN).save(tmp_path / "a.png")
    (row,), html = show(
        tmp_path, model, [{"image": "a.png", "conversations": turns(f"<image>\n{EVIL} 这", "A 猫 🐱.")}]
    )
    opened = open_folder(model)
    trained = [token for stretch in row.stretches if stretch.kind == "trained" for token in stretch.tokens]
    assert sum(len(token.ids) for token in trained) == row.num_trained
    assert "A 猫 🐱." in "".join(token.text for token in trained)
    assert EVIL in text_of(row) and "�" not in text_of(row)
    special = [token.text for token in trained if token.special]
    assert special == [opened.chat.stop.strip()] or special == [opened.chat.stop]
    ids = [attributes["title"] for attributes in Reader(html).of("span") if "title" in attributes]
    assert ids == [" ".join(map(str, token.ids)) for stretch in row.stretches for token in stretch.tokens]
    (picture,) = row.pictures
    assert len(picture.tiles) == picture.num_tiles and picture.num_left_out == 0
    for tile in map(decoded, picture.tiles):
        assert tile.size == picture.tile_size
        assert np.abs(np.asarray(tile, int) - GREEN).max() <= 3  # normalised, and back


def test_tiles_are_laid_out_as_they_were_cut(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, :40], halves[:, 40:] = (200, 0, 0), (0, 0, 200)
    PIL.Image.fromarray(halves).save(tmp_path / "a.png")
    (row,), _ = show(tmp_path, tiny_folder("internvl"), [{"image": "a.png", "conversations": turns("<image>\n?", "b")}])
    (picture,) = row.pictures
    assert picture.grid == (2, 1) and picture.num_tiles == 3
    middles = [decoded(tile).getpixel((16, 16)) for tile in picture.tiles[:2]]
    assert middles == [(200, 0, 0), (0, 0, 200)]


def test_nothing_is_fetched_and_nothing_is_executed(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "<b>&.png")
    rows = [
        {"id": EVIL, "image": "<b>&.png", "conversations": turns(f"<image>\n{EVIL}", EVIL)},
        {"image": f"{EVIL.replace('/', '')}.png", "conversations": turns("<image>\n?", "b")},
    ]
    shown, html = show(tmp_path, tiny_folder("internvl"), rows)
    page = Reader(html)
    assert shown[1].error and "✗ bad row." in page.text and shown[1].error in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    assert "url(" not in html and "@import" not in html
    policy = next(attributes["content"] for attributes in page.of("meta") if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'")
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for attributes in page.of("a")]
    assert links and all(link is not None and link[1:] in anchors for link in links)
    assert all(attributes.get("alt") for attributes in page.of("img"))


def test_boxes_lie_on_the_resized_picture(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    PIL.Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    objects = {"ref": [], "bbox": [[100, 25, 200, 75]]}
    messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "At <bbox>."}]
    (row,), html = show(
        tmp_path, tiny_folder("internvl"), [{"messages": messages, "images": ["a.png"], "objects": objects}]
    )
    (picture,) = row.pictures
    (box,) = picture.boxes
    width, height = picture.whole_size
    assert picture.whole is not None and (width, height) == (64, 32)
    assert (box.left, box.top, box.width, box.height) == (width / 2, height / 4, width / 2, height / 2)
    assert box.label.split(": ")[0] in text_of(row)
    drawn = [attributes for attributes in Reader(html).of("rect")]
    assert [drawn[-1][name] for name in ("x", "y", "width", "height")] == ["32.0", "8.0", "32.0", "16.0"]


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_frames_of_a_video_with_their_times(tmp_path: Path, tiny_folder: Callable[[str], Path], kind: str) -> None:
    write_video(tmp_path / "a.mp4", codec="mpeg4", num_frames=40, rate=10)
    messages = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "It."}]
    (row,), html = show(tmp_path, tiny_folder(kind), [{"messages": messages, "videos": ["a.mp4"]}])
    (film,) = row.films
    assert row.pictures == () and row.counts == ("1 video of 8 frames",)
    numbers = [picture.frame for picture in film.pictures]
    assert numbers[0] == 0 and numbers[-1] == 39 and len(numbers) == 8
    assert [picture.time for picture in film.pictures] == [pytest.approx((n or 0) / 10) for n in numbers]
    for picture in film.pictures:
        (tile,) = picture.tiles
        assert number_of(decoded(tile).resize((128, 96), PIL.Image.Resampling.NEAREST)) == picture.frame
    assert "frame 39" in Reader(html).text and "at 0:03.9" in Reader(html).text


def test_a_page_of_many_tiles_stays_small(tmp_path: Path, large_tiles: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "a.jpg", quality=90)  # the worst that a JPEG can meet
    rows = [{"image": "a.jpg", "conversations": turns("<image>\n?", "b")}] * 8
    shown, html = show(tmp_path, large_tiles, rows)
    assert {picture.num_tiles for row in shown for picture in row.pictures} == {13}
    assert all(len(picture.tiles) == 13 and picture.is_scaled for row in shown for picture in row.pictures)
    assert len(html) < 5_000_000
    assert "Stored smaller than the model gets them" in html


def test_what_is_left_out_is_counted(
    tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_page, "PAGE_BYTES", 9_000)
    monkeypatch.setattr(preview_page, "MOST_TOKENS", 30)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "a.png")
    long = {"image": ["a.png"] * 3, "conversations": turns("<image>" * 3, "many words " * 40)}
    (row,), html = show(tmp_path, tiny_folder("internvl"), [long], max_length=64)
    shown = sum(len(token.ids) for stretch in row.stretches for token in stretch.tokens)
    pictures = sum(picture.num_tokens for picture in row.pictures)
    assert shown == 30 and row.num_tokens_left_out == row.num_tokens - pictures - 30 and row.too_long
    left_out = sum(picture.num_left_out for picture in row.pictures)
    assert left_out > 0 and sum(len(tile) for picture in row.pictures for tile in picture.tiles) <= 9_000
    text = Reader(html).text
    assert f"{left_out} tiles are left out" in text and "more tokens of its text are left out" in text
    assert "longer than data.max_length" in text


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on PATH; Debian: apt-get install chromium")
def test_a_browser_shows_it(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    browser = find_browser()
    assert browser is not None
    PIL.Image.new("RGB", (300, 200), GREEN).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "conversations": turns(f"<image>\n{EVIL}", "Plain green.")}]
    (row,), html = show(tmp_path, tiny_folder("internvl"), rows)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    dom, picture = browse(browser, tmp_path / "page.html", tmp_path, (900, 1100))
    page = Reader(dom)
    assert "Plain green." in page.text and EVIL in page.text and not page.of("script")
    assert "<title>executed" not in dom
    seen = np.asarray(PIL.Image.open(picture).convert("RGB"), int)

    def share(colour: tuple[int, int, int]) -> float:
        return float((np.abs(seen - colour).max(axis=-1) <= 4).sum())

    # Each tile of 32 is shown 96 wide: the pictures were decoded. The tints of trained tokens are there too.
    assert share(GREEN) >= 0.9 * len(row.pictures[0].tiles) * 94 * 94
    assert share((213, 240, 222)) > 200 and share((192, 231, 205)) > 50
    assert base64.b64encode(row.pictures[0].tiles[0]).decode() in dom
