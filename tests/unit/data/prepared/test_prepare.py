"""Prepared shards: the same as encoding afresh, made once, whole or not at all, by one process or many."""

from __future__ import annotations

import base64
import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.schema import ImageOptions, MediaOptions, SourceConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.prepared.job import Look
from vlmtune.data.prepared.measure import COLUMNS
from vlmtune.data.prepared.prepare import Prepared, merge, open_prepared, prepare, prepare_share
from vlmtune.data.prepared.store import Shard, ShardWriter
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.data.sample import Laid, MediaPlan, MediaRef
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.files import write_atomic
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


def run(corpus: Corpus, opened: OpenedFolder, into: Path, workers: int = 0, look: Look = "no") -> Prepared:
    return prepare(corpus, opened, into=into, workers=workers, look=look)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that is in a folder of prepared rows, but for the memory of indices."""
    files = [path for path in folder.rglob("*") if path.is_file() and "index" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_counts_equal_those_of_encode(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    found = run(corpus, opened, tmp_path / "p").measured
    for i in (0, 7, 123, 199):
        encoded = encode(corpus.sample(i), opened)
        assert (found.num_tokens[i], found.num_trained[i]) == (encoded.num_tokens, encoded.num_trained)
        assert found.num_visual[i] == sum(plan.num_tokens for _, plan in encoded.media)
    assert found.num_images.sum() == 200 - 3 and found.num_images[7] == 0
    assert found.smallest_side[0] == 40 and found.smallest_side[7] == 0
    assert found.unknown_keys == {"rank": 1}
    assert found.answer_hash[0] == found.answer_hash[9] != found.answer_hash[1]
    assert found.id_hash[7] == 0 and len(set(found.id_hash[:7])) == 7


def test_prepared_rows_are_what_encode_gives(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    rows = pickle.loads(pickle.dumps(run(corpus, opened, tmp_path / "p").rows))
    for i in [*range(50), 51, 199]:
        found, wanted = rows.encoded(i), encode(corpus.sample(i), opened)
        assert np.array_equal(found.input_ids, wanted.input_ids) and found.input_ids.dtype == wanted.input_ids.dtype
        assert np.array_equal(found.labels, wanted.labels) and found.labels.dtype == wanted.labels.dtype
        assert (found.spans, found.media, found.origin) == (wanted.spans, wanted.media, wanted.origin)
    with pytest.raises(DataError, match=r"a\.jsonl:51: there is no file .*gone\.png"):
        rows.encoded(50)


def test_all_bad_rows_are_listed_with_place_and_reason(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    bad = run(corpus, opened, tmp_path / "p").measured.bad
    assert [(row.origin, row.index) for row in bad] == [("a.jsonl:51", 50), ("a.jsonl:91", 90), ("a.jsonl:201", 200)]
    assert "there is no file" in bad[0].reason and "the answer in message 2 is empty" in bad[1].reason
    assert not any(row.reason.startswith("a.jsonl") for row in bad)


def test_processes_make_what_one_process_makes(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("A cat.", "A dog. ") * 3)
    both = open_corpus([SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")])
    one, two = run(both, opened, tmp_path / "1"), run(both, opened, tmp_path / "2", workers=2)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert one.measured.bad == two.measured.bad and one.num_made == two.num_made == len(both)


def test_what_was_prepared_is_not_prepared_again(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    first = run(corpus, opened, tmp_path / "p")
    (shard,) = (tmp_path / "p").rglob("0*.safetensors")
    written = shard.stat().st_mtime_ns
    again = run(corpus, opened, tmp_path / "p", look="headers")
    assert (first.num_made, again.num_made, again.num_kept) == (201, 0, 201)
    assert shard.stat().st_mtime_ns == written and again.measured.bad == first.measured.bad
    assert np.array_equal(again.measured.num_tokens, first.measured.num_tokens)


def test_a_file_that_came_later_heals_its_row(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    assert len(run(corpus, opened, tmp_path / "p").measured.bad) == 3
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "gone.png")
    healed = run(corpus, opened, tmp_path / "p")
    assert [row.index for row in healed.measured.bad] == [90, 200]
    assert healed.measured.num_tokens[50] == encode(corpus.sample(50), opened).num_tokens
    assert len(list((tmp_path / "p").rglob("0*.safetensors"))) == 1


def test_a_file_listed_twice_has_its_shards_once(opened: OpenedFolder, tmp_path: Path) -> None:
    file, into = tmp_path / "a.jsonl", tmp_path / "p"
    rows = [{"id": i, "image": "gone.png", "conversations": turns("<image>Q", "A")} for i in range(300)]
    file.write_text("\n".join(map(json.dumps, rows)))
    twice = open_corpus([SourceConfig(path=str(file)), SourceConfig(path=str(file), repeat=2)])
    assert len(run(twice, opened, into).measured.bad) == 600
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "gone.png")
    healed = run(twice, opened, into, look="headers")
    assert not healed.measured.bad and (healed.num_made, healed.num_kept) == (600, 0)
    shares = [prepare_share(twice, opened, into=tmp_path / "q", workers=0, part=part, parts=2) for part in (1, 2)]
    assert sorted(shares) == [(44, 44), (256, 256)]
    assert merge(twice, opened, tmp_path / "q").measured.num_tokens.all()


def test_a_look_at_the_headers_finds_changed_pictures(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    run(corpus, opened, tmp_path / "p")
    PIL.Image.new("RGB", (500, 100)).save(tmp_path / "1.png")
    (tmp_path / "2.png").unlink()
    assert not run(corpus, opened, tmp_path / "p").num_made  # training trusts what was prepared
    found = run(corpus, opened, tmp_path / "p", look="headers")
    assert found.num_made == 201 and {row.index for row in found.measured.bad} >= {2, 12, 22}
    assert found.rows.encoded(1).num_tokens == encode(corpus.sample(1), opened).num_tokens


def test_another_file_or_model_makes_new_shards(
    corpus: Corpus, opened: OpenedFolder, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run(corpus, opened, tmp_path / "p")
    other = open_folder(tiny_folder("internvl"), MediaOptions(image=ImageOptions(max_tiles=1)))
    run(corpus, other, tmp_path / "p")
    assert len(list((tmp_path / "p").glob("a-*"))) == 2
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"conversations": turns("q", "a")}))
    grown = open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])
    found = run(grown, opened, tmp_path / "p")
    assert found.num_made == len(grown) == 202
    (left,) = (tmp_path / "p").glob("a-*")  # those of the old file are useless to everyone
    assert left == found.folders[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_shard_is_made_again(corpus: Corpus, opened: OpenedFolder, tmp_path: Path, damage: str) -> None:
    run(corpus, opened, tmp_path / "p")
    whole = contents(tmp_path / "p")
    (shard,) = (tmp_path / "p").rglob("0*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes({"cut": bytes(content[:-9]), "flipped": bytes(content), "empty": b""}[damage])
    assert run(corpus, opened, tmp_path / "p").num_made == 201
    assert contents(tmp_path / "p") == whole


def test_a_whole_shard_under_another_number_is_not_taken_for_it(
    many: Corpus, opened: OpenedFolder, tmp_path: Path
) -> None:
    run(many, opened, tmp_path / "p")
    whole = contents(tmp_path / "p")
    first, second, *_ = sorted((tmp_path / "p").rglob("0*.safetensors"))
    first.rename(first.with_name(first.name.replace("00000-", "00001-")))
    second.unlink()
    assert run(many, opened, tmp_path / "p").num_made == 512
    assert contents(tmp_path / "p") == whole


def test_an_array_of_jobs_and_its_merge(opened: OpenedFolder, tmp_path: Path) -> None:
    lines = [json.dumps({"conversations": turns(f"What is {i}?", f"It is {i}.")}) for i in range(700)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "n.jsonl"))])
    whole = run(corpus, opened, tmp_path / "whole")
    for part in (3, 1):
        prepare_share(corpus, opened, into=tmp_path / "parts", workers=0, part=part, parts=3)
    with pytest.raises(DataError, match=r"rows 257 to 512 are not prepared \(shard 1\)"):
        merge(corpus, opened, tmp_path / "parts")
    assert prepare_share(corpus, opened, into=tmp_path / "parts", workers=0, part=2, parts=3) == (256, 256)
    merged = merge(corpus, opened, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert np.array_equal(merged.measured.num_tokens, whole.measured.num_tokens)
    assert open_prepared(corpus, opened, tmp_path / "parts").num_kept == 700


def test_data_and_shards_move_together(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in [*tmp_path.glob("*.png"), tmp_path / "a.jsonl"]:
        path.rename(old / path.name)
    source = SourceConfig(path=str(old / "a.jsonl"), root=str(old))
    run(open_corpus([source]), opened, old / "p")
    old.rename(tmp_path / "new")
    moved = source.model_copy(update={"path": str(tmp_path / "new" / "a.jsonl"), "root": str(tmp_path / "new")})
    corpus = open_corpus([moved])
    found = run(corpus, opened, tmp_path / "new" / "p")
    assert found.rows.encoded(3).media == encode(corpus.sample(3), opened).media


def test_pictures_in_the_row_are_not_stored(opened: OpenedFolder, tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    PIL.Image.fromarray(noise).save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    (tmp_path / "u.jsonl").write_text(json.dumps({"image": uri, "conversations": turns("<image>\nWhat?", "Noise.")}))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "u.jsonl"))])
    found = run(corpus, opened, tmp_path / "p")
    assert sum(map(len, contents(tmp_path / "p").values())) < 10_000 < len(uri)
    assert found.rows.encoded(0).media == encode(corpus.sample(0), opened).media


def test_a_source_may_cut_its_pictures_in_its_own_way(
    tiny_folder: Callable[[str], Path], opened: OpenedFolder, tmp_path: Path
) -> None:
    PIL.Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": turns("<image>\nWhat?", "A line.")}
    for name in ("wide.jsonl", "one.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    one = SourceConfig(path=str(tmp_path / "one.jsonl"), image=ImageOptions(max_tiles=1))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "wide.jsonl")), one])
    rows = run(corpus, opened, tmp_path / "p").rows
    single = open_folder(tiny_folder("internvl"), MediaOptions(image=ImageOptions(max_tiles=1)))
    first, second = rows.encoded(0), rows.encoded(1)
    assert first.media[0][1].num_tiles > second.media[0][1].num_tiles
    assert np.array_equal(second.input_ids, encode(corpus.sample(1), single).input_ids)
    batch, alone = collate([[first, second]], opened, stand_in=False), collate([[second]], single, stand_in=False)
    last = batch.inputs["pixel_values"][first.media[0][1].num_tiles :]
    assert torch.equal(last, alone.inputs["pixel_values"])


def test_a_killed_process_is_said(
    corpus: Corpus, opened: OpenedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmtune.data.prepared.job.ShardJob.__call__", lambda job, task: os._exit(9))
    monkeypatch.setattr("vlmtune.data.prepared.prepare._SMALLEST", 64)
    with pytest.raises(VlmtuneError, match=r"a process that reads rows was killed .*data\.workers"):
        run(corpus, opened, tmp_path / "p", workers=2)


def test_decode_finds_what_a_header_hides(opened: OpenedFolder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    row = {"image": "cut.jpg", "conversations": turns("<image>", "x")}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "b.jsonl"))])
    assert not run(corpus, opened, tmp_path / "p").measured.bad
    for look in ("pixels", "no", "headers", "pixels"):  # what was found out once is known to every later command
        found = run(corpus, opened, tmp_path / "p", look=look)
        (bad,) = found.measured.bad
        assert bad.origin == "b.jsonl:1" and "cut.jpg cannot be decoded (image file is truncated" in bad.reason
        assert not found.measured.num_tokens.any() and len(list((tmp_path / "p").rglob("0*.safetensors"))) == 1
        assert found.num_made == (look == "pixels" and found.num_kept == 0)
    (tmp_path / "cut.jpg").write_bytes(whole)
    mended = run(corpus, opened, tmp_path / "p")
    assert not mended.measured.bad and mended.measured.num_tokens.all()
    with pytest.raises(DataError, match=r"b\.jsonl:1: the picture cut\.jpg cannot be decoded"):
        (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        run(corpus, opened, tmp_path / "p", look="pixels").rows.encoded(0)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_row_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Rows of any length, text or not, with media anywhere: nothing depends on how bits and bytes fall."""
    folder = tmp_path_factory.mktemp("shard")
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(1, 40))
        places = tuple(sorted(data.draw(st.lists(st.integers(0, n), max_size=3))))
        plan = MediaPlan(size=(640, 480), num_tokens=5, num_tiles=1, layout=(3, 4))
        name = data.draw(st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=9))
        refs = [MediaRef(path=f"/data/{name}", offset=k, length=k or None, frame=k or None) for k in range(len(places))]
        ids = np.array(data.draw(st.lists(st.integers(0, 70_000), min_size=n, max_size=n)), np.int32)
        trained = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        rows.append(Laid(ids=ids, trained=trained, places=places, media=tuple((ref, plan) for ref in refs)))
    writer = ShardWriter("/data", wide=True)
    for row in rows:
        writer.add(row, (1,) * len(COLUMNS))
    (folder / "shard").write_bytes(writer.content())
    shard = Shard(folder / "shard", "/data")
    for i, row in enumerate(rows):
        found = shard.laid(i, lambda: ())
        assert np.array_equal(found.ids, row.ids) and np.array_equal(found.trained, row.trained)
        assert (found.places, found.media) == (row.places, row.media)


@pytest.fixture
def many(tmp_path: Path) -> Corpus:
    lines = [json.dumps({"conversations": turns(f"What is {i}?", "It is " + "so " * (i % 50))}) for i in range(1500)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    return open_corpus([SourceConfig(path=str(tmp_path / "n.jsonl"))])


def killed(work: Callable[[], object], stop: Callable[[], bool] = lambda: False) -> None:
    """Runs `work` in a forked process that kills itself, or is killed once `stop` says so."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while process.is_alive() and not stop():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["before the draft", "before the rename", "after the rename"])
@pytest.mark.parametrize("num_written", [0, 1, 4])
def test_killed_at_any_moment_it_goes_on_and_ends_alike(
    many: Corpus, opened: OpenedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, num_written: int
) -> None:
    run(many, opened, tmp_path / "whole")
    written = itertools.count()

    def write_and_die(path: Path, content: bytes) -> None:
        if next(written) == num_written:
            path.parent.mkdir(parents=True, exist_ok=True)
            if moment == "before the rename":
                path.with_name(f".{path.name}.0123abcd.part").write_bytes(content[:-5])
            elif moment == "after the rename":
                write_atomic(path, content)
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("vlmtune.data.prepared.store.write_atomic", write_and_die)
        killed(lambda: run(many, opened, tmp_path / "killed"))
    found = run(many, opened, tmp_path / "killed")
    assert found.num_kept == 256 * (num_written + (moment == "after the rename"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_with_its_workers_it_goes_on_and_ends_alike(many: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    run(many, opened, tmp_path / "whole")
    seen = tmp_path / "killed"
    killed(lambda: run(many, opened, seen, workers=2), stop=lambda: len(list(seen.rglob("0*.safetensors"))) >= 2)
    assert run(many, opened, seen, workers=2).num_kept >= 512
    time.sleep(1.5)  # workers of the killed process end a second later; what they leave goes with the next call
    run(many, opened, seen, look="headers")
    assert contents(seen) == contents(tmp_path / "whole")


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """They hold the run folder's files open, and there would be two more of them for every killed run."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from vlmtune.data.prepared import pool\n"
        "def work(): pool._start_worker(None, multiprocessing.Pipe()[0]); time.sleep(60)\n"
        "worker = multiprocessing.get_context('fork').Process(target=work); worker.start()\n"
        "print(worker.pid, flush=True); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.stdout.read()  # the pipe is closed by the last process that holds it
        process.wait(timeout=30)
    assert not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()
