"""Ways to cut the same work that must give the same training: accumulation, packing, padding, checkpointing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import DECODERS, dynamic, official_folder, su
from runs import losses, make_config
from safetensors.torch import load_file
from torch.nn import functional
from xcomposer2_models import KINDS as XCOMPOSER2

from vlmtune.config.schema import RunConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Batch, Encoded
from vlmtune.errors import ConfigError
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.stand_in import StandIn
from vlmtune.train.loss import summed_cross_entropy
from vlmtune.train.run import train
from vlmtune.tuning.components import never_trains

KINDS = ["internvl", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", *(f"official-{decoder}" for decoder in DECODERS)]
KINDS += XCOMPOSER2


def _trained(
    folder: Path, model: Path, rows: Path, **sections: Mapping[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    result = train(make_config(folder, model, rows, **sections))
    (weights,) = result.best.glob("*model.safetensors")
    return [loss for _, loss in losses(result.run_dir)], load_file(weights)


def _assert_alike(first: tuple[list[float], dict[str, Any]], second: tuple[list[float], dict[str, Any]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for name, tensor in first[1].items():
        torch.testing.assert_close(tensor, second[1][name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", ["internvl", "llava-merged", "official-internlm2"])
@pytest.mark.parametrize("tuning", [{"method": "full"}, {"method": "lora", "rank": 4}])
def test_accumulation_padding_and_packing_train_alike(
    tmp_path: Path, base_folder: Callable[[str], Path], rows: Path, tuning: dict[str, Any], kind: str
) -> None:
    """Rows of very different numbers of trained tokens: a mean of means would show at once."""

    def run(name: str, micro: int, packing: bool) -> tuple[list[float], dict[str, Any]]:
        # A large epsilon keeps AdamW from blowing rounding errors of tiny gradients up to whole steps.
        shape = {"global_batch_size": 8, "micro_batch_size": micro, "extra": {"adam_epsilon": 1e-3}}
        data = {"packing": packing, "max_length": 1024}
        return _trained(tmp_path / name, base_folder(kind), rows, train=shape, data=data, tuning=tuning)

    one_by_one = run("1x8", 1, False)
    _assert_alike(one_by_one, run("8x1", 8, False))
    _assert_alike(one_by_one, run("2x4", 2, False))
    _assert_alike(one_by_one, run("packed", 1, True))


@pytest.mark.parametrize("kind", XCOMPOSER2)
def test_xcomposer2_rows_with_several_pictures_and_none_train_alike(
    tmp_path: Path, base_folder: Callable[[str], Path], rows: Path, kind: str
) -> None:
    """An adapter, and the projector whole, under activation checkpointing, against plain single rows."""
    pictures = [row["image"] for row in map(json.loads, rows.read_text().splitlines()) if "image" in row]
    several = [
        {
            "image": [str(rows.parent / one) for one in pictures[:count]],
            "conversations": [
                {"from": "user", "value": "<ImageHere> " * count + "What?" * (1 + 3 * count)},
                {"from": "assistant", "value": "It is a seven. " * (4 - count)},
            ],
        }
        for count in (0, 1, 2, 3)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(several))

    def run(name: str, micro: int, packing: bool, checkpointing: bool) -> tuple[list[float], dict[str, Any]]:
        shape = {"global_batch_size": 4, "micro_batch_size": micro, "epochs": 3, "extra": {"adam_epsilon": 1e-3}}
        data = {"packing": packing, "max_length": 2048, "allow": [str(rows.parent)]}
        tuning = {"method": "lora", "rank": 4, "train": ["projector"]}
        section = {**shape, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
        return _trained(tmp_path / name, base_folder(kind), file, train=section, data=data, tuning=tuning)

    one_by_one = run("1x4", 1, False, False)
    assert max(one_by_one[0]) - min(one_by_one[0]) > 1e-3
    _assert_alike(one_by_one, run("4x1", 4, False, True))
    _assert_alike(one_by_one, run("2x2", 2, False, True))
    _assert_alike(one_by_one, run("packed", 1, True, True))


@pytest.mark.parametrize(("decoder", "scaling"), [("internlm2", dynamic), ("phi3", su)])
def test_rows_on_both_sides_of_a_position_range_train_alike(
    tmp_path: Path, official: Callable[[str], Path], rows: Path, decoder: str, scaling: Callable[[int], dict[str, Any]]
) -> None:
    """A row beyond the range would change the frequencies of those beside it: it has a pack to itself, and short ones
    share theirs. Padded batches of several rows are refused."""
    opened = open_folder(official(decoder))
    lengths = sorted(encode(sample, opened).num_tokens for sample in _samples(rows, range(12)))
    limit = lengths[6]
    assert lengths[0] < limit - 8 and lengths[-1] > limit + 8
    model = official_folder(decoder, tmp_path / "model", text=scaling(limit))
    shape = {"global_batch_size": 12, "epochs": 2, "extra": {"adam_epsilon": 1e-3}}

    def config(name: str, micro: int, packing: bool) -> RunConfig:
        data = {"packing": packing, "max_length": 1024}
        return make_config(tmp_path / name, model, rows, train={**shape, "micro_batch_size": micro}, data=data)

    said: list[str] = []
    one_by_one = losses(train(config("1x12", 1, False)).run_dir)
    packed = losses(train(config("packed", 1, True), say=said.append).run_dir)
    assert [loss for _, loss in packed] == pytest.approx([loss for _, loss in one_by_one], rel=1e-6)
    (packs,) = re.findall(r"packs per epoch +(\d+)", "\n".join(said))
    assert len([length for length in lengths if length > limit]) < int(packs) < 12
    with pytest.raises(ConfigError, match=f"micro_batch_size: .*the longest row of a batch beyond {limit} tokens"):
        train(config("12x1", 12, False))
    plain = train(make_config(tmp_path / "plain", official(decoder), rows, train=shape, data={"max_length": 1024}))
    assert losses(plain.run_dir)[0][1] != pytest.approx(one_by_one[0][1], rel=1e-4)


@pytest.mark.parametrize("tuning", [{"method": "full"}, {"method": "lora", "rank": 4, "dropout": 0.1}])
def test_activation_checkpointing_changes_nothing(
    tmp_path: Path, model: Path, rows: Path, tuning: dict[str, Any]
) -> None:
    with_it = _trained(tmp_path / "a", model, rows, tuning=tuning, train={"activation_checkpointing": True})
    without = _trained(tmp_path / "b", model, rows, tuning=tuning)
    _assert_alike(with_it, without)


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_and_gradients_equal_the_models_own(
    base_folder: Callable[[str], Path], rows: Path, kind: str
) -> None:
    """Packed and padded batches against transformers' own `labels=` on each row alone, in float64."""
    opened = open_folder(base_folder(kind))
    samples = [encode(sample, opened) for sample in _samples(rows)]
    own, own_gradients = _own(kind, base_folder, samples)
    shapes = {"padded": [[sample] for sample in samples]}
    if opened.why_not_packed is None:
        shapes["packed"] = [samples]
    for name, shape in shapes.items():
        model = load_model(opened, dtype=torch.float64)
        batch = collate(shape, opened, stand_in=False)
        loss = _loss(model, batch) / len(batch.targets)
        loss.backward()
        assert float(loss) == pytest.approx(own, rel=1e-6), name
        for parameter, value in model.named_parameters():
            expected = own_gradients[parameter]
            got = value.grad if value.grad is not None else torch.zeros_like(value)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=f"{name} {parameter}")


def _samples(rows: Path, which: Iterable[int] = (0, 1, 11)) -> list[Any]:
    """The last of the 12 is text only."""
    from vlmtune.config.schema import SourceConfig

    corpus = open_corpus((SourceConfig(path=str(rows)),), allow=())
    return [corpus.sample(i) for i in which]


def _own(
    kind: str, base_folder: Callable[[str], Path], samples: list[Encoded]
) -> tuple[float, dict[str, torch.Tensor]]:
    opened = open_folder(base_folder(kind))
    model = load_model(opened, dtype=torch.float64)
    total = sum(sample.num_trained for sample in samples)
    whole = 0.0
    for sample in samples:
        inputs = dict(collate([[sample]], opened, stand_in=False).inputs)
        inputs.pop("logits_to_keep")
        inputs.pop("position_ids")
        logits = model(**_float64(inputs)).logits[0]
        labels = torch.from_numpy(sample.labels.astype("int64"))
        loss = functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100) / total
        loss.backward()
        whole += float(loss)
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return whole, grads


def _float64(inputs: dict[str, Any]) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in inputs.items()}


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    return summed_cross_entropy(model(**_float64(batch.inputs)).logits, batch.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_stand_in_changes_neither_loss_nor_gradients(base_folder: Callable[[str], Path], rows: Path, kind: str) -> None:
    opened = open_folder(base_folder(kind))
    text_only = [encode(_samples(rows)[2], opened)]
    results = []
    for stand_in in (False, True):
        model = load_model(opened, dtype=torch.float64)
        batch = collate([text_only], opened, stand_in=stand_in)
        installed = StandIn(model)
        installed.set(_float64(batch.stand_in) if batch.stand_in else None)
        loss = _loss(model, batch)
        loss.backward()
        results.append((float(loss), {name: p.grad for name, p in model.named_parameters()}))
    (loss_without, without), (loss_with, with_it) = results
    assert loss_with == loss_without
    reached = [name for name in without if without[name] is None and with_it[name] is not None]
    assert reached and not any(with_it[name].abs().max() for name in reached)  # the tower ran, and learnt nothing
    if (lawful := never_trains(opened)) is None:
        assert all(gradient is not None for gradient in with_it.values())  # ZeRO-2 waits for every one of them
    else:
        assert all(gradient is not None or lawful.search(name) for name, gradient in with_it.items())
    for name, gradient in without.items():
        if gradient is not None:
            torch.testing.assert_close(with_it[name], gradient, rtol=0, atol=1e-12)


def test_loss_of_nothing_is_zero_with_a_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 5))
    loss = summed_cross_entropy(torch.zeros(0, 3) @ weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0.0 and weight.grad is not None and not weight.grad.any()


def test_loss_is_summed_in_float32() -> None:
    logits = torch.randn(4096, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(50, (4096,), generator=torch.Generator().manual_seed(1))
    exact = functional.cross_entropy(logits.bfloat16().double(), targets, reduction="sum")
    assert float(summed_cross_entropy(logits.bfloat16(), targets)) == pytest.approx(float(exact), rel=1e-5)
