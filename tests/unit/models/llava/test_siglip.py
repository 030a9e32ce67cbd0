"""SigLIP's tower in XTuner's layout: assembled, exported, and opened again; it has no class token, and maybe a head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llava_models import write_language
from rows import conversation, write_picture
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from vlmtune.config.schema import ImageOptions, MediaOptions
from vlmtune.data.collate import collate
from vlmtune.data.encode import encode
from vlmtune.export.assemble import assemble
from vlmtune.export.write import export
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.weights.shards import Shards

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MEDIA = MediaOptions(image=ImageOptions(token_merge_ratio=0.5))


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 48, "patch_size": 8}
    text = {**SIZES, "vocab_size": 9}
    tower = tmp_path / "siglip"
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tower)
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tower)
    return assemble(str(write_language(tmp_path / "text")), str(tower), tmp_path / "start")


def test_a_step_and_a_round_trip(start: Path, tmp_path: Path) -> None:
    opened = open_folder(start, MEDIA)
    pictures = write_picture(tmp_path, (90, 40), 1), write_picture(tmp_path, (30, 50), 2)
    rows = [encode(conversation(("user", [picture, "see?"]), ("assistant", ["yes"])), opened) for picture in pictures]
    # 36 patches, of which the first is protected and dropped; r = int(36 × 0.5 ÷ 3) = 6 in two of three layers
    assert [span.length for row in rows for span in row.spans] == [23, 23]
    model = load_model(opened)
    model(**hand_over(model, collate([rows], opened, stand_in=False).inputs)).logits.float().square().mean().backward()
    still = {name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()}
    unseen = ("encoder.layers.2.", "post_layernorm.", "head.")
    tower = "model.vision_tower."
    assert still == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"{tower}{part}" for part in unseen))
    } | {name for name in still if name.endswith("k_proj.bias")}, "of a key's bias softmax sees nothing"
    export(start, tmp_path / "native", layout="native", verify="none", device="cpu")
    again = export(tmp_path / "native", tmp_path / "again", layout="xtuner", device="cpu")
    assert again.comparisons and all(one.difference == 0.0 for one in again.comparisons)
    source, written = Shards(start), Shards(tmp_path / "again")
    assert set(source.infos) == set(written.infos)
    for name in source.infos:  # the native folder's rows for `<image>` stay
        before, after = source.read(name), written.read(name)
        assert torch.equal(after[: len(before)], before), name
        assert after.shape == before.shape or name in ("lm_head.weight", "model.embed_tokens.weight")
