"""Names of other trainers sorted, and checkpoints of other models refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.errors import WeightsError
from vlmtune.weights.foreign import alpha
from vlmtune.weights.foreign.parts import Parts, check_fit, official_name, sort
from vlmtune.weights.foreign.recognise import recognise
from vlmtune.weights.foreign.tensors import of_mapping
from vlmtune.weights.shards import TensorInfo

W = "language_model.model.layers.0.attention.wqkv"


def sorted_names(*names: str, prefix: str = "", shape: tuple[int, ...] = (4, 4)) -> Parts:
    return sort(of_mapping(dict.fromkeys(names, torch.ones(shape)), Path("iter_5.pth")), alpha.given(8), prefix=prefix)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.base_model.model.model.norm.weight", "language_model.model.norm.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("module.model.mlp1.0.bias", "mlp1.0.bias"),
        ("_orig_mod.vision_model.base_model.model.encoder.x", "vision_model.encoder.x"),
        ("model.layers.0.x", None),
        ("decoder.model.layers.0.x", None),
        ("llm.model.layers.0.x", "model.layers.0.x"),
        ("module.llm.base_model.model.lm_head.x", "lm_head.x"),
        ("visual_encoder.pos_emb", "pos_emb"),
        ("projector.model.2.bias", "model.2.bias"),
        ("model.other.language_model.x", None),
    ],
)
def test_official_names(name: str, expected: str | None) -> None:
    assert official_name(name) == expected


@pytest.mark.parametrize("outer", ["", "model.", "module.model."])
@pytest.mark.parametrize("adapter", ["", ".default", ".mine"])
def test_layers_with_an_update_and_tensors_in_full(outer: str, adapter: str) -> None:
    at = f"{outer}language_model.base_model.model.model.layers.0.attention.wqkv"
    parts = sorted_names(
        f"{at}.base_layer.weight", f"{at}.lora_A{adapter}.weight", f"{at}.lora_B{adapter}.weight",
        f"{outer}mlp1.0.bias", f"{outer}language_model.base_model.model.output.modules_to_save.default.weight",
        f"{outer}language_model.base_model.model.output.original_module.weight",
    )  # fmt: skip
    assert set(parts.lora) == {W} and parts.lora[W].rank == 4
    assert set(parts.whole) == {f"{W}.weight", "mlp1.0.bias", "language_model.output.weight"}
    assert "modules_to_save" in parts.whole["language_model.output.weight"].name


def test_an_adapter_of_one_part() -> None:
    at = "base_model.model.model.layers.0.attention.wqkv"
    assert set(sorted_names(f"{at}.lora_A.weight", f"{at}.lora_B.weight", prefix="language_model.").lora) == {W}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("decoder.x", "adapter.y", "mlp1.0.bias"),
            "2 tensors are none of an official .*: decoder.x, adapter.y",
        ),
        ((f"{W}.lora_magnitude_vector.default.weight",), "lora_magnitude_vector"),
        ((f"{W}.lora_embedding_A",), "lora_embedding_A"),
        ((f"{W}.lora_A.default.weight",), f"only one of lora_A and lora_B of {W}"),
        (
            (f"{W}.lora_A.x.weight", f"{W}.lora_B.x.weight", "mlp1.1.lora_A.y.weight", "mlp1.1.lora_B.y.weight"),
            "several adapters: x, y",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        sorted_names(*names)


def test_one_layer_in_two_adapters_is_refused() -> None:
    parts = sorted_names(f"{W}.lora_A.weight", f"{W}.lora_B.weight")
    with pytest.raises(WeightsError, match="in both adapters"):
        parts.joined(parts)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({}, rf"2 have no place there: mlp1\.0\.bias, {W}"),
        (
            {f"{W}.weight": (4, 4), "mlp1.0.bias": (5,)},
            r"1 are of another shape: mlp1\.0\.bias .*, in the base \(5,\)",
        ),
        ({f"{W}.weight": (4, 5), "mlp1.0.bias": (4, 4)}, r"wqkv with lora_A \(4, 4\) .* in the base \(4, 5\)"),
        ({f"{W}.weight": (6, 4), "mlp1.0.bias": (4, 4)}, r"wqkv with lora_A \(4, 4\) .* in the base \(6, 4\)"),
        ({f"{W}.weight": (4, 4, 1, 1), "mlp1.0.bias": (4, 4)}, r"in the base \(4, 4, 1, 1\)"),
    ],
)
def test_another_base_is_refused_by_names_and_shapes(base: dict[str, tuple[int, ...]], message: str) -> None:
    parts = sorted_names(f"{W}.lora_A.weight", f"{W}.lora_B.weight", "mlp1.0.bias")
    infos = {name: TensorInfo(name, "F32", shape) for name, shape in base.items()}
    with pytest.raises(WeightsError, match=f"iter_5.pth: the checkpoint does not fit the base models/x: .*{message}"):
        check_fit(parts, infos, base_folder=Path("models/x"))


def test_the_right_base_fits() -> None:
    parts = sorted_names(f"{W}.lora_A.weight", f"{W}.lora_B.weight", "mlp1.0.bias")
    names = (f"{W}.weight", "mlp1.0.bias", "more")
    check_fit(parts, {name: TensorInfo(name, "BF16", (4, 4)) for name in names}, base_folder=Path("x"))


def test_kinds_are_told_from_names(tmp_path: Path) -> None:
    assert recognise(tmp_path) is None and recognise(tmp_path / "nothing.pth") is None
    (tmp_path / "iter_5.pth").write_bytes(b"anything")
    (tmp_path / "picture.png").write_bytes(b"anything")
    assert recognise(tmp_path / "iter_5.pth") == "pickle" and recognise(tmp_path / "picture.png") is None
    one = torch.ones(1)
    for name, expected in (
        ("base_model.model.model.layers.0.attention.wqkv.lora_A.weight", "peft"),
        ("base_model.model.encoder.layers.0.attn.qkv.lora_A.weight", "peft"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("base_model.model.model.vision_tower.encoder.layer.0.attention.q_proj.lora_A.weight", None),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file({name: one}, folder / "adapter_model.safetensors")
        assert recognise(folder) == expected
        (folder / "adapter_model.safetensors").write_bytes(b"cut off")
        assert recognise(folder) is None


def test_an_unmerged_folder_is_one_of_the_official_model(tmp_path: Path) -> None:
    at = "language_model.base_model.model.model.layers.0.attention.wqkv"
    names = {f"{at}.base_layer.weight": torch.ones(2), f"{at}.lora_A.default.weight": torch.ones(2)}
    for i, (tensors, config, expected) in enumerate(
        (
            (names, '{"model_type": "internvl_chat"}', "unmerged"),
            (names, '{"model_type": "llava"}', None),
            (names, "broken", None),
            ({"language_model.output.weight": torch.ones(2)}, '{"model_type": "internvl_chat"}', None),
        )
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"")  # safetensors beside it count first
        assert recognise(folder) == expected
