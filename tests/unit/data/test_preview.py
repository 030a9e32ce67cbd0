"""What a person sees of a row is all of it, and what is green is what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from vlmtune.config.schema import RunConfig, SourceConfig
from vlmtune.data.encode import encode
from vlmtune.data.preview import epoch_lines, first_rows, media_counts, row_text, runs
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import IGNORED, Encoded, MediaPlan, MediaRef, Span
from vlmtune.errors import UsageError
from vlmtune.models.load import open_folder

ROW = {
    "id": "x7",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is [red]this[/]?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And 这 <image> now?"},
        {"from": "gpt", "value": "Two\ndogs [bold]."},
    ],
}


@pytest.mark.parametrize("kind", ["internvl", "llava", "qwen2_5_vl", "smolvlm"])
def test_the_whole_sequence_is_shown_and_trained_text_stands_out(
    tmp_path: Path, tiny_folder: Callable[[str], Path], kind: str
) -> None:
    opened = open_folder(str(tiny_folder(kind)))
    PIL.Image.new("RGB", (70, 40)).save(tmp_path / "a.png")
    PIL.Image.new("RGB", (32, 64)).save(tmp_path / "b.png")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])
    sample = corpus.sample(0)
    encoded = encode(sample, opened)
    found = runs(encoded, opened)
    assert sum(run.num_tokens for run in found) == encoded.num_tokens
    assert sum(run.num_tokens for run in found if run.kind == "trained") == encoded.num_trained
    trained = [run.text for run in found if run.kind == "trained"]
    assert len(trained) == 2 and "A cat." in trained[0] and "Two\ndogs [bold]." in trained[1]
    masked = "".join(run.text for run in found if run.kind == "masked")
    assert "What is [red]this[/]?" in masked and "And 这" in masked and "A cat" not in masked
    tags = [run.text for run in found if run.kind == "image"]
    assert [tag.split(" →")[0] for tag in tags] == ["[image 70×40", "[image 32×64"]
    assert f"{encoded.media[0][1].num_tokens:,} tokens]" in tags[0]

    console = Console(width=80, highlight=False, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(row_text(sample, encoded, opened))
    text = capture.get()
    assert "a.jsonl:1" in text and "2 images, id x7" in text and "[bold]" in text and "[red]" in text
    green = text.split("A cat.")[0].rsplit("\x1b[", 1)[1]
    assert green.startswith("1;32m")


def test_epoch_and_rows_in_training_order(tmp_path: Path) -> None:
    for name, num in (("a.jsonl", 40), ("b.jsonl", 10)):
        (tmp_path / name).write_text("{}\n" * num)
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {
                "sources": [{"path": str(tmp_path / "a.jsonl"), "repeat": 0.5}, {"path": str(tmp_path / "b.jsonl")}]
            },
        }
    )
    corpus = open_corpus(config.data.sources)
    assert next(epoch_lines(corpus, config)) == "a.jsonl: 40 rows, repeat 0.5 = 20 in an epoch"
    assert "30 rows in 2 steps of 16" in list(epoch_lines(corpus, config))[-1]
    rows = first_rows(corpus, config, 8)
    assert len(set(rows)) == 8 and rows != sorted(rows) and len(first_rows(corpus, config, 99)) == 30


def test_rows_are_found_by_what_messages_call_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n\n{}\n{}\n")
    (tmp_path / "b.json").write_text("[{}, {}]")
    one = open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])
    both = open_corpus([SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.json")])
    assert [one.find("1"), one.find("3"), one.find("a.jsonl:4")] == [0, 1, 2]
    assert [both.find(both.origin(i)) for i in range(5)] == list(range(5))
    for corpus, text in ((one, "2"), (one, "9"), (one, "x"), (one, "b.json:1"), (both, "1"), (both, "b.json:3")):
        with pytest.raises(UsageError):
            corpus.find(text)
    with pytest.raises(UsageError, match=r"expected a\.jsonl:N or b\.json:N"):
        both.find("1")


def test_a_video_is_one_tag_where_its_frames_touch(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(str(tiny_folder("internvl")))
    plan = MediaPlan(size=(64, 48), num_tokens=3, num_tiles=1, layout=(1,), is_frame=True)
    film, picture = MediaRef(path="a.mp4"), MediaRef(path="b.png")
    refs = [replace(film, frame=0), replace(film, frame=9), picture, replace(film, frame=4), replace(film, frame=4)]
    ids = np.full(20, 5, np.int32)
    starts = [2, 5, 8, 11, 16]  # the last frame stands apart, and begins the film anew
    encoded = Encoded(
        input_ids=ids,
        labels=np.full_like(ids, IGNORED),
        spans=tuple(Span(start, 3, "image", index) for index, start in enumerate(starts)),
        media=tuple((ref, plan) for ref in refs),
        origin="a.jsonl:1",
    )
    found = runs(encoded, opened)
    assert sum(run.num_tokens for run in found) == 20
    assert [(run.media, run.text) for run in found if run.kind == "image"] == [
        ((0, 1), "[video 1: 2 frames of 64×48, 0 … 9, 6 tokens]"),
        ((2,), "[image 64×48 → 1 tile, 3 tokens]"),
        ((3,), "[video 2: frame 4, 64×48, 3 tokens]"),
        ((4,), "[video 3: frame 4, 64×48, 3 tokens]"),
    ]
    assert media_counts(encoded) == ["1 image", "3 videos of 4 frames"]
