"""Answers: the same one by one and together, streamed and not, with and without an adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from videos import write_video

from vlmtune.config.schema import MediaOptions, SourceConfig, VideoOptions
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.data.sample import Image, MediaRef, Message, Sample, Text, Video
from vlmtune.errors import DataError, UsageError, WeightsError
from vlmtune.infer.locate import Located
from vlmtune.infer.session import Session, choose_device, load, load_located
from vlmtune.infer.streaming import Pieces, stream_pieces

KINDS = ("internvl", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm")


def prompts(rows_file: Path) -> list[Sample]:
    """One and several turns, no, one and two pictures; of different lengths."""
    corpus = open_corpus([SourceConfig(path=str(rows_file))])
    samples = [corpus.sample(i) for i in range(6)]
    return [replace(sample, messages=sample.messages[:-1]) for sample in samples]


@pytest.fixture(scope="module")
def session(tiny_folder: Callable[[str], Path]) -> Session:
    return load(tiny_folder("llava"), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_equals_one_by_one(kind: str, tiny_folder: Callable[[str], Path], rows_file: Path) -> None:
    session = load(tiny_folder(kind), device="cpu")
    samples = prompts(rows_file)
    alone = [session.generate([sample], 12)[0] for sample in samples]
    assert len({len(session.encode(sample).input_ids) for sample in samples}) > 3
    assert session.generate(samples, 12, batch_size=6) == alone
    assert session.generate(samples, 12, batch_size=4) == alone  # and in the order asked, whatever the batches


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_leaves_the_logits_as_they_are(
    kind: str, tiny_folder: Callable[[str], Path], rows_file: Path
) -> None:
    """Random models say much the same whatever they see; their logits do not."""
    session = load(tiny_folder(kind), device="cpu")
    samples = prompts(rows_file)
    encoded = [session.encode(sample) for sample in samples]
    inputs = session.inputs(encoded)
    ids = session.model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, alone in zip(ids.logits[0], session.logits(samples), strict=True):
        torch.testing.assert_close(row, alone[-1], atol=2e-5, rtol=0)


def test_what_is_streamed_is_what_is_generated(session: Session, rows_file: Path) -> None:
    for sample in prompts(rows_file)[:3]:
        pieces = list(session.stream(sample, 12))
        assert "".join(pieces) == session.generate([sample], 12)[0]


def test_an_answer_ends_at_a_stop_id_and_without_it(session: Session) -> None:
    stop = session.opened.chat.stop_ids[0]
    ids = session.opened.tokenizer.encode("It is a seven.", add_special_tokens=False)
    assert session._text([*ids, stop, *ids]) == "It is a seven."


def test_generation_stops_at_the_ids_of_the_chat_format(tiny_folder: Callable[[str], Path], rows_file: Path) -> None:
    """The first token that the model would say is made a stop id: the answer must then be empty."""
    session = load(tiny_folder("llava"), device="cpu")
    sample = prompts(rows_file)[1]
    first = int(session.logits([sample])[0][-1].argmax())
    session.opened = replace(session.opened, chat=replace(session.opened.chat, stop_ids=(first,)))
    assert session.generate([sample], 12) == [""]
    assert list(session.stream(sample, 12)) == []


def test_the_lead_of_the_template_is_no_part_of_the_answer(tiny_folder: Callable[[str], Path]) -> None:
    session = load(tiny_folder("smolvlm"), device="cpu")
    lead = session.opened.chat.answer_lead
    ids = session.opened.tokenizer.encode(lead + "It is a seven.", add_special_tokens=False)
    assert lead and session._text(ids) == "It is a seven."


def test_a_missing_picture_is_told_before_the_stream(session: Session) -> None:
    gone = Image(MediaRef(path="/nowhere/gone.png"))
    sample = Sample(messages=(Message("user", (gone, Text("?"))),), origin="question")
    with pytest.raises(DataError, match="question"):
        session.stream(sample)


def test_an_error_inside_the_generation_reaches_the_reader() -> None:
    def run(streamer: Pieces, **_: object) -> None:
        streamer.put(torch.tensor([[1, 2]]))
        streamer.put(torch.tensor([7]))
        raise RuntimeError("out of memory")

    seen: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for piece in stream_pieces(run, lambda ids: "ab"[: len(ids)]):
            seen.append(piece)
    assert seen == ["a"]


def test_a_reader_who_leaves_stops_the_generation(session: Session, rows_file: Path) -> None:
    endless = replace(session.opened.chat, stop_ids=(session.opened.tokenizer.pad_token_id,))
    talker = Session(session.model, replace(session.opened, chat=endless), session.located)
    pieces = talker.stream(prompts(rows_file)[0], 100_000)
    before = threading.active_count()
    next(pieces)
    assert threading.active_count() > before
    pieces.close()
    assert threading.active_count() == before


def test_half_a_character_is_held_back() -> None:
    bytes_of = "数".encode()
    sent: list[str] = []

    def text(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    pieces = Pieces(text, sent.append)
    pieces.put(torch.tensor([[0]]))
    for byte in b"a" + bytes_of + b"b":
        pieces.put(torch.tensor([byte]))
    pieces.end()
    assert sent == ["a", "数", "b"]


@pytest.mark.parametrize("kind", ("internvl", "qwen2_5_vl"))
def test_an_adapter_is_used(
    kind: str, adapter_folder: Callable[[str, str], Path], tiny_folder: Callable[[str], Path], rows_file: Path
) -> None:
    from peft import PeftModel

    from vlmtune.models.load import load_model, open_folder

    session = load(adapter_folder(kind, "dora"), device="cpu")
    sample = prompts(rows_file)[1]
    base = load_model(open_folder(tiny_folder(kind)))
    inputs = session.inputs([session.encode(sample)])
    with torch.inference_mode():
        without = base.eval()(**inputs).logits[0]
        expected = PeftModel.from_pretrained(base, adapter_folder(kind, "dora")).eval()(**inputs).logits[0]
    found = session.logits([sample])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - without).abs().max() > 1e-2


def test_an_adapter_of_another_model_is_refused(
    adapter_folder: Callable[[str, str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(WeightsError, match=r"the adapter does not (fit|load on) its base"):
        load(adapter_folder("internvl", "lora"), base=tiny_folder("qwen3_vl"), device="cpu")


def test_dtype_is_the_checkpoints_own_unless_asked(tiny_folder: Callable[[str], Path]) -> None:
    assert load(tiny_folder("llava"), device="cpu").dtype == torch.float32
    assert load(tiny_folder("llava"), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no such device"):
        choose_device("gpu")
    with pytest.raises(UsageError, match="this machine has"):
        choose_device("cuda:63")


@pytest.mark.parametrize(("exif", "size"), [(None, (16, 24)), ("apply", (16, 24)), ("ignore", (24, 16))])
def test_media_are_read_as_in_training(
    tiny_folder: Callable[[str], Path], tmp_path: Path, exif: str | None, size: tuple[int, int]
) -> None:
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    PIL.Image.new("RGB", (24, 16)).save(tmp_path / "a.jpg", exif=turned)
    film = write_video(tmp_path / "a.mp4", codec="libx264", num_frames=10)
    options = MediaOptions(exif=exif, video=VideoOptions(num_frames=3))
    session = load_located(Located(path=tiny_folder("qwen2_5_vl"), media=options), device="cpu")
    parts = (Image(MediaRef(path=str(tmp_path / "a.jpg"))), Video(MediaRef(path=str(film))), Text("What?"))
    sample = Sample(messages=(Message("user", parts),), origin="a")
    encoded = session.encode(sample)
    assert [plan.size for _, plan in encoded.media] == [size, *[(128, 96)] * 3]
    assert [ref.frame for ref, _ in encoded.media] == [None, 0, 4, 9]
    assert session.generate([sample], 2)
