"""Evaluation of a tiny model: the loss against transformers' own, the predictions against the session's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from vlmtune.config.schema import SourceConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import Corpus, open_corpus
from vlmtune.errors import DataError
from vlmtune.eval.run import EvalSettings, evaluate, summed_loss, write_results
from vlmtune.eval.tasks import to_task
from vlmtune.infer.session import Session, load

LIMIT = 10**8


@pytest.fixture(scope="module")
def corpus(rows_file: Path) -> Corpus:
    return open_corpus([SourceConfig(path=str(rows_file))])


@pytest.fixture(scope="module")
def session(tiny_folder: Callable[[str], Path]) -> Session:
    return load(tiny_folder("internvl"), device="cpu")


def reference_loss(session: Session, corpus: Corpus) -> tuple[float, int]:
    """Row by row through the model's own loss, with labels of the whole row."""
    summed, trained = 0.0, 0
    for i in range(len(corpus)):
        row = encode(corpus.sample(i), session.opened)
        inputs = collate([[row]], session.opened, stand_in=False).inputs
        del inputs["logits_to_keep"]
        labels = torch.from_numpy(row.labels).long()[None]
        with torch.inference_mode():
            loss = session.model(**inputs, labels=labels).loss
        summed += float(loss) * row.num_trained
        trained += row.num_trained
    return summed, trained


@pytest.mark.parametrize("kind", ("internvl", "llava", "qwen2_5_vl"))
def test_the_loss_is_the_models_own_over_all_trained_tokens(
    kind: str, tiny_folder: Callable[[str], Path], corpus: Corpus
) -> None:
    session = load(tiny_folder(kind), device="cpu")
    summed, trained = reference_loss(session, corpus)
    result = evaluate(session, corpus, EvalSettings(max_new_tokens=1, batch_size=4))
    assert result.trained_tokens == trained
    assert result.loss == pytest.approx(summed / trained, abs=1e-5)


def test_packed_and_single_rows_have_one_loss(session: Session, corpus: Corpus) -> None:
    rows = [encode(corpus.sample(i), session.opened) for i in range(5)]
    packed = summed_loss(session, rows)
    lonely = replace(session.opened, why_not_packed="of a test")
    single = summed_loss(Session(session.model, lonely, session.located), rows)
    assert packed[1] == single[1]
    assert packed[0] == pytest.approx(single[0], abs=1e-4)


def test_the_last_answer_is_generated_and_earlier_turns_stand_in_the_prompt(corpus: Corpus) -> None:
    task = to_task(corpus.sample(1))
    assert [message.role for message in task.prompt.messages] == ["user", "assistant", "user"]
    assert task.reference == "yes, 数字"
    assert task.question == "user: <image> Which digit is this (1)?\nassistant: It is a 1.\nuser: Sure?"


def test_predictions_come_in_the_order_of_the_rows(session: Session, corpus: Corpus) -> None:
    result = evaluate(session, corpus, EvalSettings(max_new_tokens=8, batch_size=3))
    assert [one.origin for one in result.predictions] == [corpus.origin(i) for i in range(len(corpus))]
    for i, one in enumerate(result.predictions):
        task = to_task(corpus.sample(i))
        assert (one.id, one.reference) == (f"row-{i}", task.reference)
        assert one.prediction == session.generate([task.prompt], 8)[0]
    assert result.count == 10 and result.dropped == 0


def test_a_model_that_repeats_the_reference_matches_exactly(
    session: Session, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {corpus.sample(i).messages[:-1]: corpus.sample(i).messages[-1].text for i in range(len(corpus))}
    monkeypatch.setattr(
        Session, "generate", lambda self, samples, *_, **__: [f" {answers[one.messages]}\n" for one in samples]
    )
    result = evaluate(session, corpus, EvalSettings(limit=7))
    assert result.count == 7
    assert result.metrics.exact_match == 1 and all(one.exact for one in result.predictions)


def test_long_rows_are_dropped_with_a_count_or_refused(session: Session, corpus: Corpus) -> None:
    lengths = sorted(encode(corpus.sample(i), session.opened).num_tokens for i in range(len(corpus)))
    middle = lengths[4]
    result = evaluate(session, corpus, EvalSettings(max_new_tokens=1, max_length=middle, too_long="drop"))
    assert (result.count, result.dropped) == (5, 5)
    with pytest.raises(DataError, match=rf"val\.jsonl:\d+: the row has \d+ tokens, and data\.max_length is {middle}"):
        evaluate(session, corpus, EvalSettings(max_length=middle))
    with pytest.raises(DataError, match="all 10 rows are longer"):
        evaluate(session, corpus, EvalSettings(max_length=8, too_long="drop"))


def test_results_are_written_whole(session: Session, corpus: Corpus, tmp_path: Path) -> None:
    settings = EvalSettings(max_new_tokens=2, limit=3)
    result = evaluate(session, corpus, settings)
    file = write_results(tmp_path / "out", result, session, corpus, settings)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["count"] == 3 and record["model"] == str(session.located.path)
    assert record["settings"]["max_new_tokens"] == 2 and record["settings"]["dtype"] == "float32"
    assert record["data"][0]["rows"] == 10 and record["versions"]["vlmtune"]
    lines = [json.loads(line) for line in (file.parent / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["origin"] for line in lines] == ["val.jsonl:1", "val.jsonl:2", "val.jsonl:3"]
    assert set(lines[0]) == {"origin", "id", "prompt", "reference", "prediction", "exact"}


def test_a_box_in_the_answer_is_compared_as_the_model_writes_it(session: Session, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {
        "messages": [
            {"role": "user", "content": "<image>Where is <ref-object>?"},
            {"role": "assistant", "content": "Look."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "At <bbox>."},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["the menu"], "bbox": [[20, 10, 100, 50]]},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    corpus = open_corpus([SourceConfig(path=str(tmp_path / "rows.jsonl"))])
    (found,) = evaluate(session, corpus, EvalSettings(max_new_tokens=1)).predictions
    text = session.opened.tokenizer.decode(encode(corpus.sample(0), session.opened).input_ids, skip_special_tokens=True)
    assert found.reference == "At <box>[[100, 100, 500, 500]]</box>." and found.reference in text
