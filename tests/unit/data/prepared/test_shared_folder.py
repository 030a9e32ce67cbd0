"""One folder of prepared rows, used by many: copies, moved files, read-only places, runs that are going on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from vlmtune.config.schema import SourceConfig
from vlmtune.data.prepared.job import Look
from vlmtune.data.prepared.prepare import Prepared, open_prepared, prepare
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.errors import VlmtuneError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(str(tiny_folder("internvl")))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rows = [{"conversations": turns(f"What is {i}?", f"It is {i}.")} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_corpus([SourceConfig(path=str(tmp_path / "a.jsonl"))])


def run(corpus: Corpus, opened: OpenedFolder, into: Path, look: Look = "no") -> Prepared:
    return prepare(corpus, opened, into=into, workers=0, look=look)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies(folder: Path, *widths: int) -> list[SourceConfig]:
    """Equal files of rows, each with a picture of its own width beside it."""
    row = {"image": "a.png", "conversations": turns("<image>", "x")}
    for number, width in enumerate(widths):
        (folder / str(number)).mkdir(exist_ok=True)
        PIL.Image.new("RGB", (width, 40)).save(folder / str(number) / "a.png")
        (folder / str(number) / "r.jsonl").write_text(json.dumps(row))
    return [SourceConfig(path=str(folder / str(number) / "r.jsonl")) for number in range(len(widths))]


@pytest.mark.parametrize("look", ["no", "headers"])
def test_copies_of_a_file_have_their_own_pictures(opened: OpenedFolder, tmp_path: Path, look: Look) -> None:
    corpus, into = open_corpus(copies(tmp_path, 40, 160)), tmp_path / "p"
    for _ in range(2):
        found = run(corpus, opened, into, look=look)
        for rows in (found.rows, open_prepared(corpus, opened, into).rows):
            assert [rows.encoded(i).media[0][1].size for i in range(2)] == [(40, 40), (160, 40)]


def test_a_moved_copy_has_its_pictures_looked_at(opened: OpenedFolder, tmp_path: Path) -> None:
    first, second = (open_corpus([source]) for source in copies(tmp_path, 40, 160))
    run(first, opened, tmp_path / "p")
    assert run(second, opened, tmp_path / "p").rows.encoded(0).media[0][1].size == (160, 40)
    same = open_corpus(copies(tmp_path, 160, 160)[:1])
    assert run(same, opened, tmp_path / "p").num_kept == 1


def test_a_folder_that_may_only_be_read_serves_all_the_same(
    opened: OpenedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, data: object) -> None:
        raise VlmtuneError("cannot be written (Read-only file system)", where=str(path))

    first, second = (open_corpus([source]) for source in copies(tmp_path, 40, 40))
    run(first, opened, tmp_path / "p")
    (lock,) = (tmp_path / "p").rglob(".lock")
    lock.unlink()
    lock.mkdir()  # nobody can write it, root neither
    monkeypatch.setattr("vlmtune.data.prepared.prepare.write_atomic", refused)
    assert run(first, opened, tmp_path / "p", look="headers").num_kept == 1
    assert run(second, opened, tmp_path / "p").num_kept == 1  # its manifest names another place


def test_shards_that_are_not_its_own_are_removed(corpus: Corpus, opened: OpenedFolder, tmp_path: Path) -> None:
    """A damaged one, and one that was replaced by a call that was killed before it could remove it."""
    run(corpus, opened, tmp_path / "p")
    (shard,) = (tmp_path / "p").rglob("0*.safetensors")
    before = contents(tmp_path / "p")
    shard.with_name("00000-ffffffff.safetensors").write_bytes(shard.read_bytes()[:-1])
    assert run(corpus, opened, tmp_path / "p").num_made == 0
    assert contents(tmp_path / "p") == before


def test_shards_that_a_run_uses_stay_when_its_file_changes(
    corpus: Corpus, opened: OpenedFolder, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    (old,) = run(corpus, opened, tmp_path / "p").folders
    code = "import sys; from pathlib import Path; from vlmtune.files import in_use\n"
    code += "with in_use(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(old)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        file.write_text(file.read_text() + "\n{}")
        run(open_corpus([SourceConfig(path=str(file))]), opened, tmp_path / "p")
        assert list(old.glob("0*.safetensors"))
        other.communicate()
    file.write_text(file.read_text() + "\n{}")
    run(open_corpus([SourceConfig(path=str(file))]), opened, tmp_path / "p")
    assert not old.exists()


def test_answers_that_differ_in_their_boxes_are_not_the_same(opened: OpenedFolder, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    rows = [
        {"images": ["a.png"], "messages": messages, "objects": {"ref": [], "bbox": [[1, 2, 30, end]]}}
        for end in (20, 30, 30)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run(open_corpus([SourceConfig(path=str(tmp_path / "b.jsonl"))]), opened, tmp_path / "p").measured
    assert not found.bad and found.answer_hash[0] != found.answer_hash[1] == found.answer_hash[2]
