"""Pictures of LLaVA models that are merged or keep their shapes: sizes, counts, which frames, what is refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from rows import conversation, write_picture
from transformers import LlavaConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from videos import write_video

from vlmtune.cli.main import main
from vlmtune.config.load import load_config
from vlmtune.config.schema import ImageOptions, MediaOptions, VideoOptions
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.data.sample import MediaRef, Message, Sample, Text, Video
from vlmtune.errors import ConfigError, DataError
from vlmtune.export.write import export
from vlmtune.files import write_json
from vlmtune.models.auto.pictures import AutoSpec
from vlmtune.models.llava import pictures
from vlmtune.models.llava.pictures import Habits, LlavaSpec, llava_spec
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
WHOLE = MediaOptions(image=ImageOptions(token_merge_ratio=1.0))


def config(tower: str = CLIP, **more: Any) -> LlavaConfig:
    vision = {"model_type": tower, "image_size": 56, "patch_size": 14, "num_hidden_layers": 6, "hidden_size": 8}
    return LlavaConfig(vision_config={**vision, "num_attention_heads": 2}, image_token_index=9, **more)


def clip(edge: int = 56) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


def spec_of(tower: str = CLIP, *, slow_fast: bool = False, **image: Any) -> LlavaSpec:
    media = MediaOptions(image=ImageOptions(**image), video=VideoOptions(slow_fast=slow_fast))
    processor = clip() if tower == CLIP else SiglipImageProcessorPil(size={"height": 56, "width": 56})
    return llava_spec(config(tower), processor, Habits(), media)


@pytest.mark.parametrize("tower", [CLIP, SIGLIP])
def test_without_merging_every_patch_counts(tower: str) -> None:
    spec = spec_of(tower, token_merge_ratio=1.0, fit="stretch")
    lost = 1 if tower == SIGLIP else 0  # its first patch takes the place of the class token, and is dropped
    assert pictures.plan([(640, 480)], spec)[0].num_tokens == 16 - lost
    full = llava_spec(config(tower, vision_feature_select_strategy="full"), clip(), Habits(), MediaOptions())
    assert pictures.plan([(56, 56)], full)[0].num_tokens == 17 - lost


def test_the_first_of_several_frames_is_whole() -> None:
    spec = spec_of(token_merge_ratio=0.5, slow_fast=True)
    sizes = [(50, 50)] * 9
    frames = [None, 0, 4, 9, 0, 0, 3, None, 7]  # a picture; three frames; one alone; two; a picture; one alone
    merged = [plan.layout[2] for plan in pictures.plan(sizes, spec, frames)]
    r = int(16 * 0.5 / 6)
    assert merged == [r, 0, r, r, r, 0, r, r, r]
    assert [plan.layout[2] for plan in pictures.plan(sizes, replace(spec, slow_fast=False), frames)] == [r] * 9
    assert [plan.layout[2] for plan in pictures.plan(sizes, spec)] == [r] * 9


def test_a_picture_keeps_its_shape() -> None:
    spec = spec_of(fit="keep_aspect")
    (plan,) = pictures.plan([(100, 60)], spec)
    assert plan.resized == (93, 56) and plan.layout == (56, 98, 0) and plan.num_tokens == 4 * 7
    given = pictures.pixels(PIL.Image.new("RGB", (100, 60), "white"), plan, spec)
    assert given["pixel_values"].shape == (28, 3, 14, 14)
    (seen,) = pictures.view(given, spec)
    assert seen.size == (98, 56)
    assert seen.getpixel((92, 55)) == (255, 255, 255) and seen.getpixel((93, 0)) == (0, 0, 0), "black at the right"
    (twisted,) = pictures.plan([(100, 60)], spec_of(fit="keep_aspect", swap_sides=True))
    assert twisted.resized == (56, 93) and twisted.layout == (98, 56, 0)
    with pytest.raises(DataError, match="over 200 times"):
        pictures.plan([(1, 201)], spec)


def test_what_is_beside_a_picture_is_black_as_the_tower_sees_black() -> None:
    """AuroraCap's loader adds rows and columns to the picture, before its colours are brought to the tower's."""
    spec = spec_of(fit="keep_aspect")
    for size in ((55, 73), (100, 60)):
        (plan,) = pictures.plan([size], spec)
        scale = 56 / min(size)  # 55 × (56 / 55) is a little less than 56, and is rounded down
        seen = int(size[0] * scale), int(size[1] * scale)
        assert plan.resized == seen and (55 in seen) == (size == (55, 73))
        picture = PIL.Image.effect_noise(size, 80).convert("RGB")
        whole = np.zeros((*plan.layout[:2], 3), np.float32)
        whole[: seen[1], : seen[0]] = np.asarray(picture.resize(seen, PIL.Image.Resampling.BICUBIC))
        mean, std = (np.array(values, np.float32) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        wanted = torch.from_numpy((whole / 255 - mean) / std).permute(2, 0, 1)
        found = pictures.pixels(picture, plan, spec)["pixel_values"]
        torch.testing.assert_close(found, pictures.as_patches(wanted, 14, 0)["pixel_values"], rtol=0, atol=1e-5)


def test_a_size_of_ones_own() -> None:
    spec = spec_of(size=84)
    assert pictures.plan([(640, 480)], spec)[0].layout == (84, 84, 0)
    assert pictures.picture_settings(spec) == {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
    siglip = spec_of(SIGLIP, size=28)
    assert pictures.plan([(640, 480)], siglip)[0].layout == (28, 28, 0)
    assert pictures.picture_settings(siglip) == {"size": {"height": 28, "width": 28}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tiles": 2}, "max_tiles has no effect"),
        ({"swap_sides": True}, "with fit: keep_aspect only"),
        ({"size": 13}, "nothing is left of a picture"),
    ],
)
def test_options_without_effect_or_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        spec_of(**options)
    assert refused.value.where == "model.image"


def test_one_patch_is_nothing_for_siglip() -> None:
    assert pictures.plan([(56, 56)], spec_of(size=14))[0].num_tokens == 1
    with pytest.raises(ConfigError, match="14×14 pixels of it in patches of 14"):
        spec_of(SIGLIP, size=14)


def test_slow_fast_without_merging_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no effect: this model merges no tokens"):
        spec_of(fit="pad_square", slow_fast=True)
    assert spec_of(fit="pad_square", slow_fast=True, token_merge_ratio=1.0).ratio == 1, "one source beside merged ones"


def test_several_feature_layers_and_other_processors_are_refused() -> None:
    media = MediaOptions(image=ImageOptions(token_merge_ratio=0.5))
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        llava_spec(config(vision_feature_layer=[-2, -1]), clip(), Habits(), media)
    with pytest.raises(ConfigError, match="the image processor is object"):
        llava_spec(config(), object(), Habits(), media)


def test_what_is_recorded_is_what_is_read_again() -> None:
    own_shape: list[dict[str, Any]] = [{"fit": "keep_aspect", "swap_sides": swaps} for swaps in (True, False)]
    for options in ({"token_merge_ratio": 0.3}, {"fit": "pad_square"}, *own_shape):
        spec = spec_of(slow_fast="token_merge_ratio" in options, **options)
        for fallback in (Habits(), Habits(fit="pad_square", swap_sides=True)):
            habits = pictures.habits_of({"vlmtune": pictures.record_of(spec)}, fallback)
            assert llava_spec(config(), spec.image_processor, habits, MediaOptions()) == spec
    assert pickle.loads(pickle.dumps(spec)).ratio == spec.ratio


def test_merging_is_chosen_for_a_plain_folder(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("llava")
    assert isinstance(open_folder(folder).spec, AutoSpec)
    assert isinstance(open_folder(folder, WHOLE).spec, AutoSpec)
    half = open_folder(folder, MediaOptions(image=ImageOptions(token_merge_ratio=0.5)))
    assert half.family.plan([(640, 480)], half.spec)[0].num_tokens == 12
    assert half.config.to_dict()["vlmtune"]["token_merge_ratio"] == 0.5
    with pytest.raises(ConfigError, match="merges no tokens") as refused:
        open_folder(folder, MediaOptions(video=VideoOptions(slow_fast=True)))
    assert refused.value.where == "model.video.slow_fast"


@pytest.mark.parametrize("kind", ["llava", "llava-merged"])
def test_one_said_of_a_run_is_whole_pictures_in_its_export(
    kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """As left out for a folder that merges nothing; a folder that merges does so no more."""
    run = shutil.copytree(tiny_folder(kind), tmp_path / "run")
    write_json(run / "provenance.json", {"config": {"model": {"image": {"token_merge_ratio": 1.0}}}})
    kept = open_folder(run, WHOLE).config.to_dict().get("vlmtune", {})
    assert kept.get("token_merge_ratio", 1) == 1, "what a checkpoint says"
    said = export(run, tmp_path / "said", device="cpu")
    assert all(one.holds for one in said.comparisons) and not said.notes
    left_out = export(tiny_folder("llava"), tmp_path / "left_out", device="cpu").out
    opened, plain = open_folder(said.out), open_folder(left_out)
    assert isinstance(opened.spec, AutoSpec)
    assert opened.family.plan([(640, 480)], opened.spec) == plain.family.plan([(640, 480)], plain.spec)
    parts = open_folder(export(run, tmp_path / "parts", layout="xtuner", verify="none", device="cpu").out)
    assert (parts.spec.ratio, parts.spec.fit) == (1, None)
    if kind == "llava":
        texts = [{f.name: f.read_bytes() for f in folder.glob("*.json")} for folder in (said.out, left_out)]
        assert all(text.pop("export.json") for text in texts) and texts[0] == texts[1]


def test_the_true_share_is_told(tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    large = {"image_size": 336, "patch_size": 14, "num_hidden_layers": 24}
    config_of_l = LlavaConfig(vision_config={"model_type": CLIP, **large}, image_token_index=9)
    media = MediaOptions(image=ImageOptions(token_merge_ratio=0.1), video=VideoOptions(slow_fast=True))
    told = pictures.about(llava_spec(config_of_l, clip(336), Habits(), media))
    assert "leaves 93 of 576 tokens of 336×336 pixels (16.1 %), the first frame of a video stays whole" in told
    assert main(["info", str(tiny_folder("llava-merged"))]) == 0
    printed = capsys.readouterr().out
    assert "token_merge_ratio 0.5 leaves 12 of 16 tokens of 32×32 pixels (75.0 %)" in printed
    assert main(["info", str(tiny_folder("llava"))]) == 0
    assert "token_merge_ratio" not in capsys.readouterr().out


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.1", "nan"])
def test_a_ratio_is_a_share(tmp_path: Path, ratio: str) -> None:
    file = tmp_path / "run.yaml"
    model = "model: {path: m, image: {token_merge_ratio: RATIO}}".replace("RATIO", ratio)
    file.write_text(f"{model}\ndata: {{sources: {{path: rows.jsonl}}}}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert "token_merge_ratio" in str(refused.value)


def test_a_source_may_leave_its_pictures_whole(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    media = MediaOptions(image=ImageOptions(token_merge_ratio=0.5), video=VideoOptions(slow_fast=True))
    half = open_folder(tiny_folder("llava"), media)
    whole = half.with_image(ImageOptions(token_merge_ratio=1.0))
    picture = write_picture(tmp_path, (50, 40))
    talk = conversation(("user", [picture, "What?"]), ("assistant", ["A cat."]))
    rows = [encode(talk, opened) for opened in (half, whole)]
    assert [plan.num_tokens for row in rows for _, plan in row.media] == [12, 16]
    inputs = collate([rows], half, stand_in=False).inputs
    assert inputs["picture_grids"].tolist() == [[32, 32, 2], [32, 32, 0]]
    model = load_model(half).eval()
    with torch.no_grad():
        together = model(**hand_over(model, inputs)).logits.flatten(0, -2)
        plain = collate([rows[1:]], whole, stand_in=False).inputs
        assert "picture_grids" not in plain
        alone = model(**hand_over(model, plain)).logits.flatten(0, -2)
    torch.testing.assert_close(together[-len(alone) :], alone)


@pytest.mark.parametrize("fit", [None, "keep_aspect", "pad_square"])
def test_slow_fast_rows_of_any_shape_share_a_pack(
    tiny_folder: Callable[[str], Path], tmp_path: Path, fit: str | None
) -> None:
    image = ImageOptions(token_merge_ratio=0.4, fit=fit)
    media = MediaOptions(image=image, video=VideoOptions(num_frames=3, slow_fast=True))
    opened = open_folder(tiny_folder("llava"), media)
    model = load_model(opened).double().eval()
    film = MediaRef(path=str(write_video(tmp_path / "a.mkv", codec="ffv1", num_frames=9)))
    said = Message("assistant", (Text("Seven."),))
    samples = [
        Sample(messages=(Message("user", (Video(film), Text("Which?"))), said), origin="film"),
        conversation(("user", [write_picture(tmp_path, (90, 40)), "What?"]), ("assistant", ["A cat."])),
        conversation(("user", ["Hi"]), ("assistant", ["Hello"])),
    ]
    rows = [encode(sample, opened) for sample in samples]
    merged = [plan.layout[2] for _, plan in rows[0].media]
    assert merged[0] == 0 and len(merged) == 3 and all(merged[1:])

    def logits(*packed: Any) -> torch.Tensor:
        inputs = collate([list(packed)], opened, stand_in=False).inputs
        inputs = {
            n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()
        }
        with torch.no_grad():
            return model(**hand_over(model, inputs)).logits.flatten(0, -2)

    alone = torch.cat([logits(row) for row in rows])
    torch.testing.assert_close(logits(*rows), alone)
    torch.testing.assert_close(logits(*rows), alone)  # and nothing is left behind
