"""Checkpoints of XTuner's LLaVA trainer: pickled, or the parts that it writes of them."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import llava_models
import pytest
import torch

from vlmtune.errors import UsageError, WeightsError
from vlmtune.export.write import export
from vlmtune.models.load import read_folder
from vlmtune.weights.shards import Shards

TABLE = "vision_model.embeddings.position_embedding.weight"
PREFIXES = {"llm": llava_models.language_shapes, "visual_encoder": llava_models.tower_shapes}
PREFIXES["projector"] = llava_models.projector_shapes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_models.xtuner_folder(tmp_path_factory.mktemp("base") / "xtuner")


def trained(*parts: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    found = {f"{part}.{name}": t for part in parts for name, t in llava_models.random(PREFIXES[part]())}
    if "visual_encoder" in parts:
        found["visual_encoder.pos_emb"] = found[f"visual_encoder.{TABLE}"].clone()
        # what a forward on pictures of another size leaves behind
        found[f"visual_encoder.{TABLE}"] = torch.zeros(17, llava_models.TOWER_WIDTH)
    return found


def write(tensors: Mapping[str, torch.Tensor], file: Path) -> Path:
    torch.save({"state_dict": dict(tensors), "meta": {"cfg": "model = dict(type='AuroraModel')"}}, file)
    return file


def write_zero(tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """The folder that DeepSpeed's ZeRO-2 writes in two ranks: 16-bit weights, and float32 ones in equal parts."""
    folder.mkdir()
    shapes = OrderedDict((name, tensor.shape) for name, tensor in tensors.items())
    state = {
        "module": {name: tensor.bfloat16() for name, tensor in tensors.items()},
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    line = torch.cat([tensor.flatten() for tensor in tensors.values()])
    line = torch.cat([line, line.new_zeros(-len(line) % 4)])
    for rank, part in enumerate(line.chunk(2)):
        held = {"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [part.clone()]}
        torch.save({"optimizer_state_dict": held}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def expected(base: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    source = Shards(base)
    found = {name: source.read(name) for name in source.infos}
    for name, tensor in tensors.items():
        own = name.split(".", 1)[1]
        if own != "pos_emb" and name != f"visual_encoder.{TABLE}":
            found[own] = tensor
    if "visual_encoder.pos_emb" in tensors:
        found[TABLE] = tensors["visual_encoder.pos_emb"]
    return found


def assert_holds(folder: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    source = Shards(folder)
    assert set(source.infos) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize(
    "parts",
    [("projector",), ("visual_encoder", "projector"), ("llm", "projector"), ("llm", "visual_encoder", "projector")],
    ids="+".join,
)
def test_a_pickle_holds_what_was_not_frozen(parts: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    tensors = trained(*parts)
    result = export(write(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=base)
    assert result.layout == "xtuner" and all(one.holds for one in result.comparisons)
    assert_holds(tmp_path / "out", expected(base, tensors))
    frozen = {"llm": "language", "visual_encoder": "vision"}
    (note,) = [note for note in result.notes if "taken from the base" in note] or [""]
    assert {name for part, name in frozen.items() if f"the {name} component" in note} == {
        name for part, name in frozen.items() if part not in parts
    }
    assert result.counts["replaced"] == len([name for name in tensors if not name.endswith("pos_emb")])
    assert (tmp_path / "out" / "projector" / "modeling_projector.py").is_file()


@pytest.mark.parametrize("parts", [("projector",), ("visual_encoder", "projector")], ids="+".join)
def test_a_zero_folder_holds_what_was_not_frozen(parts: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    """In float32, to the bit: not the 16-bit copies beside."""
    tensors = trained(*parts)
    result = export(write_zero(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=base)
    assert result.layout == "xtuner" and all(one.holds for one in result.comparisons)
    assert any("the language component" in note for note in result.notes)
    assert_holds(tmp_path / "out", expected(base, tensors))


def test_the_base_may_be_a_native_folder(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "native", layout="native", verify="none")
    tensors = trained("projector")
    result = export(
        write(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=tmp_path / "native", layout="native"
    )
    assert result.layout == "native"
    linear = Shards(tmp_path / "out").read("multi_modal_projector.linear_2.weight")
    assert torch.equal(linear, tensors["projector.model.2.weight"])


def test_rows_for_the_placeholder_come_from_a_native_base(base: Path, tmp_path: Path) -> None:
    native = export(base, tmp_path / "native", layout="native", verify="none").out
    tensors = trained("llm", "projector")
    file = write(tensors, tmp_path / "iter_9.pth")
    result = export(file, tmp_path / "out", base=native, layout="native")
    assert all(one.holds for one in result.comparisons)
    old, new = Shards(native), Shards(result.out)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        rows, before = new.read(f"language_model.{name}"), old.read(f"language_model.{name}")
        assert len(rows) == len(before) == 384
        torch.testing.assert_close(rows[:320], tensors[f"llm.{name}"], rtol=0, atol=0)
        torch.testing.assert_close(rows[320:], before[320:], rtol=0, atol=0)
    (note,) = [note for note in result.notes if "rows" in note]
    assert "rows 320 to 383 of model.embed_tokens.weight and rows 320 to 383 of lm_head.weight" in note


@pytest.mark.parametrize("rows", [319, 321])
def test_another_vocabulary_is_none_with_added_rows(rows: int, base: Path, tmp_path: Path) -> None:
    native = export(base, tmp_path / "native", layout="native", verify="none").out
    tensors = {**trained("projector"), "llm.lm_head.weight": torch.zeros(rows, llava_models.WIDTH)}
    with pytest.raises(WeightsError, match="of another shape: lm_head"):
        export(write(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=native)


def test_the_folders_of_a_frozen_language_model(base: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(base / "projector", parts / "projector")
    tensors = trained("projector")
    llava_models._weights(parts / "projector", {k.split(".", 1)[1]: v for k, v in tensors.items()}, "safetensors")
    with pytest.raises(UsageError, match="does not hold the model that it was trained on"):
        export(parts, tmp_path / "out")
    export(parts, tmp_path / "out", base=base, verify="none")
    assert_holds(tmp_path / "out", expected(base, tensors))


def test_a_checkpoint_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = trained("projector")
    tensors["projector.model.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(WeightsError, match=r"of another shape: model\.0\.weight \(3, 3\), in the base \(64, 32\)"):
        export(write(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=base)


def test_lora_is_folded_in(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    at = "llm.base_model.model.model.layers.0.self_attn.q_proj"
    a, b = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    tensors = {f"{at}.lora_A.default.weight": a, f"{at}.lora_B.default.weight": b, **trained("projector")}
    export(write(tensors, tmp_path / "iter_9.pth"), tmp_path / "out", base=base, lora_alpha=8)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(Shards(tmp_path / "out").read(name), Shards(base).read(name) + 2 * b @ a)


@pytest.mark.parametrize("lost", ["projector", "visual_encoder"])
def test_a_folder_without_a_part_is_refused(lost: str, base: Path, tmp_path: Path) -> None:
    from vlmtune.models.load import open_folder

    shutil.copytree(base, tmp_path / "folder")
    config = tmp_path / "folder" / lost / "config.json"
    for text, reason in (("{", "is not JSON"), ("[]", "holds a list; expected a JSON object")):
        config.write_text(text)
        with pytest.raises(WeightsError, match=reason) as caught:
            open_folder(tmp_path / "folder")
        assert str(caught.value).startswith(f"{config}: ")
    shutil.rmtree(tmp_path / "folder" / lost)
    with pytest.raises(WeightsError, match=f"there is no {lost}/ with a config.json in it") as caught:
        open_folder(tmp_path / "folder")
    assert caught.value.exit_code == 4 and str(tmp_path / "folder") in str(caught.value)
    assert read_folder(tmp_path / "folder").config["model_type"] == "llama"
