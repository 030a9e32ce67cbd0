"""XTuner's folders from opening to a native export and back: the same ids, pixels and logits all along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llava_models import xtuner_folder
from rows import conversation, write_picture
from videos import write_video

from vlmtune.config.schema import ImageOptions, MediaOptions, VideoOptions
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.sample import Encoded, MediaRef, Message, Sample, Text, Video
from vlmtune.export.write import export
from vlmtune.models.family import NATIVE, OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over

MEDIA = MediaOptions(
    image=ImageOptions(token_merge_ratio=0.4), video=VideoOptions(num_frames=3, slow_fast=True), exif="ignore"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return xtuner_folder(tmp_path / "model")


def samples(place: Path) -> list[Sample]:
    film = MediaRef(path=str(write_video(place / "a.mkv", codec="ffv1", num_frames=9)))
    said = Message("assistant", (Text("one"),))
    first, second = write_picture(place, (90, 40), 1), write_picture(place, (30, 50), 2)
    return [
        Sample(messages=(Message("user", (Text("See "), Video(film), Text(" which?"))), said), origin="film"),
        conversation(("user", ["left ", first, " right ", second, "?"]), ("assistant", ["two"])),
        conversation(("user", ["hi"]), ("assistant", ["ho"]), ("user", ["and"]), ("assistant", ["so"])),
    ]


def logits(rows: list[Encoded], opened: OpenedFolder) -> torch.Tensor:
    model = load_model(opened).eval()
    with torch.no_grad():
        return model(**hand_over(model, collate([rows], opened, stand_in=False).inputs)).logits.flatten(0, -2)


def test_a_native_export_goes_on_as_the_folder_would(folder: Path, tmp_path: Path) -> None:
    opened = open_folder(folder, MEDIA)
    assert (opened.layout, opened.family.name, opened.spec.fit) == ("xtuner", "llava", "pad_square")
    rows = [encode(sample, opened) for sample in samples(tmp_path)]
    bos, eos = opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id
    assert (rows[2].input_ids == bos).sum() == (rows[2].input_ids == eos).sum() == 2
    assert [span.kind for span in rows[0].spans] == ["video"] * 3
    lengths = [span.length for span in rows[0].spans]
    assert lengths[0] == 36 and lengths[1] == lengths[2] < 36, "the first frame is whole"
    out = tmp_path / "native"
    export(folder, out, layout=NATIVE, verify="none", device="cpu", dtype="float32")
    again = open_folder(out, MEDIA)
    assert again.layout == NATIVE and again.spec.fit == "pad_square"
    exported = [encode(sample, again) for sample in samples(tmp_path)]
    for row, other in zip(rows, exported, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert row.labels.tolist() == other.labels.tolist()
    # transformers' conversion of LLaVA grows the vocabulary
    torch.testing.assert_close(logits(rows, opened), logits(exported, again)[:, : opened.config.text_config.vocab_size])
