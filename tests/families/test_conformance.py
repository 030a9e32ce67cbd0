"""What every family must satisfy, over every kind of model that it promises."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rows import conversation, varied_samples, write_picture
from tiny import KINDS

from vlmtune.data.collate import collate, prompt_batch
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.sample import IGNORED, Batch, Encoded, Sample
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.stand_in import StandIn

PIXELS = 10_000_000


@pytest.fixture(scope="module", params=sorted(KINDS))
def opened(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(tiny_folder(request.param))


@pytest.fixture(scope="module")
def model(opened: OpenedFolder) -> torch.nn.Module:
    return load_model(opened).eval()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return varied_samples(tmp_path)


def encoded(samples: list[Sample], opened: OpenedFolder) -> list[Encoded]:
    return [encode(sample, opened) for sample in samples]


def batch_of(rows: list[list[Encoded]], opened: OpenedFolder, *, stand_in: bool = False) -> Batch:
    return collate(rows, opened, stand_in=stand_in)


def reference_inputs(sample: Sample, opened: OpenedFolder, *, prompt: bool) -> dict[str, torch.Tensor]:
    """What plain transformers makes of the conversation: template, processor class, image processor."""
    messages, images = [], []
    for message in sample.messages:
        content = []
        for part in message.parts:
            if hasattr(part, "ref"):
                content.append({"type": "image"})
                images.append(PIL.Image.open(part.ref.path).convert("RGB"))
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": message.role, "content": content})
    template = opened.tokenizer.chat_template
    text = opened.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    bos = opened.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return opened.spec.processor(text=[text], images=images or None, add_special_tokens=special, return_tensors="pt")


SIZES = [(1, 1), (8, 300), (28, 28), (31, 33), (32, 32), (33, 32), (40, 100), (56, 57), (64, 64), (96, 97), (100, 40),
         (127, 640), (224, 224), (333, 97), (640, 480), (1000, 30)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_count_from_the_size_equals_processor_and_features(
    opened: OpenedFolder, model: torch.nn.Module, tmp_path: Path, size: tuple[int, int]
) -> None:
    ref = write_picture(tmp_path, size)
    (plan,) = opened.family.plan([size], opened.spec)
    ids, slots = opened.family.span_ids(plan, opened.spec)
    expected = reference_inputs(conversation(("user", [ref])), opened, prompt=False)
    placeholders = int((expected["input_ids"] == opened.spec.placeholder_id).sum())
    assert plan.num_tokens == len(ids)
    assert slots.sum() == placeholders
    pixels = opened.family.pixels(PIL.Image.open(ref.path).convert("RGB"), plan, opened.spec)
    with torch.no_grad():
        features = model.get_image_features(**opened.family.collate_pixels([pixels], opened.spec)).pooler_output
    assert sum(part.shape[:-1].numel() for part in features) == placeholders


def test_ids_equal_plain_transformers(opened: OpenedFolder, samples: list[Sample]) -> None:
    for sample in samples:
        if opened.chat.images_first and sample.origin == "a:3":
            continue  # the template joins texts around pictures with spaces of its own, see the test below
        unmarked = _without_mark_newline(sample)
        expected = reference_inputs(unmarked, opened, prompt=False)["input_ids"][0]
        assert encode(sample, opened).input_ids.tolist() == expected.tolist(), sample.origin
        question = Sample(messages=unmarked.messages[:-1], origin=sample.origin)
        expected = reference_inputs(question, opened, prompt=True)["input_ids"][0]
        assert encode_prompt(question, opened).input_ids.tolist() == expected.tolist()


def test_interleaved_pictures_equal_plain_transformers(opened: OpenedFolder, tmp_path: Path) -> None:
    first, second = write_picture(tmp_path, (64, 64), 1), write_picture(tmp_path, (50, 70), 2)
    sample = conversation(("user", ["Left", first, "right", second, "which?"]), ("assistant", ["left"]))
    expected = reference_inputs(sample, opened, prompt=False)["input_ids"][0]
    assert encode(sample, opened).input_ids.tolist() == expected.tolist()


def _without_mark_newline(sample: Sample) -> Sample:
    """The newline beside an <image> mark is ours to fold; plain transformers users do not write it."""
    messages = []
    for message in sample.messages:
        parts = [type(part)(part.text.lstrip("\n")) if hasattr(part, "text") else part for part in message.parts]
        messages.append(type(message)(message.role, tuple(parts)))
    return Sample(messages=tuple(messages), origin=sample.origin)


def test_trained_are_the_answers_and_their_stops(opened: OpenedFolder, samples: list[Sample]) -> None:
    for sample in samples:
        row = encode(sample, opened)
        kept = row.labels != IGNORED
        assert (row.labels[kept] == row.input_ids[kept]).all()
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        expected = "".join(opened.chat.answer_lead + answer + opened.chat.stop for answer in answers)
        assert opened.tokenizer.decode(row.input_ids[kept]) == expected
        stops = np.isin(row.input_ids, opened.chat.stop_ids) & kept
        assert stops.sum() == len(answers)


def test_special_text_in_words_stays_text(opened: OpenedFolder, tmp_path: Path) -> None:
    placeholder = opened.spec.processor.image_token
    stop = opened.chat.stop
    words = f"write {placeholder} and {stop} here"
    row = encode(conversation(("user", [words]), ("assistant", [words])), opened)
    assert not np.isin(row.input_ids, [opened.spec.placeholder_id]).any()
    assert row.spans == ()
    kept = row.labels != IGNORED
    assert opened.tokenizer.decode(row.input_ids[kept]) == opened.chat.answer_lead + words + stop
    assert (np.isin(row.input_ids, opened.chat.stop_ids) & kept).sum() == 1


def test_spans_mark_the_placeholders(opened: OpenedFolder, samples: list[Sample]) -> None:
    for row in encoded(samples, opened):
        mask = np.zeros(row.num_tokens, dtype=bool)
        for span in row.spans:
            mask[span.start : span.start + span.length] = True
        assert (mask == (row.input_ids == opened.spec.placeholder_id)).all()


def test_picture_inputs_equal_plain_transformers(opened: OpenedFolder, samples: list[Sample]) -> None:
    rows = encoded(samples[:1], opened)
    inputs = batch_of([rows], opened).inputs
    expected = reference_inputs(_without_mark_newline(samples[0]), opened, prompt=False)
    for name in ("pixel_values", "image_grid_thw", "pixel_attention_mask", "mm_token_type_ids"):
        if name in expected:
            assert torch.equal(inputs[name], expected[name]), name


def test_every_parameter_has_a_component(opened: OpenedFolder, model: torch.nn.Module) -> None:
    found = {opened.components.of(name) for name, _ in model.named_parameters()}
    assert found == {"vision", "projector", "language"}
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for component, prefixes in opened.components.blocks.items():
        inside = [name for name in linears if name.startswith(tuple(prefix + "." for prefix in prefixes))]
        assert inside and {opened.components.of(name) for name in inside} == {component}


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.targets, reduction="sum")


def gradients(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: tuple[float, dict[str, torch.Tensor]], second: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-9)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            gradient, second[1][name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def as_double(batch: Batch) -> Batch:
    batch.inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    return batch


def test_packed_equals_padded_equals_single(
    opened: OpenedFolder, model: torch.nn.Module, samples: list[Sample]
) -> None:
    assert opened.why_not_packed is None
    exact = copy.deepcopy(model).double()
    rows = encoded(samples, opened)
    single = gradients(exact, [as_double(batch_of([[row]], opened)) for row in rows])
    packed = gradients(exact, [as_double(batch_of([rows], opened))])
    padded = gradients(exact, [as_double(batch_of([[row] for row in rows], opened))])
    assert_same(packed, single)
    assert_same(padded, single)


def test_logits_at_supervised_positions_equal_the_full_ones(
    opened: OpenedFolder, model: torch.nn.Module, samples: list[Sample]
) -> None:
    row = encode(samples[1], opened)
    batch = batch_of([[row]], opened)
    inputs = dict(batch.inputs)
    keep = inputs.pop("logits_to_keep")
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch.inputs).logits.reshape(len(batch.targets), -1), model(**inputs).logits[keep]
        )
    assert batch.targets.tolist() == [int(x) for x in row.labels[1:] if x != IGNORED]


def test_stand_in_changes_nothing(opened: OpenedFolder, model: torch.nn.Module, samples: list[Sample]) -> None:
    exact = copy.deepcopy(model).double()
    stand_in = StandIn(exact)
    rows = encoded(samples[-1:], opened)
    without = gradients(exact, [as_double(batch_of([rows], opened))])
    batch = as_double(batch_of([rows], opened, stand_in=True))
    assert batch.stand_in is not None
    stand_in.set({name: v.double() if v.is_floating_point() else v for name, v in batch.stand_in.items()})
    loss, grads = gradients(exact, [batch])
    assert loss == pytest.approx(without[0], rel=1e-12)
    touched = {name for name, gradient in grads.items() if opened.components.of(name) != "language"}
    assert touched, "the tower was not run"
    for name, gradient in grads.items():
        assert torch.equal(gradient, without[1].get(name, torch.zeros_like(gradient))), name
    stand_in.set(None)
    assert gradients(exact, [as_double(batch_of([rows], opened))])[1].keys() == without[1].keys()


def test_zero_gradients_are_the_lawful_ones(
    opened: OpenedFolder, model: torch.nn.Module, samples: list[Sample]
) -> None:
    _, grads = gradients(copy.deepcopy(model), [batch_of([[row]], opened) for row in encoded(samples, opened)])
    lawful = opened.family.lawful_zeros(opened.folder)
    silent = {
        name
        for name, _ in model.named_parameters()
        if (name not in grads or not grads[name].any()) and not name.endswith("k_proj.bias")
    }
    unlawful = {name for name in silent if not (lawful and re.fullmatch(lawful, name))}
    assert not unlawful
    if lawful:
        assert silent, "the family names lawful zeros, but nothing is zero"


def test_generation_from_a_padded_batch_equals_one_by_one(
    opened: OpenedFolder, model: torch.nn.Module, samples: list[Sample]
) -> None:
    exact = copy.deepcopy(model).double()
    questions = [Sample(messages=sample.messages[:-1], origin=sample.origin) for sample in samples]
    prompts = [encode_prompt(question, opened) for question in questions]

    def generate(chosen: list[Encoded]) -> list[list[int]]:
        inputs = prompt_batch(chosen, opened)
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
        out = exact.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    together = generate(prompts)
    assert together == [generate([prompt])[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) > 1, "all answers alike: the test would not see a mix-up"


def test_opened_folder_survives_a_process_border(opened: OpenedFolder, samples: list[Sample]) -> None:
    again = pickle.loads(pickle.dumps(opened))
    for sample in samples:
        first, second = (encode(sample, one) for one in (opened, again))
        assert first.input_ids.tolist() == second.input_ids.tolist()
        assert first.spans == second.spans
