"""Repositories of the hub, with the download replaced by a cache folder as the hub's library lays it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from tests.tars import cut, picture_bytes, write_tar
from vlmtune.config.schema import HubSource
from vlmtune.data.media import pictures
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.errors import DataError

ROW = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]}
LINE = (json.dumps(ROW) + "\n").encode()
Repository = Callable[[dict[str, bytes]], Path]


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> Repository:
    """Makes the cache of a repository: blobs, and a snapshot of links to them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repo = tmp_path / "hub" / "datasets--someone--set"
    snapshot = repo / "snapshots" / "0123abc"

    def download(name: str, **more: Any) -> str:
        calls.append({"name": name, **more})
        return str(snapshot)

    def make(files: dict[str, bytes]) -> Path:
        (repo / "blobs").mkdir(parents=True)
        for i, (name, content) in enumerate(files.items()):
            (repo / "blobs" / str(i)).write_bytes(content)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(repo / "blobs" / str(i))
        return snapshot

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return make


def opened(**more: Any) -> Corpus:
    return open_corpus([HubSource(hub="someone/set", **more)])


def reason(**more: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(**more)
    return str(caught.value)


def test_jsonl_with_loose_pictures(repository: Repository, calls: list[dict[str, Any]]) -> None:
    repository(
        {"README.md": b"", "data/train.jsonl": LINE, "data/test.jsonl": LINE * 2, "data/1.png": picture_bytes(1)}
    )
    corpus = opened(repeat=2.0)
    assert corpus.origin(0) == "train.jsonl:1"
    assert pictures.read_bytes(corpus.sample(0).images[0].ref) == picture_bytes(1)
    assert corpus.sources[0].options.repeat == 2.0
    assert len(opened(split="test")) == 2
    assert calls[0]["name"] == "someone/set"
    assert calls[0]["repo_type"] == "dataset"
    assert calls[0]["allow_patterns"] is None
    assert {"*.py", "*.pkl", "*.pt"} <= set(calls[0]["ignore_patterns"])


def test_pictures_may_not_leave_the_cache_of_the_repository(repository: Repository, tmp_path: Path) -> None:
    snapshot = repository({"train.jsonl": LINE})
    (tmp_path / "secret.png").write_bytes(picture_bytes(1))
    (snapshot / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"^train\.jsonl:1: .*through a link"):
        opened().sample(0)


def test_jsonl_with_a_split_tar(repository: Repository, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("1.png", picture_bytes(1))])
    parts = {f"images/{part.name}": part.read_bytes() for part in cut(tar, [600], ["part_aa", "part_ab"])}
    repository({"train.jsonl": LINE, **parts})
    ref = opened().sample(0).images[0].ref
    assert len(ref.more) == 1
    assert pictures.read_bytes(ref) == picture_bytes(1)


def test_webdataset_shards(repository: Repository, tmp_path: Path) -> None:
    shards = {}
    for split, i in (("train", 0), ("train", 1), ("val", 0)):
        tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", picture_bytes(i)), (f"{i}.json", LINE)])
        shards[f"{split}-{i:03}.tar"] = tar.read_bytes()
    repository(shards)
    corpus = opened()
    assert [corpus.origin(i) for i in range(len(corpus))] == ["train-000.tar:0.json", "train-001.tar:1.json"]
    assert pictures.read_bytes(corpus.sample(1).images[0].ref) == picture_bytes(1)


def test_parquet_of_the_patterns_only(repository: Repository, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    files = {}
    for name, subset in (("a", "a/train-0"), ("a", "a/train-1"), ("b", "b/train-0")):
        datasets.Dataset.from_list([{"question": name, "answer": name}]).to_parquet(tmp_path / "x.parquet")
        files[f"{subset}.parquet"] = (tmp_path / "x.parquet").read_bytes()
    repository(files)
    assert len(opened()) == 3
    corpus = opened(data_files="a/*.parquet")
    assert [corpus.sample(i).messages[0].text for i in range(len(corpus))] == ["a", "a"]
    assert calls[-1]["allow_patterns"] == ["a/*.parquet"]
    assert "holds no file with rows (it holds nothing)" in reason(data_files="c/*.parquet")


def test_an_imagefolder(repository: Repository) -> None:
    row = {"file_name": "1.png", "question": "q", "answer": "a"}
    repository({"train/metadata.jsonl": json.dumps(row).encode(), "train/1.png": picture_bytes(1)})
    assert pictures.read_bytes(opened().sample(0).images[0].ref) == picture_bytes(1)


def test_code_and_pickles_are_no_rows(repository: Repository) -> None:
    repository({"set.py": b"raise SystemExit", "train.pkl": b"\x80", "README.md": b""})
    assert reason().startswith("data.sources: someone/set: the folder holds no file with rows (it holds .md)")


def test_what_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    said = reason()
    assert said.startswith("data.sources: someone/set: the dataset cannot be fetched (LocalEntryNotFoundError: not in")
    assert "second line" not in said
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the network is switched off, and the hub's cache does not hold it" in reason()
    with pytest.raises(DataError, match="no name of a dataset on the hub; expected owner/name"):
        open_corpus([HubSource(hub="../up")])
