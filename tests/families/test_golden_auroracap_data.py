"""AuroraCap's prompts, labels, places of pictures, sizes, pixels and frames: every record, with its verdict."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import golden
import numpy as np
import PIL.Image
import pytest
import torch
from conversations import MARK, Counted, opened, sample, with_counts
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import LlavaConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from verdicts import Rule, decide, report
from videos import number_of, write_video

from vlmtune.config.schema import ImageOptions, MediaOptions, VideoOptions
from vlmtune.data.collate import collate
from vlmtune.data.encode import build, encode, encode_prompt
from vlmtune.data.media import containers, pictures, video
from vlmtune.data.sample import Laid, MediaPlan, MediaRef
from vlmtune.errors import DataError
from vlmtune.models.family import ModelFolder, OpenedFolder
from vlmtune.models.internvl.tokenizer import open_tokenizer
from vlmtune.models.llava.chat import vicuna
from vlmtune.models.llava.pictures import Habits, LlavaSpec, as_patches, llava_spec, pixels, plan, view
from vlmtune.models.text import Segment, TextEncoder

pytestmark = pytest.mark.golden

_FOLDER = golden.root() / "auroracap"
_PROMPTS = _FOLDER / "prompts.json"
_LAYOUT = _FOLDER / "layout.json"
_SIZES = _FOLDER / "dataset_image_sizes.csv"
_PIXELS = _FOLDER / "dataset_pixels.safetensors"
_VIDEO = _FOLDER / "video_indices.json"
_PATCH = 14  # of the towers that the reference's loader pads for
_PICTURE = -200  # how the records write a picture
_ASSERTED = "_assert_removed"


@cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# Prompts and labels


def _llama(place: Path, *, legacy: bool) -> PreTrainedTokenizerFast:
    """LlamaTokenizerFast of transformers 4 over the recorded SentencePiece model."""
    place.mkdir(parents=True)
    shutil.copyfile(golden.tokenizer_folder("tokenizer_phi3") / "tokenizer.model", place / "tokenizer.model")
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    added = {str(n): {"content": token, "special": True} for n, token in enumerate(ends.values())}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "added_tokens_decoder": added, **ends}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    found = open_tokenizer(ModelFolder(place, {}))
    if not legacy:
        found.backend_tokenizer.normalizer = None  # type: ignore[assignment]
        found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return found


@cache
def _folder(renderer: str) -> OpenedFolder:
    """A folder without weights in the Vicuna format; a picture is one id, which the records know."""
    place = Path(_place().name) / renderer
    folder = opened("internlm2", "internlm2-chat", place / "internlm2")
    if renderer.startswith("llama"):
        source = golden.tokenizer_folder("tokenizer_phi3") / "tokenizer.model"
        wanted = _read(_PROMPTS)["meta"]["llama_tokenizer_sha256"]
        if hashlib.sha256(source.read_bytes()).hexdigest() != wanted:
            pytest.fail(f"{source} is not the tokenizer that was recorded")
        tokenizer = _llama(place / "llama", legacy="legacy" in renderer)
        folder = replace(folder, tokenizer=tokenizer, text=TextEncoder(tokenizer))
    chat = vicuna(folder.tokenizer, where="record")
    return replace(folder, chat=chat, spec=Counted((), _PICTURE))


@cache
def _place() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@dataclass(frozen=True)
class Case:
    """One conversation under one tokenizer."""

    name: str
    renderer: str
    found: Mapping[str, Any]

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(turn["from"], turn["value"]) for turn in self.found["conversations"]]

    @property
    def record(self) -> Any:
        """Ids and labels; those without the assertion where it stood in the way; None where the reference raises."""
        given = self.found.get(self.renderer)
        return self.found.get(self.renderer + _ASSERTED) if isinstance(given, str) else given

    @property
    def raises(self) -> bool:
        return not isinstance(self.found.get(self.renderer), dict)

    @property
    def folder(self) -> OpenedFolder:
        marks = sum(text.count(MARK) for role, text in self.turns if role == "human")
        return with_counts(_folder(self.renderer), [1] * marks)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Questions and answers, without what stands before the first question and behind the last answer."""
        turns = [turn for turn in self.turns if turn[0] != "system"]
        while turns and turns[0][0] != "human":
            turns = turns[1:]
        while turns and turns[-1][0] != "gpt":
            turns = turns[:-1]
        return [(question[1], answer[1]) for question, answer in zip(turns[::2], turns[1::2], strict=True)]


def _renderers(found: Mapping[str, Any]) -> list[str]:
    """The tokenizers of a case; a case that raises before any tokenizer comes into play is every tokenizer's."""
    meta = _read(_PROMPTS)["chunk_tokenisation"]
    known = dict.fromkeys(name for chunk in meta.values() for name in chunk if not name.endswith("legacy"))
    named = [name for name in (*known, "llama_legacy_true") if name in found]
    return named or list(known)


@cache
def _cases() -> tuple[Case, ...]:
    cases = _read(_PROMPTS).get("cases", {})
    return tuple(Case(name, renderer, found) for name, found in cases.items() for renderer in _renderers(found))


def _repeats(case: Case) -> bool:
    roles = [role for role, _ in case.turns]
    return any(one == other for one, other in pairwise(roles))


_RULES: Sequence[Rule[Case]] = (
    Rule(
        "no answer",
        "refused",
        "nothing can be learnt; the reference drops the row without a word",
        lambda case: all(role != "gpt" for role, _ in case.turns),
    ),
    Rule(
        "empty answer",
        "refused",
        "there is nothing to learn but the end",
        lambda case: any(role == "gpt" and not text.strip() for role, text in case.turns),
    ),
    Rule(
        "turns of one role in a row",
        "refused",
        "the reference glues the words together without a space",
        _repeats,
    ),
    Rule(
        "system turn",
        "mended",
        "the reference raises; ours stands where its template has a place for it",
        lambda case: case.turns[0][0] == "system",
    ),
    Rule(
        "several pictures in a turn",
        "mended",
        "the reference asserts one <image> a turn; ours gives the ids that it gives without the assertion",
        lambda case: case.raises and any(text.count(MARK) > 1 for _, text in case.turns),
    ),
)


class Statement:
    """What is right, from the recorded template and the plain rule: every chunk is tokenised as a text of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._template = _read(_PROMPTS)["meta"]["template"]

    def row(self, pairs: Sequence[tuple[str, str]], system: str | None = None) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, answer) in enumerate(pairs):
            front = self._template["SYSTEM"].format(system=system) if system and not number else ""
            before = self.question(front + self._template["INSTRUCTION"].format(input=_gathered(question)))
            trained = [*self._chunk(answer), self._eos]
            after = self._chunk(self._template["SEP"])
            ids += [*before, *trained, *after]
            labels += [-100] * len(before) + trained + [-100] * len(after)
        return ids, labels

    def question(self, text: str) -> list[int]:
        ids = [self._bos]
        for number, chunk in enumerate(text.split(MARK)):
            ids += [*([_PICTURE] if number else []), *self._chunk(chunk)]
        return ids

    def _chunk(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids)


@cache
def _statement(renderer: str) -> Statement:
    return Statement(_folder(renderer).tokenizer)  # type: ignore[arg-type]


def _gathered(question: str) -> str:
    """The marks of a question in front of it."""
    if MARK not in question:
        return question
    return (" ".join([MARK] * question.count(MARK)) + "\n" + question.replace(MARK, "").strip()).strip()


def _row(case: Case) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in case.turns]}


@pytest.mark.parametrize(
    "case", _cases(), ids=[golden.name(_PROMPTS, "cases", case.name, case.renderer) for case in _cases()]
)
def test_prompts(case: Case) -> None:
    rule = decide(case, _RULES)
    if rule.verdict == "refused":
        with pytest.raises(DataError):
            encode(sample(_row(case), len(case.folder.spec.counts)), case.folder)
        return
    row = sample(_row(case), len(case.folder.spec.counts))
    ours = encode(row, case.folder)
    found = (ours.input_ids.tolist(), ours.labels.tolist())
    if rule.verdict == "equal":
        assert not case.raises, "the reference raises, and no rule says why"
    if case.record is not None:
        assert found == (case.record["input_ids"], case.record["labels"])
    system = case.turns[0][1] if case.turns[0][0] == "system" else None
    assert found == _statement(case.renderer).row(case.pairs, system)
    prompt = replace(row, messages=row.messages[:-1])
    asked = with_counts(case.folder, [1] * len(prompt.images))
    ids = encode_prompt(prompt, asked).input_ids.tolist()
    assert ids == found[0][: len(ids)] and found[1][len(ids)] != -100, "training and prompts differ"


def test_verdicts() -> None:
    if not _cases():
        pytest.skip(f"no prompts are recorded in {_FOLDER}")
    report(_cases(), _RULES)


def _truncated() -> list[tuple[str, str]]:
    cut = _read(_PROMPTS).get("truncation", {})
    return [(name, renderer) for name, found in cut.items() for renderer in found if isinstance(found[renderer], dict)]


@pytest.mark.parametrize(
    ("name", "renderer"), _truncated(), ids=[golden.name(_PROMPTS, "truncation", *one) for one in _truncated()]
)
def test_no_row_is_cut(name: str, renderer: str) -> None:
    """The reference cuts a long row; ours is longer than `max_length`, by which `data.too_long` refuses or drops it."""
    conversation, most = re.fullmatch(r"(.*)\.max_length_(\d+)", name).groups()  # type: ignore[union-attr]
    record = _read(_PROMPTS)["truncation"][name][renderer]
    case = next(case for case in _cases() if (case.name, case.renderer) == (conversation, renderer))
    ours = encode(sample(_row(case), len(case.folder.spec.counts)), case.folder)
    cut = min(int(most), ours.num_tokens)
    assert record["input_ids"] == ours.input_ids[:cut].tolist() and record["labels"] == ours.labels[:cut].tolist()
    assert ours.num_tokens > int(most) or len(record["input_ids"]) == ours.num_tokens


def _asked() -> list[tuple[str, str]]:
    prompts = _read(_PROMPTS).get("inference_prompts", {})
    return [(name, key) for name, found in prompts.items() for key in found if isinstance(found[key], list)]


@pytest.mark.parametrize(
    ("name", "renderer"), _asked(), ids=[golden.name(_PROMPTS, "inference_prompts", *one) for one in _asked()]
)
def test_inference_prompts(name: str, renderer: str) -> None:
    found = _read(_PROMPTS)["inference_prompts"][name]
    before, after = _read(_PROMPTS)["meta"]["template"]["INSTRUCTION"].split("{input}")
    question = found["prompt"].removeprefix(before).removesuffix(after)
    num = question.count(MARK)
    row = sample({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]}, num)
    folder = with_counts(_folder(renderer), [1] * num)
    assert encode_prompt(replace(row, messages=row.messages[:1]), folder).input_ids.tolist() == found[renderer]


@pytest.mark.parametrize("number", range(len(_read(_PROMPTS).get("system_field_turn", []))))
@pytest.mark.parametrize("renderer", ["llama", "internlm2_standin"])
def test_a_system_text_stands_where_the_template_has_it(number: int, renderer: str) -> None:
    found = _read(_PROMPTS)["system_field_turn"][number]
    folder = _folder(renderer)
    before, after = _read(_PROMPTS)["meta"]["template"]["INSTRUCTION"].split("{input}")
    question = found["input"].removesuffix(after).rpartition(before)[2]
    turns = [("system", found["system"]), ("human", question), ("gpt", found["output"])]
    row = sample({"conversations": [{"from": role, "value": text} for role, text in turns]}, 0)
    ids = _statement(renderer).question(found["input"])
    assert encode(row, folder).input_ids.tolist()[: len(ids)] == ids


def _chunks() -> list[tuple[str, str]]:
    found = _read(_PROMPTS).get("chunk_tokenisation", {})
    return [(text, renderer) for text, chunk in found.items() for renderer in chunk]


@pytest.mark.parametrize(
    ("text", "renderer"), _chunks(), ids=[golden.name(_PROMPTS, "chunk_tokenisation", *one) for one in _chunks()]
)
def test_a_chunk_is_tokenised_as_a_text_of_its_own(text: str, renderer: str) -> None:
    folder = _folder("llama_legacy_true" if renderer == "llama_legacy" else renderer)
    segment = Segment(json.loads('"' + text[1:-1] + '"'), trained=False, template=True)
    line = folder.text.cut([Segment("</s>", False, True), segment], at_start=False, alone=True)[1:]
    folder.text.tokenise([line])
    assert [number for run in line for number in run.ids or ()] == _read(_PROMPTS)["chunk_tokenisation"][text][renderer]


# Where the features stand


@dataclass(frozen=True)
class Laying:
    """A row of a recorded batch. counts: features of each frame that was given."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    expanded: tuple[int, ...] | None
    expanded_labels: tuple[int, ...]

    @property
    def marks(self) -> int:
        return self.ids.count(_PICTURE)

    @property
    def counts(self) -> list[int]:
        """By the markers -(1000 · (frame + 1) + place)."""
        frames = [-number // 1000 for number in self.expanded or () if number <= -1000]
        return [frames.count(frame) for frame in sorted(set(frames))]


_LAYING: Sequence[Rule[Laying]] = (
    Rule(
        "fewer frames than places",
        "refused",
        "the reference drops the places without a word, or raises IndexError",
        lambda laying: bool(laying.marks) and len(laying.counts) < laying.marks,
    ),
)


def _layings(found: Mapping[str, Any]) -> list[Laying]:
    rows = []
    for number, ids in enumerate(found["input_ids"]):
        unpadded = len(ids)
        if found.get("attention_mask"):
            unpadded = sum(found["attention_mask"][number])
        expanded, labels = found.get("expanded"), found.get("expanded_labels")
        seen = found["expanded_attention_mask"][number] if found.get("expanded_attention_mask") else None
        kept = slice(None) if seen is None else slice(sum(seen))
        rows.append(
            Laying(
                tuple(ids[:unpadded]),
                tuple(found["labels"][number][:unpadded]) if found.get("labels") else (-100,) * unpadded,
                tuple(expanded[number][kept]) if expanded else None,
                tuple(labels[number][kept]) if labels else (),
            )
        )
    return rows


def _laid(laying: Laying) -> Laid:
    """The row as `data.encode` lays it, a plan of the recorded length for each picture."""
    places = [place - number for number, place in enumerate(i for i, n in enumerate(laying.ids) if n == _PICTURE)]
    text = [i for i, number in enumerate(laying.ids) if number != _PICTURE]
    media = tuple(
        (MediaRef(path="", frame=number), MediaPlan(size=(1, 1), num_tokens=count, num_tiles=1, layout=()))
        for number, count in enumerate(laying.counts)
    )
    return Laid(
        ids=np.array([laying.ids[i] for i in text], np.int32),
        trained=np.array([laying.labels[i] != -100 for i in text], bool),
        places=tuple(places),
        media=media,
    )


@pytest.mark.parametrize("name", _read(_LAYOUT).get("cases", {}), ids=lambda name: golden.name(_LAYOUT, "cases", name))
def test_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _read(_LAYOUT)["cases"][name]
    folder = _folder("internlm2_standin")
    rows = []
    for laying in _layings(found):
        if decide(laying, _LAYING).verdict == "refused":
            talk = [{"from": "human", "value": MARK * laying.marks + "?"}, {"from": "gpt", "value": "x"}]
            shown = {"conversations": talk, "image": ["a.png"] * len(laying.counts)}
            with pytest.raises(DataError):
                sample(shown, 0)
            return
        row = build(_laid(laying), folder, origin="record")
        if laying.expanded is None:  # a text alone, over which the reference stumbles: nothing is to be put in
            assert not laying.marks and row.input_ids.tolist() == list(laying.ids)
            return
        # Each frame's markers in order, at the places of its spans; surplus frames are none of ours.
        want = np.array(laying.expanded)
        assert row.num_tokens == len(want)
        for span in row.spans:
            markers = -(1000 * (span.index + 1) + np.arange(span.length))
            assert want[span.start : span.start + span.length].tolist() == markers.tolist()
        outside = want > -1000
        assert (row.input_ids == _PICTURE).tolist() == (~outside).tolist()
        assert row.input_ids[outside].tolist() == want[outside].tolist()
        assert row.labels.tolist() == list(laying.expanded_labels)
        rows.append(row)
    if len(rows) > 1:
        monkeypatch.setattr("vlmtune.data.collate.row_pixels", lambda sample, opened: [])
        batch = collate([[row] for row in rows], folder, stand_in=False)
        assert batch.inputs["attention_mask"].tolist() == found["expanded_attention_mask"]


# Sizes and pixels


def _spec(size: int, *, pad: bool, keep: bool, swap: bool | None = None) -> LlavaSpec:
    """The loader's settings: `keep_aspect_ratio` says nothing where pictures are padded to a square before."""
    tower = {
        "model_type": "clip_vision_model",
        "image_size": size,
        "patch_size": _PATCH,
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(vision_config=tower, image_token_index=9)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    fit = "pad_square" if pad else "keep_aspect" if keep else None
    options = ImageOptions(fit=fit, swap_sides=swap)
    return llava_spec(config, processor, Habits(swap_sides=True), MediaOptions(image=options))


def _sizes() -> list[dict[str, str]]:
    if not _SIZES.exists():
        return []
    with _SIZES.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("number", range(len(_sizes())), ids=lambda number: golden.name(_SIZES, str(number + 2)))
def test_sizes(number: int) -> None:
    row = _sizes()[number]
    size = int(row["image_w"]), int(row["image_h"])
    pad, keep = row["pad_image_to_square"] == "True", row["keep_aspect_ratio"] == "True"
    edge = int(row["processor_size"])
    spec = _spec(edge, pad=pad, keep=keep)
    if spec.fit == "keep_aspect" and max(size) > 200 * min(size):
        with pytest.raises(DataError, match="200 times"):
            plan([size], spec)
        return
    (found,) = plan([size], spec)
    height, width, _ = found.layout
    assert (width, height) == (int(row["pixel_values_w"]), int(row["pixel_values_h"]))
    if spec.fit != "keep_aspect":
        return
    assert found.resized == (int(row["resized_w"]), int(row["resized_h"]))
    (mended,) = plan([size], _spec(edge, pad=pad, keep=keep, swap=False))
    assert mended.resized == found.resized[::-1], "the sides as the picture has them"


_NAME = re.compile(r"(?P<picture>.+)\.size(?P<size>\d+)\.pad_(?P<pad>\w+)\.keep_(?P<keep>\w+)")


def _records() -> dict[str, torch.Tensor]:
    return load_file(_PIXELS) if _PIXELS.exists() else {}


@pytest.mark.parametrize(
    "name", [name for name in _records() if _NAME.fullmatch(name)], ids=lambda name: golden.name(_PIXELS, name)
)
def test_pixels(name: str) -> None:
    record = _records()
    said = _NAME.fullmatch(name).groupdict()  # type: ignore[union-attr]
    picture = PIL.Image.fromarray(record[f"{said['picture']}.uint8"].numpy())
    spec = _spec(int(said["size"]), pad=said["pad"] == "True", keep=said["keep"] == "True")
    (found,) = plan([picture.size], spec)
    given = pixels(picture, found, spec)
    wanted = record[name]
    if said["pad"] == said["keep"] == "True" and _falls_short(max(picture.size), int(said["size"])):
        wanted = _exact(picture, spec)  # mended: a padded square is of the tower's size, without a black row
    assert given["picture_grids"].tolist() == [[*wanted.shape[1:], 0]]
    rows, columns = (length // _PATCH for length in wanted.shape[1:])
    cut = wanted[:, : rows * _PATCH, : columns * _PATCH]
    patches = torch.nn.functional.unfold(cut[None], _PATCH, stride=_PATCH)[0].T.reshape(-1, 3, _PATCH, _PATCH)
    torch.testing.assert_close(given["pixel_values"], patches, rtol=0, atol=1e-5)
    (shown,) = view(given, spec)
    assert shown.size == (columns * _PATCH, rows * _PATCH)


def _falls_short(side: int, size: int) -> bool:
    """Whether the loader's factor, rounded, leaves a padded square one pixel too small (4 % of all at 378)."""
    return int(side * (size / side)) < size


def _exact(picture: PIL.Image.Image, spec: LlavaSpec) -> torch.Tensor:
    """The square as the loader makes it, brought to size by the image processor of transformers alone."""
    side = max(picture.size)
    square = PIL.Image.new("RGB", (side, side), tuple(int(255 * part) for part in spec.image_processor.image_mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    found: torch.Tensor = spec.image_processor([square], return_tensors="pt")["pixel_values"][0]
    return found


@pytest.mark.parametrize(("side", "short"), [(55, True), (60, False)])
def test_a_padded_square_is_of_the_size_asked_for(side: int, short: bool) -> None:
    """The records above may hold no such picture: the rule and the mended pixels by themselves."""
    assert _falls_short(side, 56) == short
    picture = PIL.Image.effect_noise((side, 31), 80).convert("RGB")
    spec = _spec(56, pad=True, keep=True)
    (found,) = plan([picture.size], spec)
    assert found.layout == (56, 56, 0)
    (shown,) = view(pixels(picture, found, spec), spec)
    (wanted,) = view(as_patches(_exact(picture, spec), _PATCH, 0), spec)
    assert np.array_equal(np.asarray(shown), np.asarray(wanted))


def test_broken_and_absent_pictures(tmp_path: Path) -> None:
    """The reference trains both as black pictures: a broken one is refused here, an absent one is none."""
    record = _records()
    black = [name for name in record if "." not in name]
    if not black:
        pytest.skip(f"no such pictures are recorded in {_FOLDER}")
    assert all(not record[name].any() for name in black)
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    with pytest.raises(DataError):
        pictures.size(MediaRef(path=str(file)), MediaOptions(exif="ignore"))
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    assert encode(sample({"conversations": talk}, 0), _folder("internlm2_standin")).media == ()


# Frames


@pytest.mark.parametrize("number", range(len(_read(_VIDEO).get("table", []))))
def test_frame_indices(number: int) -> None:
    row = _read(_VIDEO)["table"][number]
    assert video.frame_indices(row["total"], row["num_frm"]) == row["indices"], golden.name(_VIDEO, str(number))
    if row["num_frm"] == 1:
        assert video.frame_indices(row["total"], 1, last=False) == [0], "asked for one, by `last_frame: false`"


@pytest.mark.parametrize(
    "name", _read(_VIDEO).get("special", {}), ids=lambda name: golden.name(_VIDEO, "special", name)
)
def test_wrong_frame_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No count: the frames are counted. Too high a count: refused, not shown with fewer. Too low a one is believed."""
    found = _read(_VIDEO)["special"][name]
    real, said, asked = found["real_frames"], found["container_frames"], found["num_frm"]
    path = write_video(tmp_path / "a.mp4", codec="libx264", num_frames=real)
    monkeypatch.setattr(containers, "_announced", lambda stream: said or None)
    options = MediaOptions(exif="ignore", video=VideoOptions(num_frames=asked))
    chosen = video.film(MediaRef(path=str(path)), options).frames
    if said > real:
        with pytest.raises(DataError, match="was announced"):
            list(video.open_pictures(chosen, options))
        return
    shown = [number_of(picture) for picture in video.open_pictures(chosen, options)]
    assert shown == found.get("indices", video.frame_indices(real, asked))
