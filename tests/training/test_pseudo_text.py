"""e-IT: LoRA on the language model and a trained projector, on rows whose answers stand in embedding files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rows import write_embedding
from runs import losses, make_config
from safetensors.torch import load_file

from vlmtune.config.schema import SourceConfig
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import IGNORED, Sample
from vlmtune.eval.run import EvalSettings, evaluate
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.models.load import open_folder
from vlmtune.train.run import train

TUNING = {"method": "lora", "rank": 8, "alpha": 16, "targets": ["language", "head"], "train": ["projector"]}
ANSWERS = ("It is a seven.", "Three of them, standing.")


def write_eit_rows(folder: Path, length: int) -> Path:
    """Twelve rows with CalliReader's run of reserved tokens or a mark, with and without a picture; two without any."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_embedding(folder / f"{i}.pt", 3, length, seed=i)
    Image.new("RGB", (40, 30), (200, 10, 90)).save(folder / "a.png")
    rows = []
    for i in range(14):
        place = "" if i >= 12 else "[UNUSED_TOKEN_140]" * 3 if i % 4 < 2 else "<embedding>"
        turns = [{"from": "human", "value": f"{place} Which?"}, {"from": "gpt", "value": ANSWERS[i % 2]}]
        row: dict[str, Any] = {"id": i, "conversations": turns, "rank": 0}
        if i % 3:
            row["image"] = "a.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        if place:
            row["embedding"] = f"{i % 2}.pt"
        rows.append(row)
    (folder / "samples.json").write_text(json.dumps(rows))
    return folder / "samples.json"


@pytest.fixture
def rows(tmp_path: Path, official: Callable[[str], Path]) -> Path:
    opened = open_folder(official("internlm2"))
    return write_eit_rows(tmp_path / "data", opened.config.get_text_config().hidden_size)


def test_an_official_model_learns_to_read_embeddings(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    """Two questions differ in their embedding alone, and the right answer is the likelier one; vision stays as it was,
    and the export in the official layout answers as the run does.

    What is asked for is the first token of answers to rows with a picture: the others, with a small adapter alone to
    learn by, are still undecided after so few steps (margins of 0.05 to 0.2, where these have 7).
    """
    section = {"epochs": 36, "learning_rate": 2e-3, "schedule": "constant", "activation_checkpointing": True}
    data = {"max_length": 1024}
    config = make_config(tmp_path, official("internlm2"), rows, tuning=TUNING, train=section, data=data)
    result = train(config)
    found = [loss for _, loss in losses(result.run_dir)]
    assert found[-1] < 0.2 < found[0], found

    out = export(result.run_dir, tmp_path / "out", layout="official", device="cpu").out
    before, after = load_file(official("internlm2") / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "mlp1"}

    corpus = open_corpus([SourceConfig(path=str(rows))])
    prompts = [Sample(messages=corpus.sample(i).messages[:-1], origin=f"p:{i}") for i in range(12)]
    run, exported = load(result.run_dir, device="cpu"), load(out, device="cpu")
    assert exported.generate(prompts, 12) == run.generate(prompts, 12)
    encoded = [encode(corpus.sample(i), run.opened) for i in (0, 1)]
    first = [int(row.labels[row.labels != IGNORED][0]) for row in encoded]
    assert first[0] != first[1]
    for i, (one, other) in enumerate(zip(run.logits(prompts), exported.logits(prompts), strict=True)):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)
        if i % 3:
            assert other[-1, first[i % 2]] > other[-1, first[1 - i % 2]] + 1, i
    judged = evaluate(exported, corpus, EvalSettings(max_new_tokens=12, batch_size=4))
    assert judged.loss < 0.2 and sum(one.exact for one in judged.predictions) >= 6


def test_accumulation_padding_and_packing_train_alike(
    tmp_path: Path, official: Callable[[str], Path], rows: Path
) -> None:
    def run(name: str, micro: int, packing: bool, **more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        shape = {"global_batch_size": 7, "micro_batch_size": micro, "extra": {"adam_epsilon": 1e-3}, **more}
        data = {"packing": packing, "max_length": 1024}
        result = train(make_config(tmp_path / name, official("internlm2"), rows, train=shape, data=data, tuning=TUNING))
        (weights,) = result.best.glob("*model.safetensors")
        return [loss for _, loss in losses(result.run_dir)], load_file(weights)

    first = run("1x7", 1, False)
    for other in (run("7x1", 7, False), run("packed", 1, True, activation_checkpointing=True)):
        assert other[0] == pytest.approx(first[0], rel=1e-6)
        for name, tensor in first[1].items():
            torch.testing.assert_close(tensor, other[1][name], rtol=1e-4, atol=2e-5, msg=name)
