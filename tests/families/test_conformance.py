"""What every family must satisfy, over every kind of model that it promises."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from official_models import DECODERS
from rows import conversation, embedded_samples, varied_samples, write_picture
from tiny import KINDS
from transformers import AutoImageProcessor, AutoTokenizer, InternVLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.video_utils import VideoMetadata
from videos import numbered, write_video
from xcomposer2_models import KINDS as XCOMPOSER2
from xcomposer2_models import NATIVE as XCOMPOSER2_NATIVE

from vlmtune import compat
from vlmtune.config.schema import MediaOptions, VideoOptions
from vlmtune.data.collate import collate, prompt_batch
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.sample import IGNORED, Batch, Box, Encoded, Image, MediaRef, Message, PseudoText, Sample, Text, Video
from vlmtune.export.write import export
from vlmtune.models.auto import AutoFamily
from vlmtune.models.family import NATIVE, OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.stand_in import StandIn

PIXELS = 10_000_000


OFFICIAL = tuple(f"official-{decoder}" for decoder in DECODERS)


@pytest.fixture(scope="module", params=[*sorted(KINDS), *OFFICIAL, *XCOMPOSER2, *XCOMPOSER2_NATIVE])
def opened(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> OpenedFolder:
    return open_folder(tiny_folder(request.param))


@pytest.fixture(scope="module")
def model(opened: OpenedFolder) -> torch.nn.Module:
    return load_model(opened).eval()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return varied_samples(tmp_path)


@pytest.fixture
def mixed(samples: list[Sample], opened: OpenedFolder, tmp_path: Path) -> list[Sample]:
    """Rows with pseudo-text among the others."""
    first, *others = embedded_samples(tmp_path, opened.config.get_text_config().hidden_size)
    return [first, others[0], *samples, *others[1:]]  # the last two are without pictures


def is_merged(opened: OpenedFolder) -> bool:
    return "vlmtune" in opened.folder.config


def has_no_picture_token(opened: OpenedFolder) -> bool:
    """XComposer2: pictures stand where the token types say so; <unk> stands there, which no text becomes."""
    return opened.family.name == "xcomposer2"


def placeholder(opened: OpenedFolder) -> int:
    return 0 if has_no_picture_token(opened) else opened.config.image_token_id


def encoded(samples: list[Sample], opened: OpenedFolder) -> list[Encoded]:
    return [encode(sample, opened) for sample in samples]


def batch_of(rows: list[list[Encoded]], opened: OpenedFolder, *, stand_in: bool = False) -> Batch:
    return collate(rows, opened, stand_in=stand_in)


@pytest.fixture(scope="module")
def processor(opened: OpenedFolder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plain transformers' processor for the model: of its folder, or of its native export."""
    if is_merged(opened):
        return AutoFamily().media_spec(opened.folder, opened.tokenizer, MediaOptions()).processor
    if opened.family.name not in ("internvl", "xcomposer2"):
        return opened.spec.processor
    folder = opened.folder.path
    if opened.layout != NATIVE:
        folder = tmp_path_factory.mktemp("native") / "out"
        export(opened.folder.path, folder, layout=NATIVE, verify="none")
    return xcomposer2_processor(folder, opened) if has_no_picture_token(opened) else internvl_processor(folder)


def xcomposer2_processor(folder: Path, opened: OpenedFolder) -> XComposer2Processor:
    vision = opened.config.vision_config
    edge = {"height": vision.image_size, "width": vision.image_size}
    return XComposer2Processor(
        tokenizer=AutoTokenizer.from_pretrained(folder),
        image_processor=CLIPImageProcessorPil(size=edge, do_center_crop=False, resample=3),
        high_resolution=opened.config.high_resolution,
        grid=vision.image_size // vision.patch_size,
    )


@dataclasses.dataclass(frozen=True)
class XComposer2Processor:
    """transformers has none: the tokenizer and template of a native folder, and for squares CLIP's image processor."""

    tokenizer: Any
    image_processor: Any
    high_resolution: bool
    grid: int

    def __call__(self, text: list[str], images: list[PIL.Image.Image] | None, **_: object) -> dict[str, torch.Tensor]:
        parts = [self.tokenizer(part, add_special_tokens=False).input_ids for part in text[0].split("<ImageHere>")]
        ids, types = list(parts[0]), [0] * len(parts[0])
        for picture, part in zip(images or [], parts[1:], strict=True):
            count = tokens_of_tiles(picture.size, self.grid // 2) if self.high_resolution else self.grid**2
            ids += [0] * count + part
            types += [1] * count + [0] * len(part)
        found = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types])}
        if images and not self.high_resolution:  # tiles are compared with recorded ones
            found["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return found


def tokens_of_tiles(size: tuple[int, int], grid: int, most: int = 16) -> int:
    """The count of the records' README; the tiles by trying all widths, largest first, in exact fractions."""
    longer, shorter = max(size), min(size)
    along = next(n for n in range(most, 0, -1) if n * -(-n * shorter // longer) <= most)
    across = -(-int(Fraction(along * 28 * shorter, longer)) // 28)
    rows, columns = (across, along) if size[0] >= size[1] else (along, across)
    return (rows * columns + 1) * grid**2 + 1 + (rows + 1) * grid


def internvl_processor(folder: Path) -> Any:
    return compat.construct_processor(
        InternVLProcessor,
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=compat.NullVideoProcessor(),
        image_seq_length=json.loads((folder / "processor_config.json").read_text())["image_seq_length"],
    )


def reference_inputs(sample: Sample, opened: OpenedFolder, processor: Any, *, prompt: bool) -> dict[str, torch.Tensor]:
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
    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    # Official loaders share the tiles of a row among its pictures; processors must be told.
    shared = images and opened.layout != NATIVE and opened.family.name == "internvl"
    shares = {"max_patches": opened.spec.max_tiles // len(images)} if shared else {}
    return processor(text=[text], images=images or None, add_special_tokens=special, return_tensors="pt", **shares)


SIZES = [(1, 1), (8, 300), (28, 28), (31, 33), (32, 32), (33, 32), (40, 100), (56, 57), (64, 64), (96, 97), (100, 40),
         (127, 640), (224, 224), (333, 97), (640, 480), (1000, 30)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_count_from_the_size_equals_processor_and_features(
    opened: OpenedFolder, processor: Any, model: torch.nn.Module, tmp_path: Path, size: tuple[int, int]
) -> None:
    ref = write_picture(tmp_path, size)
    (plan,) = opened.family.plan([size], opened.spec)
    ids, slots = opened.family.span_ids(plan, opened.spec)
    expected = reference_inputs(conversation(("user", [ref])), opened, processor, prompt=False)
    placeholders = int((expected["input_ids"] == placeholder(opened)).sum())
    if is_merged(opened):  # 16 patches and 2 merges before the last layer but one: r = int(16 × 0.5 ÷ 3) each
        assert placeholders == 16
        placeholders -= 2 * 2
    assert plan.num_tokens == len(ids)
    assert slots.sum() == placeholders
    pixels = opened.family.pixels(PIL.Image.open(ref.path).convert("RGB"), plan, opened.spec)
    with torch.no_grad():
        inputs = hand_over(model, opened.family.collate_pixels([pixels], opened.spec))
        features = model.get_image_features(**inputs).pooler_output
    assert sum(part.shape[:-1].numel() for part in features) == placeholders


def comparable(ids: Sequence[int], opened: OpenedFolder) -> list[int]:
    """The ids; where pictures are merged, which no processor of transformers knows, each picture's as one."""
    if not is_merged(opened):
        return list(ids)
    mark = placeholder(opened)
    return [number for i, number in enumerate(ids) if number != mark or i == 0 or ids[i - 1] != mark]


def test_ids_equal_plain_transformers(opened: OpenedFolder, processor: Any, samples: list[Sample]) -> None:
    for sample in samples:
        if opened.chat.images_first and sample.origin == "a:3":
            continue  # the template joins texts around pictures with spaces of its own, see the test below
        unmarked = _without_mark_newline(sample) if opened.chat.fold_newlines else sample
        expected = reference_inputs(unmarked, opened, processor, prompt=False)["input_ids"][0].tolist()
        found = encode(sample, opened).input_ids.tolist()
        assert comparable(found, opened) == comparable(expected, opened), sample.origin
        question = Sample(messages=unmarked.messages[:-1], origin=sample.origin)
        expected = reference_inputs(question, opened, processor, prompt=True)["input_ids"][0].tolist()
        found = encode_prompt(question, opened).input_ids.tolist()
        assert comparable(found, opened) == comparable(expected, opened)


def test_interleaved_pictures_equal_plain_transformers(opened: OpenedFolder, processor: Any, tmp_path: Path) -> None:
    first, second = write_picture(tmp_path, (64, 64), 1), write_picture(tmp_path, (50, 70), 2)
    sample = conversation(("user", ["Left", first, "right", second, "which?"]), ("assistant", ["left"]))
    expected = reference_inputs(sample, opened, processor, prompt=False)["input_ids"][0].tolist()
    assert comparable(encode(sample, opened).input_ids.tolist(), opened) == comparable(expected, opened)


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
        expected = "".join(opened.chat.answer_lead + answer + opened.chat.stop for answer in answers) + behind(opened)
        assert opened.tokenizer.decode(row.input_ids[kept]) == expected
        stops = np.isin(row.input_ids, opened.chat.stop_ids) & kept
        assert stops.sum() == len(answers) + bool(behind(opened))


def behind(opened: OpenedFolder) -> str:
    """What is trained behind the last answer's stop."""
    return opened.chat.close.removeprefix(opened.chat.stop) if opened.chat.trains_close else ""


def test_special_text_in_words_stays_text(opened: OpenedFolder, tmp_path: Path) -> None:
    mark = opened.tokenizer.convert_ids_to_tokens(placeholder(opened))
    stop = opened.chat.stop
    words = f"write {mark} and {stop} here"
    row = encode(conversation(("user", [words]), ("assistant", [words])), opened)
    assert not np.isin(row.input_ids, [placeholder(opened)]).any()
    assert row.spans == ()
    kept = row.labels != IGNORED
    assert opened.tokenizer.decode(row.input_ids[kept]) == opened.chat.answer_lead + words + stop + behind(opened)
    assert (np.isin(row.input_ids, opened.chat.stop_ids) & kept).sum() == 1 + bool(behind(opened))


def test_spans_mark_the_placeholders(opened: OpenedFolder, samples: list[Sample]) -> None:
    for row in encoded(samples, opened):
        mask = np.zeros(row.num_tokens, dtype=bool)
        for span in row.spans:
            mask[span.start : span.start + span.length] = True
        assert (mask == (row.input_ids == placeholder(opened))).all()


def test_picture_inputs_equal_plain_transformers(opened: OpenedFolder, processor: Any, samples: list[Sample]) -> None:
    rows = encoded(samples[:1], opened)
    inputs = batch_of([rows], opened).inputs
    sample = _without_mark_newline(samples[0]) if opened.chat.fold_newlines else samples[0]
    expected = reference_inputs(sample, opened, processor, prompt=False)
    if is_merged(opened):  # patches row by row, picture by picture
        edge = inputs["pixel_values"].shape[-1]
        cut = torch.nn.functional.unfold(expected["pixel_values"], edge, stride=edge).transpose(1, 2)
        expected = {"pixel_values": cut.reshape(-1, 3, edge, edge)}
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
    logits = model(**hand_over(model, batch.inputs)).logits
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


def test_packed_equals_padded_equals_single(opened: OpenedFolder, model: torch.nn.Module, mixed: list[Sample]) -> None:
    assert opened.why_not_packed is None
    exact = copy.deepcopy(model).double()
    rows = encoded(mixed, opened)
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
    inputs = hand_over(model, batch.inputs)
    with torch.no_grad():
        kept = model(**inputs).logits.reshape(len(batch.targets), -1)
        keep = inputs.pop("logits_to_keep")
        torch.testing.assert_close(kept, model(**inputs).logits[keep])
    assert batch.targets.tolist() == [int(x) for x in row.labels[1:] if x != IGNORED]


def test_stand_in_changes_nothing(opened: OpenedFolder, model: torch.nn.Module, mixed: list[Sample]) -> None:
    exact = copy.deepcopy(model).double()
    stand_in = StandIn(exact)
    rows = encoded(mixed[-2:], opened)
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
    lawful = opened.family.lawful_zeros(opened.config)
    silent = {
        name
        for name, _ in model.named_parameters()
        if (name not in grads or not grads[name].any()) and not name.endswith("k_proj.bias")
    }
    patterns = [pattern for pattern in (lawful, opened.components.undemanded) if pattern]
    unlawful = {name for name in silent if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert not unlawful
    if lawful:
        assert silent, "the family names lawful zeros, but nothing is zero"


def test_generation_from_a_padded_batch_equals_one_by_one(
    opened: OpenedFolder, model: torch.nn.Module, mixed: list[Sample]
) -> None:
    exact = copy.deepcopy(model).double()
    questions = [Sample(messages=sample.messages[:-1], origin=sample.origin) for sample in mixed]
    prompts = [encode_prompt(question, opened) for question in questions]

    def generate(chosen: list[Encoded]) -> list[list[int]]:
        inputs = prompt_batch(chosen, opened)
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
        out = exact.generate(**hand_over(exact, inputs), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    together = generate(prompts)
    assert together == [generate([prompt])[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) > 1, "all answers alike: the test would not see a mix-up"


def test_pseudo_text_that_repeats_words_is_those_words(
    opened: OpenedFolder, model: torch.nn.Module, tmp_path: Path
) -> None:
    """Behind a picture, whose placeholders are not taken for it."""
    words = torch.tensor(opened.tokenizer("Which digit?", add_special_tokens=False).input_ids)
    torch.save(model.get_input_embeddings()(words).detach(), tmp_path / "words.pt")
    picture, pseudo = Image(write_picture(tmp_path, (64, 64))), PseudoText(MediaRef(path=str(tmp_path / "words.pt")))
    question = Message("user", (picture, Text("\nSo: "), pseudo, Text(" left?")))
    row = encode(Sample(messages=(question, Message("assistant", (Text("seven"),))), origin="e:1"), opened)
    assert row.at_pseudo_text.sum() == len(words) and not (row.at_pseudo_text & row.at_pictures).any()
    ids = row.input_ids.copy()
    ids[row.at_pseudo_text] = words
    spans = tuple(span for span in row.spans if span.kind == "image")
    said = dataclasses.replace(row, input_ids=ids, spans=spans, media=row.media[:1])
    with torch.no_grad():
        logits = model(**hand_over(model, batch_of([[row]], opened).inputs)).logits
        expected = model(**hand_over(model, batch_of([[said]], opened).inputs)).logits
    assert torch.equal(logits, expected)
    assert row.input_ids[row.at_pseudo_text][0] not in row.input_ids[row.at_pictures]


def test_opened_folder_survives_a_process_border(opened: OpenedFolder, mixed: list[Sample]) -> None:
    again = pickle.loads(pickle.dumps(opened))
    for sample in mixed:
        first, second = (encode(sample, one) for one in (opened, again))
        assert first.input_ids.tolist() == second.input_ids.tolist()
        assert first.spans == second.spans


@pytest.fixture(scope="module")
def film_ref(tmp_path_factory: pytest.TempPathFactory) -> MediaRef:
    path = tmp_path_factory.mktemp("films") / "a.mkv"
    return MediaRef(path=str(write_video(path, codec="ffv1", num_frames=30)))


def about_a_film(film: MediaRef, picture: MediaRef) -> Sample:
    """A picture, a video of 30 frames where its mark stood, and a second turn."""
    user = (*conversation(("user", ["Here ", picture, " and here "])).messages[0].parts, Video(film))
    return Sample(
        messages=(
            Message("user", (*user, Text("\nWhich digit is this?"))),
            Message("assistant", (Text("It is a seven."),)),
            Message("user", (Text("And the menu?"),)),
            Message("assistant", (Text("At the top left."),)),
        ),
        origin="a:6",
    )


def with_frames(opened: OpenedFolder, number: int) -> OpenedFolder:
    options = opened.media.model_copy(update={"video": VideoOptions(num_frames=number)})
    return dataclasses.replace(opened, media=options)


def test_frames_of_a_video_count_as_features(
    opened: OpenedFolder, model: torch.nn.Module, film_ref: MediaRef, tmp_path: Path
) -> None:
    three = with_frames(opened, 3)
    sample = about_a_film(film_ref, write_picture(tmp_path, (100, 40)))
    row = encode(sample, three)
    assert [ref.frame for ref, _ in row.media] == [None, 0, 14, 29]
    assert [plan.is_frame for _, plan in row.media] == [False, True, True, True]
    views = 2 if has_no_picture_token(opened) and opened.config.high_resolution else 1  # the whole is shown once more
    assert all(plan.num_tiles == views for _, plan in row.media[1:]), "a frame is never cut"
    assert {(span.index, span.kind) for span in row.spans} == {(0, "image"), *((i, "video") for i in (1, 2, 3))}
    inputs = collate([[row]], three, stand_in=False).inputs
    placeholders = int((inputs["input_ids"] == placeholder(opened)).sum())
    assert placeholders == sum(span.length for span in row.spans)
    names = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "tile_grids")
    arguments = hand_over(model, inputs)
    with torch.no_grad():
        features = model.get_image_features(**{n: inputs[n] for n in names if n in inputs}).pooler_output
        logits = model(**arguments).logits
    assert sum(part.shape[:-1].numel() for part in features) == placeholders
    assert logits.isfinite().all()
    for ref, plan in row.media[1:]:
        alone = opened.family.pixels(PIL.Image.fromarray(numbered(ref.frame)), plan, opened.spec)
        collated = opened.family.collate_pixels([alone], opened.spec)["pixel_values"]
        flat = (
            inputs["pixel_values"].reshape(-1, *collated.shape[-3:]) if collated.dim() > 2 else inputs["pixel_values"]
        )
        assert _holds(flat, collated.reshape(-1, *flat.shape[1:])), "the decoded frame is another one"


def _holds(rows: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether `part` stands somewhere in `rows`, up to the loss of YUV."""
    n = len(part)
    return any(torch.allclose(rows[i : i + n], part, atol=0.15) for i in range(len(rows) - n + 1))


def test_a_video_stands_where_its_mark_stood(opened: OpenedFolder, film_ref: MediaRef, tmp_path: Path) -> None:
    two = with_frames(opened, 2)
    row = encode(about_a_film(film_ref, write_picture(tmp_path, (100, 40))), two)
    taken = np.zeros(row.num_tokens, bool)
    text, at = "", 0
    for start, end, index in _ranges(row, two):
        text += opened.tokenizer.decode(row.input_ids[at:start]) + f"[{index}]"
        taken[start:end] = True
        at = end
    text += opened.tokenizer.decode(row.input_ids[at:])
    intro = "You are provided the following series of two frames from a 0:00:01 [H:MM:SS] video.\n"
    qwen = "Here <|vision_start|>[0]<|vision_end|> and here " + "".join(
        f"<|vision_start|>[{i}]<|vision_end|>" for i in (1, 2)
    )
    expected = {
        "internvl": "Here <img>[0]</img>\n and here Frame1: <img>[1]</img>\nFrame2: <img>[2]</img>\n",
        "internvl_chat": "Here <img>[0]</img> and here Frame1: <img>[1]</img>\nFrame2: <img>[2]</img>\n",
        "qwen2_5_vl": qwen,
        "qwen3_vl": qwen,
        "llava": "USER: [0]\n[1]\n[2]\nHere   and here  ",
        "smolvlm": f"Here [0] and here {intro}\nFrame from 00:00:[1]\nFrame from 00:01:[2]\n\n",
        "internlmxcomposer2": "Here [0] and here [1][2]\n",
        "vlmtune_xcomposer2": "Here [0] and here [1][2]\n",
    }[opened.folder.config["model_type"]]
    assert expected + "Which digit" in text
    assert not (taken & (row.labels != IGNORED)).any()


@pytest.mark.parametrize("kind", ["internvl", "smolvlm"])
def test_frames_are_written_as_the_processor_of_transformers_writes_them(
    kind: str, tiny_folder: Callable[[str], Path], film_ref: MediaRef
) -> None:
    opened = open_folder(tiny_folder(kind), MediaOptions(video=VideoOptions(num_frames=4)))
    shown = [0, 9, 19, 29]
    metadata = VideoMetadata(total_num_frames=30, fps=25.0, duration=30 / 25, frames_indices=shown)
    outputs = {
        "internvl": {"pixel_values_videos": [np.zeros((4, 3, 32, 32))]},
        "smolvlm": {"pixel_values": np.zeros((1, 4, 3, 32, 32)), "video_metadata": [metadata]},
    }[kind]
    processor = internvl_processor(opened.folder.path) if kind == "internvl" else opened.spec.processor
    written = processor.replace_video_token(outputs, video_idx=0)
    expected = opened.tokenizer(written, add_special_tokens=False).input_ids
    row = encode_prompt(Sample(messages=(Message("user", (Video(film_ref), Text("Why?"))),), origin="a"), opened)
    ids = row.input_ids.tolist()
    assert any(ids[i : i + len(expected)] == expected for i in range(len(ids)))
    assert [ref.frame for ref, _ in row.media] == shown


def _ranges(row: Encoded, opened: OpenedFolder) -> list[tuple[int, int, int]]:
    """(start, end, index) of all ids of each medium."""
    found, at = [], 0
    for index, (_, plan) in enumerate(row.media):
        ids, _ = opened.family.span_ids(plan, opened.spec)
        start = next(i for i in range(at, row.num_tokens) if row.input_ids[i : i + len(ids)].tolist() == ids.tolist())
        found.append((start, start + len(ids), index))
        at = start + len(ids)
    return found


def test_frames_through_packing_and_generation(
    opened: OpenedFolder, model: torch.nn.Module, film_ref: MediaRef, samples: list[Sample], tmp_path: Path
) -> None:
    two = with_frames(opened, 2)
    exact = copy.deepcopy(model).double()
    rows = encoded([about_a_film(film_ref, write_picture(tmp_path, (100, 40))), *samples[2:]], two)
    single = gradients(exact, [as_double(batch_of([[row]], two)) for row in rows])
    assert_same(gradients(exact, [as_double(batch_of([rows], two))]), single)
    question = Sample(messages=about_a_film(film_ref, write_picture(tmp_path, (64, 64))).messages[:1], origin="q")
    with torch.no_grad():
        inputs = hand_over(model, prompt_batch([encode_prompt(question, two)], two))
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_frames_survive_planning_again_from_what_a_store_keeps(
    opened: OpenedFolder, film_ref: MediaRef, tmp_path: Path
) -> None:
    row = encode(about_a_film(film_ref, write_picture(tmp_path, (100, 40))), with_frames(opened, 4))
    sizes = [plan.size for _, plan in row.media]
    again = opened.family.plan(sizes, opened.spec, [ref.frame for ref, _ in row.media])
    assert again == tuple(plan for _, plan in row.media)


def test_a_box_in_an_answer_is_trained_and_stands_as_the_model_writes_it(opened: OpenedFolder, tmp_path: Path) -> None:
    picture = write_picture(tmp_path, (200, 100))
    question = conversation(("user", [picture, "Where is the menu?"])).messages[0]
    box = Box((20, 10, 100.4, 50))
    answer = Message("assistant", (Text("It is at "), box, Text(".")))
    row = encode(Sample(messages=(question, answer), origin="a:7"), opened)
    kept = row.labels != IGNORED
    (_, plan), *_ = row.media
    width, height = plan.resized or (0, 0)
    written = {
        "internvl": "<box>[[100, 100, 502, 500]]</box>",
        "internvl_chat": "<box>[[100, 100, 502, 500]]</box>",
        "qwen2_5_vl": f"[{round(width * 0.1)}, {round(height * 0.1)}, {round(width * 0.502)}, {round(height * 0.5)}]",
        "qwen3_vl": "[100, 100, 502, 500]",
        "llava": "[0.10, 0.10, 0.50, 0.50]",
        "smolvlm": "[100, 100, 502, 500]",
        "internlmxcomposer2": "[100, 100, 502, 500]",
        "vlmtune_xcomposer2": "[100, 100, 502, 500]",
    }[opened.folder.config["model_type"]]
    expected = f"{opened.chat.answer_lead}It is at {written}.{opened.chat.stop}{behind(opened)}"
    assert opened.tokenizer.decode(row.input_ids[kept]) == expected
    asked = Message("user", (question.parts[0], Text("Where is the menu? "), box, Text("?")))
    row = encode(Sample(messages=(asked, Message("assistant", (Text("Yes."),))), origin="a:8"), opened)
    assert f"Where is the menu? {written}?" in opened.tokenizer.decode(row.input_ids)


def test_the_size_after_the_resize_is_what_the_processor_makes(
    opened: OpenedFolder, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes in pixels are pixels of this picture."""
    real = PIL.Image.Image.resize
    made: list[tuple[int, int]] = []

    def noting(image: PIL.Image.Image, size: tuple[int, int], *more: object, **named: object) -> PIL.Image.Image:
        made.append(tuple(size))
        return real(image, size, *more, **named)

    monkeypatch.setattr(PIL.Image.Image, "resize", noting)
    for size in ((200, 100), (37, 90), (500, 333)):
        made.clear()
        picture = PIL.Image.new("RGB", size)
        (plan,) = opened.family.plan([size], opened.spec)
        nested = opened.folder.config["model_type"] == "smolvlm"
        processor.image_processor([[picture]] if nested else [picture], return_tensors="pt")
        if opened.folder.config["model_type"] == "llava" or (
            has_no_picture_token(opened) and opened.config.high_resolution
        ):
            assert plan.resized is None  # the middle is cut out, or white stands around it
        else:
            assert plan.resized in made


def test_media_options_survive_a_process_border(opened: OpenedFolder) -> None:
    chosen = dataclasses.replace(opened, media=MediaOptions(exif="ignore", video=VideoOptions(fps=2.0)))
    assert pickle.loads(pickle.dumps(chosen)).media == chosen.media
    assert pickle.loads(pickle.dumps(chosen)).boxes == opened.boxes
