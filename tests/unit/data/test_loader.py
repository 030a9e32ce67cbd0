"""Micro batches, and errors that come out of worker processes as they were raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from vlmtune.config.schema import RunConfig
from vlmtune.data.loader import Failed, MicroBatches, unwrap
from vlmtune.data.plan.packing import make_plan
from vlmtune.data.prepared.prepare import prepare
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Batch
from vlmtune.errors import DataError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder


@pytest.fixture(scope="module")
def opened(tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(str(tiny_folder("internvl")))


def micro_batches(
    folder: Path, opened: OpenedFolder, *, rows: int = 10, world: int = 1, packed: bool = True, **train: Any
) -> MicroBatches:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(rows):
        PIL.Image.fromarray(rng.integers(0, 255, (32, 32 + 32 * (i % 3), 3), np.uint8)).save(folder / f"{i}.jpg")
        answer = "yes " * (i + 1)
        value = "<image>\nWhat?" if i % 4 else "What?"
        row = {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}
        lines.append(json.dumps({**row, "image": f"{i}.jpg"} if i % 4 else row))
    (folder / "a.jsonl").write_text("\n".join(lines))
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"sources": {"path": str(folder / "a.jsonl")}, "max_length": 200},
            "train": {"global_batch_size": 4, **train},
        }
    )
    corpus = open_corpus(config.data.sources)
    prepared = prepare(corpus, opened, into=folder / "prepared", workers=0)
    plan = make_plan(prepared.measured, corpus, config, world=world, packed=packed)
    return MicroBatches(prepared.rows, opened, plan, stand_in=True, packed=packed, augment=True, seed=3)


def loaded(batches: MicroBatches, workers: int) -> list[Batch]:
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=lambda item: item)
    return [unwrap(item) for item in loader]


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_trains_every_row_once(tmp_path: Path, opened: OpenedFolder, packed: bool) -> None:
    batches = micro_batches(tmp_path, opened, packed=packed, micro_batch_size=2)
    found = [unwrap(batches[i]) for i in range(len(batches))]
    origins = sorted(origin for batch in found for origin in batch.origins if origin)
    assert origins == sorted(f"a.jsonl:{i + 1}" for i in range(10))
    assert sum(batch.num_images for batch in found) == 7
    assert sum(len(batch.targets) for batch in found) > 10
    for batch in found:
        ids = batch.inputs["input_ids"]
        assert (ids.shape[0] == 1) if packed else (ids.shape[0] <= 2)
        assert int(batch.inputs["logits_to_keep"].sum()) == len(batch.targets)


def test_workers_give_what_the_main_process_gives(tmp_path: Path, opened: OpenedFolder) -> None:
    batches = micro_batches(tmp_path, opened)
    for one, two in zip(loaded(batches, 0), loaded(batches, 2), strict=True):
        assert one.origins == two.origins and torch.equal(one.targets, two.targets)
        for key, value in one.inputs.items():
            assert torch.equal(value, two.inputs[key]) if isinstance(value, torch.Tensor) else value == two.inputs[key]


def test_an_empty_micro_batch_trains_nothing(tmp_path: Path, opened: OpenedFolder) -> None:
    batches = micro_batches(tmp_path, opened, rows=2, world=3)
    assert [len(batches.plan.rows(i)) for i in range(3)] == [1, 1, 0]
    batch = unwrap(batches[2])
    assert batch.inputs["input_ids"].numel() == 1 and len(batch.targets) == 0
    assert not batch.inputs["logits_to_keep"].any()
    assert batch.stand_in is not None
    with pytest.raises(IndexError):
        batches[3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_whole_from_a_worker(tmp_path: Path, opened: OpenedFolder, workers: int) -> None:
    batches = micro_batches(tmp_path, opened)
    path = tmp_path / "5.jpg"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError) as caught:
        loaded(batches, workers)
    assert str(caught.value).startswith("a.jsonl:6: the picture 5.jpg cannot be decoded (image file is truncated")
    assert "Traceback" not in str(caught.value) and caught.value.where == "a.jsonl:6"
    assert caught.value.remedy == "The file is damaged; replace it or take the row out."


def test_a_row_that_changed_since_the_plan_is_an_error(tmp_path: Path, opened: OpenedFolder) -> None:
    batches = micro_batches(tmp_path, opened)
    PIL.Image.new("RGB", (320, 32)).save(tmp_path / "5.jpg")
    with pytest.raises(
        DataError, match=r"^a\.jsonl:6: .*5\.jpg is 320×32 now, but its header said 96×32 when the row was planned"
    ):
        loaded(batches, 0)


def test_unwrap() -> None:
    error = DataError("odd", where="a.jsonl:1")
    with pytest.raises(DataError) as caught:
        unwrap(Failed(error))
    assert caught.value is error


def test_augmented_pictures_depend_on_row_and_step_alone(tmp_path: Path, opened: OpenedFolder) -> None:
    batches = micro_batches(tmp_path, opened, epochs=2)
    plain = [unwrap(batches[i]) for i in range(len(batches))]
    batches.augmented = [True]
    once, again = ([unwrap(batches[i]) for i in range(len(batches))] for _ in range(2))
    changed = 0
    for before, first, second in zip(plain, once, again, strict=True):
        if "pixel_values" in before.inputs:
            assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
            changed += not torch.equal(before.inputs["pixel_values"], first.inputs["pixel_values"])
    assert changed == sum("pixel_values" in batch.inputs for batch in plain) > 2
