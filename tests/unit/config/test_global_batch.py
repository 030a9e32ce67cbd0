"""A step is counted in rows or in tokens, never in both."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.config.load import dump_config, load_config
from vlmtune.errors import ConfigError

HEAD = "model: {path: m}\ndata: {sources: {path: rows.jsonl}}\n"


def test_rows_unless_tokens_are_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(HEAD)
    assert load_config(file).train.global_batch_size == 16
    tokens = load_config(file, ["train.global_batch_tokens=65536"]).train
    assert (tokens.global_batch_size, tokens.global_batch_tokens) == (None, 65536)
    file.write_text(HEAD + "train: {global_batch_size: 8}\n")
    overrides = ["train.global_batch_size=null", "train.global_batch_tokens=4096"]
    assert load_config(file, overrides).train.global_batch_tokens == 4096


@pytest.mark.parametrize("override", ["train.global_batch_tokens=65536", "train.global_batch_size=8"])
def test_the_resolved_file_says_the_same(tmp_path: Path, override: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(HEAD)
    config = load_config(file, [override])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "{global_batch_size: 16, global_batch_tokens: 4096}",
            "say the same thing in different ways; give one of them",
        ),
        ("{global_batch_size: null}", "global_batch_size and global_batch_tokens are both null; give one of them"),
        ("{global_batch_tokens: 4096}\ndata: {packing: false}", "train.global_batch_tokens needs data.packing: true"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, train: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    packing = ", packing: false" if "packing" in train else ""
    head = HEAD.replace("rows.jsonl}", "rows.jsonl}" + packing)
    file.write_text(f"{head}train: {train.splitlines()[0]}\n")
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(file)
