"""Lengths of all rows, all bad rows, in one process or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from vlmtune.config.schema import SourceConfig
from vlmtune.data.encode import encode
from vlmtune.data.measure import Measured, measure
from vlmtune.data.sources import Corpus, open_corpus
from vlmtune.errors import VlmtuneError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(str(tiny_folder("internvl")))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for i in range(5):
        PIL.Image.new("RGB", (40 + 60 * i, 40), (i, i, i)).save(tmp_path / f"{i}.png")
    rows: list[Any] = [
        {"id": i, "image": f"{i % 5}.png", "conversations": turns("<image>\nWhat?", "A cat." * (i % 9 + 1))}
        for i in range(200)
    ]
    rows[7] = {"conversations": turns("What is 3?", "Three.")}
    rows[50]["image"] = "gone.png"
    rows[90] = {"id": 1, "conversations": turns("q", "")}
    rows[199]["rank"] = 3
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    return open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])


def run(corpus: Corpus, opened: OpenedFolder, **more: Any) -> Measured:
    return measure(corpus, opened, **{"workers": 0, **more})


def test_counts_equal_those_of_encode(corpus: Corpus, opened: OpenedFolder) -> None:
    found = run(corpus, opened)
    for i in (0, 7, 123, 199):
        encoded = encode(corpus.sample(i), opened)
        assert (found.num_tokens[i], found.num_trained[i]) == (encoded.num_tokens, encoded.num_trained)
    assert found.num_images.sum() == 200 - 3 and found.num_images[7] == 0
    assert found.smallest_side[0] == 40 and found.smallest_side[7] == 0
    assert found.unknown_keys == {"rank": 1}
    assert found.answer_hash[0] == found.answer_hash[9] != found.answer_hash[1]
    assert found.id_hash[7] == 0 and len(set(found.id_hash[:7])) == 7


def test_all_bad_rows_are_listed_with_place_and_reason(corpus: Corpus, opened: OpenedFolder) -> None:
    bad = run(corpus, opened).bad
    assert [(row.origin, row.index) for row in bad] == [("a.jsonl:51", 50), ("a.jsonl:91", 90), ("a.jsonl:201", 200)]
    assert "there is no file" in bad[0].reason and "the answer in message 2 is empty" in bad[1].reason
    assert not any(row.reason.startswith("a.jsonl") for row in bad)


def test_processes_find_what_one_process_finds(corpus: Corpus, opened: OpenedFolder) -> None:
    one, three = run(corpus, opened), run(corpus, opened, workers=3)
    for name in ("num_tokens", "num_trained", "num_images", "id_hash", "answer_hash", "smallest_side"):
        assert np.array_equal(one.__getattribute__(name), three.__getattribute__(name)), name
    assert one.bad == three.bad and one.unknown_keys == three.unknown_keys


def test_a_killed_process_is_said(corpus: Corpus, opened: OpenedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.measure._Job.__call__", lambda job, rows: os._exit(9))
    with pytest.raises(VlmtuneError, match=r"a process that reads rows was killed .*data\.workers"):
        run(corpus, opened, workers=2)


def test_decode_finds_what_a_header_hides(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    row = {"image": "cut.jpg", "conversations": turns("<image>", "x")}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "b.jsonl"))])
    assert not run(corpus, opened).bad
    (bad,) = run(corpus, opened, decode=True).bad
    assert bad.origin == "b.jsonl:1" and "cut.jpg cannot be decoded (image file is truncated" in bad.reason


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """They hold the run folder's files open, and there would be two more of them for every killed run."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from vlmtune.data import measure\n"
        "def work(): measure._start_worker(None); time.sleep(60)\n"
        "worker = multiprocessing.get_context('fork').Process(target=work); worker.start()\n"
        "print(worker.pid, flush=True); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.stdout.read()  # the pipe is closed by the last process that holds it
        process.wait(timeout=30)
    assert not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()
