"""Pages with regions: where points lie, which way up, what is refused, and the square that a tower sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from vlmtune.config.schema import MediaOptions
from vlmtune.embed.pages import below, find_pages
from vlmtune.embed.regions import Page, SquareRule, read_page, refuse_bad_regions
from vlmtune.errors import DataError, UsageError

IGNORE = MediaOptions(exif="ignore")


def page(
    folder: Path, *points: Any, size: tuple[int, int] = (60, 40), media: MediaOptions = IGNORE, **more: Any
) -> Page:
    """A page of one picture and one shape for each pair of points."""
    if not (folder / "a.png").exists():
        PIL.Image.new("RGB", size).save(folder / "a.png")
    record = {"shapes": [{"label": f"l{n}", "points": both} for n, both in enumerate(points)], **more}
    (folder / "a.json").write_text(json.dumps(record), encoding="utf-8")
    return read_page(folder / "a.json", folder / "a.png", media, SquareRule())


def boxes(found: Page) -> list[tuple[int, int, int, int]]:
    return [region.box for region in found.regions]


def test_points_are_shares_unless_one_of_the_page_is_beyond_two(tmp_path: Path) -> None:
    shares = page(tmp_path, [[0, 0], [0.5, 1]], [[0.25, 0.5], [1.04, 0.75]])
    assert boxes(shares) == [(0, 0, 30, 40), (15, 20, 60, 30)] and shares.cut == 1
    pixels = page(tmp_path, [[0, 0], [1.9, 1]], [[1.5, 20.9], [59.5, 39]])
    assert boxes(pixels) == [(0, 0, 1, 1), (1, 20, 59, 39)] and pixels.cut == 0
    assert boxes(page(tmp_path, [[-3, -2], [30, 10]])) == [(0, 0, 30, 10)]


def test_corners_may_be_given_in_any_order(tmp_path: Path) -> None:
    around = [[[0.1, 0.2], [0.5, 0.8]], [[0.5, 0.8], [0.1, 0.2]], [[0.1, 0.8], [0.5, 0.2]], [[0.5, 0.2], [0.1, 0.8]]]
    assert set(boxes(page(tmp_path, *around))) == {(6, 8, 30, 32)}


def test_bad_regions_are_listed_in_one_message(tmp_path: Path) -> None:
    found = page(
        tmp_path,
        [[0.1, 0.1], [0.1, 0.9]],
        [[1.1, 0.1], [1.3, 0.9]],
        [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]],
        [[0.1, 0.1], [0.9, None]],
        [[0.1, 0.1], [0.9, 0.9]],
        [[0.1, 0.1], [0.9, float("nan")]],
        "no points",
        [[0.5, -0.4], [0.9, -0.1]],
    )
    assert boxes(found) == [(6, 4, 54, 36)] and len(found.bad) == 7
    with pytest.raises(DataError) as caught:
        refuse_bad_regions([found])
    text = str(caught.value)
    for words in (
        "7 regions of 1 page cannot be cut out",
        "1 ('l0') has no area: x 0.1 to 0.1, y 0.1 to 0.9 is 0 × 32 pixels of 60 × 40",
        "2 ('l1') is outside of the picture",
        "3 ('l2') has 3 points",
        "4 ('l3') has the points",
        "6 ('l5') has the points",
        "7 ('l6') has no points",
        "8 ('l7') is outside",
        "--skip-bad-regions",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (7, "is no object"),
        ({"label": 7, "points": [[0, 0], [1, 1]]}, "has the label 7, which is no text"),
        ({"label": "a", "shape_type": "polygon", "points": [[0, 0], [1, 1]]}, "is a polygon, not a rectangle"),
        ({"label": "a", "points": [[0, 0], [1, True]]}, "not two pairs of numbers"),
        ({"label": "a", "points": [[0, 0], [1, 10**400]]}, "not two pairs of numbers"),
        ({"label": "a", "points": [[0, 0], [1, "1"]]}, "not two pairs of numbers"),
        ({"label": "a\ud800", "points": [[0, 0], [1, 1]]}, r"has the label 'a\ud800', which is no text"),
        ({"label": "a", "shape_type": "x" * 10**6, "points": []}, "is a " + "x" * 40 + ", not a rectangle"),
    ],
)
def test_shapes_of_another_kind(tmp_path: Path, shape: Any, words: str) -> None:
    assert words in page(tmp_path, shapes=[shape, {"points": [[0, 0], [1, 1]]}]).bad[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "no `shapes`"),
        ('{"shapes": 3}', "no `shapes`"),
        ('{"shapes": []}', "no region is marked"),
        ('{"shapes": [{}], "imageWidth": "60", "imageHeight": 40}', "imageWidth is '60'"),
        ('{"shapes": [{}], "imageWidth": 61, "imageHeight": 40}', "made for a picture of 61×40 pixels, and a.png has"),
        ('{"shapes": [{}], "imageWidth": Infinity, "imageHeight": 40}', "imageWidth is inf, imageHeight 40; expected"),
        ('{"shapes": [{}], "imageWidth": 60, "imageHeight": 40.5}', "imageHeight 40.5; expected pixels"),
        ('{"shapes": [{}], "imageWidth": 6%s, "imageHeight": 40}' % ("0" * 400), "imageWidth is 60{39}, imageHeight"),
        ("\udcff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_are_no_page(tmp_path: Path, text: str, words: str) -> None:
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words) as caught:
        read_page(tmp_path / "a.json", tmp_path / "a.png", IGNORE, SquareRule())
    assert str(caught.value).startswith(str(tmp_path / "a.json"))


def test_a_picture_that_is_too_large_or_none_is_refused(tmp_path: Path) -> None:
    small = IGNORE.model_copy(update={"max_image_pixels": 100})
    with pytest.raises(DataError, match=r"60×40 = 2,400 pixels.*at most 100"):
        page(tmp_path, [[0, 0], [1, 1]], media=small)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a picture"):
        page(tmp_path, [[0, 0], [1, 1]])


def test_the_size_in_the_json_tells_whether_exif_was_applied(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "a.png", exif=exif)
    everything = [[0, 0], [1, 1]]
    for media in (IGNORE, MediaOptions(exif="apply")):
        for width, height in ((60, 40), (40, 60)):
            found = page(tmp_path, everything, media=media, imageWidth=width, imageHeight=height)
            assert found.open().size == (width, height) and boxes(found) == [(0, 0, width, height)]
    assert boxes(page(tmp_path, everything)) == [(0, 0, 60, 40)]
    assert boxes(page(tmp_path, everything, media=MediaOptions(exif="apply"))) == [(0, 0, 40, 60)]


def test_the_square_shows_the_region_and_white(tmp_path: Path) -> None:
    rule = SquareRule.of_edge(112)
    assert rule == SquareRule(square=112, least=50, most=87)
    square = np.asarray(rule.shown(PIL.Image.new("RGB", (60, 31), (10, 20, 30))))
    inside = (square != 255).any(-1)
    assert square.shape == (112, 112, 3) and inside.sum() == 60 * 31
    assert inside[40:71, 26:86].all()  # 81 rows are left: 40 above, 41 below
    assert rule.scaled((5, 3)) == (50, 30) and rule.scaled((200, 100)) == (87, 43)


def test_the_pages_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "b.json", "in/a.jpg", "in/a.json", "bare.png", "rows.json", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pages(tmp_path)
    assert [(str(source.stem), source.picture.name) for source in found.sources] == [("b", "b.PNG"), ("in/a", "a.jpg")]
    assert [file.name for file in found.bare] == ["bare.png"] and [file.name for file in found.orphans] == ["rows.json"]
    assert find_pages(tmp_path / "b.PNG").sources[0].json == tmp_path / "b.json"
    for place, json_file, words in (
        (tmp_path / "bare.png", None, "there is no bare.json beside it"),
        (tmp_path / "bare.png", tmp_path / "x.json", "there is no file"),
    ):
        with pytest.raises(DataError, match=words):
            find_pages(place, json_file)
    (tmp_path / "b.jpg").touch()
    with pytest.raises(DataError, match="would share one JSON"):
        find_pages(tmp_path)
    with pytest.raises(UsageError, match="no such picture"):
        find_pages(tmp_path / "none.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no page is in this folder"):
        find_pages(tmp_path / "empty")


def test_rows_may_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    assert below(tmp_path, [tmp_path / "in" / "a.png"]) == ["in/a.png"]
    with pytest.raises(UsageError, match="is not below it"):
        below(tmp_path / "in", [tmp_path / "a.png"])
    with pytest.raises(UsageError, match=r"\\udcff.png' is not UTF-8, and rows are"):
        below(tmp_path, [tmp_path / "\udcff.png"])
