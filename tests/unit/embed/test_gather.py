"""Many embedding files in one store: the rows say the same, and nothing is left behind when one of them is bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rows import write_embedding
from safetensors.torch import load_file

from vlmtune.cli.main import main
from vlmtune.config.schema import SourceConfig
from vlmtune.data.media import embedding
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import PseudoText


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "emb").mkdir()
    for i in range(4):
        write_embedding(tmp_path / "emb" / f"{i}.pt", i + 1, 8, seed=i)
    torch.save(torch.ones(2, 8, dtype=torch.bfloat16), tmp_path / "emb" / "half.pt")
    write_embedding(tmp_path / "old.safetensors", 2, 8, key="page#2")
    named = ["emb/0.pt", "emb/1.pt", ["emb/2.pt", "old.safetensors#page#2"], "emb/half.pt", "emb/0.pt", None]
    listed = []
    for i, names in enumerate(named):
        marks = "<embedding>" * (len(names) if isinstance(names, list) else names is not None)
        turns = [{"from": "human", "value": f"{marks}春?"}, {"from": "gpt", "value": str(i)}]
        listed.append({"id": i, "embedding": names, "conversations": turns, "rank": 0})
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    return tmp_path / "rows.json"


def tensors(rows: Path, root: Path) -> list[list[torch.Tensor]]:
    corpus = open_corpus([SourceConfig(path=str(rows), root=str(root))])
    parts = [[part for part in corpus.sample(i).messages[0].parts] for i in range(len(corpus))]
    return [[embedding.rows(part.ref) for part in own if isinstance(part, PseudoText)] for own in parts]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_rows_name_the_same_tensors(rows: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    root, store, out = rows.parent, rows.parent / "emb" / "all.safetensors", rows.parent / f"new.{suffix}"
    assert main(["embed", "gather", str(rows), "-o", str(store), "--rows", str(out)]) == 0
    assert "5 embeddings of 10 vectors" in capsys.readouterr().out
    for one, other in zip(tensors(rows, root), tensors(out, root), strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))
    held = load_file(store)
    assert set(held) == {"emb/0.pt", "emb/1.pt", "emb/2.pt", "emb/half.pt", "old.safetensors#page#2"}
    assert held["emb/half.pt"].dtype == torch.bfloat16, "numbers are kept as they are"
    text = out.read_text(encoding="utf-8")
    written = json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
    assert written[0]["embedding"] == "emb/all.safetensors#emb/0.pt" and written[0]["rank"] == 0 and "春" in text
    assert (
        written[2]["embedding"][1] == "emb/all.safetensors#old.safetensors#page#2" and written[5]["embedding"] is None
    )
    assert sorted(path.name for path in (root / "emb").iterdir()) == [
        "0.pt",
        "1.pt",
        "2.pt",
        "3.pt",
        "all.safetensors",
        "half.pt",
    ]


def test_what_is_there_is_replaced_when_asked(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, store, out = rows.parent, rows.parent / "all.safetensors", rows.parent / "new.jsonl"
    given = ["embed", "gather", str(rows), "-o", str(store), "--rows"]
    before = rows.read_bytes()
    assert main([*given, str(rows)]) == 2
    assert "rows.json: is there. Choose another name" in capsys.readouterr().err
    assert main([*given, str(out)]) == 0
    made = out.read_bytes(), store.read_bytes()
    out.unlink()
    assert main([*given, str(out)]) == 2
    assert "all.safetensors: is there" in capsys.readouterr().err
    assert main([*given, str(out), "--overwrite"]) == 0
    assert (out.read_bytes(), store.read_bytes()) == made and rows.read_bytes() == before
    assert len(tensors(out, root)) == 6


def test_a_bad_file_names_its_row_and_leaves_nothing(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = rows.parent
    command = ["embed", "gather", str(rows), "-o", str(root / "all.safetensors"), "--rows", str(root / "new.json")]
    torch.save(torch.full((1, 8), torch.nan), root / "emb" / "1.pt")
    assert main(command) == 3
    assert "rows.json:2: the embedding 1.pt has NaN or infinity" in capsys.readouterr().err
    (root / "emb" / "1.pt").unlink()
    assert main(command) == 3
    assert "rows.json:2: there is no file" in capsys.readouterr().err
    assert not list(root.glob("*all*")) and not (root / "new.json").exists()


def test_what_is_refused_at_once(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["embed", "gather", str(rows), "--rows", str(tmp_path / "n.json"), "-o"]
    assert main([*base, str(tmp_path / "all.pt")]) == 2
    assert "expected a file with the suffix .safetensors" in capsys.readouterr().err
    assert main([*base, str(tmp_path / "all.safetensors"), "--root", str(tmp_path / "emb")]) == 2
    assert "is not below it" in capsys.readouterr().err
    rows.write_text(json.dumps([{"conversations": []}]))
    assert main([*base, str(tmp_path / "all.safetensors")]) == 3
    assert "no row names an embedding" in capsys.readouterr().err
