"""The digits: as published, in three disjoint splits, with rows that the product's own reader takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vlmtune.config.schema import SourceConfig
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.quickstart import data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "data"
    data.write_data(out)
    return out


def rows(folder: Path, task: str, split: str) -> list[dict]:
    return json.loads((folder / f"{task}.{split}.json").read_text(encoding="utf-8"))


def test_the_published_digits() -> None:
    pixels, digits = data.load_digits()
    assert pixels.shape == (1797, 8, 8) and pixels.dtype == np.uint8 and pixels.max() == 16
    # The class counts that UCI states for this set (optdigits.names).
    assert np.bincount(digits).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_a_picture_shows_its_digit(folder: Path) -> None:
    """A ruler that shares nothing with the model: the nearest training picture names nearly every test picture."""

    def picture(name: str) -> np.ndarray:
        with PIL.Image.open(folder / name) as image:
            assert image.size == (data.SIDE, data.SIDE) and image.format == "PNG"
            return np.asarray(image.convert("L"), dtype=np.float32).ravel()

    train, test = rows(folder, "digits", "train"), rows(folder, "digits", "test")
    known = np.stack([picture(row["image"]) for row in train])
    asked = np.stack([picture(row["image"]) for row in test])
    nearest = ((known**2).sum(1)[None] - 2 * asked @ known.T).argmin(1)  # |a - k|² without |a|²
    answers = [row["conversations"][1]["value"] for row in train]
    right = [answers[near] == row["conversations"][1]["value"] for near, row in zip(nearest, test, strict=True)]
    assert np.mean(right) > 0.97
    assert known.mean() > 128, "black ink on white paper"


def test_no_picture_is_in_two_splits(folder: Path) -> None:
    of = {split: {row["image"] for row in rows(folder, "digits", split)} for split in data.SPLITS}
    assert {split: len(names) for split, names in of.items()} == data.SPLITS
    assert len(set.union(*of.values())) == data.NUM_DIGITS == sum(data.SPLITS.values())
    assert data.SPLITS["test"] >= 350
    for split, count in data.NUM_PAIRS.items():
        pairs = rows(folder, "pairs", split)
        assert len(pairs) == count
        assert {image for row in pairs for image in row["image"]} <= of[split]


def test_pairs_are_answered_rightly(folder: Path) -> None:
    digit = {
        row["image"]: int(row["conversations"][1]["value"]) for s in data.SPLITS for row in rows(folder, "digits", s)
    }
    for row in rows(folder, "pairs", "test"):
        first, second = (digit[image] for image in row["image"])
        said = re.fullmatch(r"(\d) and (\d): the (first|second) is larger\.", row["conversations"][1]["value"])
        assert said and (int(said[1]), int(said[2])) == (first, second)
        assert (said[3] == "first") == (first > second) and first != second


@pytest.mark.parametrize(("task", "pictures"), [("digits", 1), ("pairs", 2)])
def test_the_rows_are_llava_rows(folder: Path, task: str, pictures: int) -> None:
    corpus = open_corpus((SourceConfig(path=str(folder / f"{task}.val.json")),), allow=())
    samples = [corpus.sample(i) for i in range(len(corpus))]
    assert all(len(sample.images) == pictures for sample in samples)
    assert all(Path(image.ref.path).is_file() for sample in samples for image in sample.images)


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    data.write_data(tmp_path)
    for file in ("digits.train.json", "pairs.test.json", "images/0042.png", "LICENSE.md"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    assert "CC BY 4.0" in (folder / "LICENSE.md").read_text()
