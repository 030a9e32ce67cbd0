"""DeepSpeed's folders written by hand; real ones of all stages are in tests/distributed/test_zero_checkpoints.py."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.errors import WeightsError
from vlmtune.weights.foreign.recognise import rank_folder
from vlmtune.weights.foreign.zero import read_zero

WEIGHTS = {"a": torch.arange(15.0).reshape(3, 5), "b": torch.arange(7.0) + 100, "c": torch.arange(4.0).view(2, 2) + 50}
FROZEN = {"f": torch.arange(9.0).reshape(3, 3) - 20}
WORLD = 3


def _padded(vector: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([vector, torch.zeros(-len(vector) % multiple)])


def write_stage_2(folder: Path, *, paddings: bool = False) -> Path:
    """Two groups, [a, b] and [c], in `WORLD` equal parts each."""
    folder.mkdir(exist_ok=True)
    groups = [["a", "b"], ["c"]]
    lines = [[WEIGHTS[name].flatten() for name in group] for group in groups]
    if paddings:
        lines = [[_padded(vector, 8) for vector in line] for line in lines]
    flat = [_padded(torch.cat(line), 2 * WORLD).chunk(WORLD) for line in lines]
    state: dict[str, Any] = {
        "module": {name: value.bfloat16() for name, value in (WEIGHTS | FROZEN).items()}
        | {"scale": torch.tensor([1.0, 3.0]), "tied": WEIGHTS["b"].bfloat16()},
        "buffer_names": ["scale"],
        "param_shapes": [OrderedDict((name, WEIGHTS[name].shape) for name in group) for group in groups],
        "frozen_param_shapes": {"f": FROZEN["f"].shape},
        "frozen_param_fragments": dict(FROZEN),
        "shared_params": {"tied": "b"},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    for rank in range(WORLD):
        state = {"zero_stage": 2, "partition_count": [WORLD, WORLD]}
        state["single_partition_of_fp32_groups"] = [parts[rank].clone() for parts in flat]
        if paddings:
            state["param_alignment_paddings"] = [[-math.prod(WEIGHTS[n].shape) % 8 for n in group] for group in groups]
        _save_optimizer(folder, rank, state)
    return folder


def write_stage_3(folder: Path) -> Path:
    """Every parameter in `WORLD` parts, laid end to end and broken where no parameter ends."""
    folder.mkdir(exist_ok=True)
    shares = {name: _padded(value.flatten(), WORLD).chunk(WORLD) for name, value in (WEIGHTS | FROZEN).items()}
    for rank in range(WORLD):
        state: dict[str, Any] = {
            "module": {"scale": torch.tensor([1.0, 3.0])},
            "buffer_names": ["scale"],
            "param_shapes": [OrderedDict((name, value.shape) for name, value in WEIGHTS.items())],
            "frozen_param_shapes": {"f": FROZEN["f"].shape},
            "frozen_param_fragments": {"f": shares["f"][rank].clone()},
            "shared_params": {"tied": "b"},
        }
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        line = torch.cat([shares[name][rank] for name in WEIGHTS])
        groups = [part.clone() for part in (line[:4], line[4:5], line[5:])]
        _save_optimizer(folder, rank, {"zero_stage": 3, "partition_count": WORLD, "fp32_flat_groups": groups})
    return folder


def _save_optimizer(folder: Path, rank: int, state: dict[str, Any]) -> None:
    torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


STAGES: dict[str, Callable[[Path], Path]] = {
    "stage 2": write_stage_2,
    "stage 2, padded parameters": lambda folder: write_stage_2(folder, paddings=True),
    "stage 3": write_stage_3,
}


@pytest.mark.parametrize("write", STAGES.values(), ids=STAGES)
def test_the_weights_come_back(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found, text = read_zero(write(tmp_path))
    expected = WEIGHTS | FROZEN | {"scale": torch.tensor([1.0, 3.0]), "tied": WEIGHTS["b"]}
    assert set(found.infos) == set(expected) and text == ""
    for name, value in expected.items():
        assert torch.equal(found.read(name), value), name
        assert found.infos[name].shape == tuple(value.shape)


def test_ranks_beyond_nine_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    line = torch.arange(24.0)
    state = {"module": {}, "param_shapes": [{"a": torch.Size([24])}], "shared_params": {}, "buffer_names": []}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(line.chunk(12)):
        held = {"zero_stage": 1, "partition_count": [12], "single_partition_of_fp32_groups": [part.clone()]}
        _save_optimizer(tmp_path, rank, held)
    assert torch.equal(read_zero(tmp_path)[0].read("a"), line)


@pytest.mark.parametrize("write", [write_stage_2, write_stage_3])
@pytest.mark.parametrize("rank", range(WORLD))
def test_a_missing_rank_is_named(tmp_path: Path, write: Callable[[Path], Path], rank: int) -> None:
    file = write(tmp_path) / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    file.unlink()
    with pytest.raises(WeightsError, match=f"1 of the 3 files of the ranks are missing: {file.name}"):
        read_zero(tmp_path)


def test_a_missing_model_file_of_a_rank_is_named(tmp_path: Path) -> None:
    (write_stage_3(tmp_path) / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(WeightsError, match=r"missing: zero_pp_rank_1_mp_rank_00_model_states\.pt"):
        read_zero(tmp_path)
    (tmp_path / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(WeightsError, match=r"model files of 1 ranks; expected of 3"):
        read_zero(tmp_path)


def test_without_any_optimizer_file_the_weights_are_missing(tmp_path: Path) -> None:
    for file in write_stage_2(tmp_path).glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(WeightsError, match="files of the optimizer"):
        read_zero(tmp_path)


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    write_stage_2(tmp_path)
    file = tmp_path / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    file.write_bytes((tmp_path / "zero_pp_rank_2_mp_rank_00_optim_states.pt").read_bytes())
    with pytest.raises(WeightsError, match="4 files of ranks, but the run had 3"):
        read_zero(tmp_path)


@pytest.mark.parametrize(("write", "holder"), [(write_stage_2, 0), (write_stage_3, 0)])
def test_parts_that_are_too_long_or_too_short_are_refused(
    tmp_path: Path, write: Callable[[Path], Path], holder: int
) -> None:
    file = write(tmp_path) / f"zero_pp_rank_{holder}_mp_rank_00_optim_states.pt"
    for change in (6, -6):
        held = torch.load(file)
        state = held["optimizer_state_dict"]
        key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
        vector = state[key][0]
        state[key][0] = torch.cat([vector, torch.ones(change)]) if change > 0 else vector[: max(0, len(vector) - 6)]
        torch.save(held, file)
        with pytest.raises(WeightsError, match="the parts of the ranks hold"):
            read_zero(tmp_path)
        write(tmp_path)


def test_parts_in_another_order_than_the_16_bit_copy_are_refused(tmp_path: Path) -> None:
    """Files of two ranks exchanged: every size is right, and every number in its wrong place."""
    write_stage_2(tmp_path)
    first, second = (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    found, _ = read_zero(tmp_path)
    with pytest.raises(WeightsError, match="the float32 parts of a are not its 16-bit copy"):
        found.read("a")


def test_another_rounding_of_the_16_bit_copy_is_no_complaint(tmp_path: Path) -> None:
    file = write_stage_2(tmp_path) / "mp_rank_00_model_states.pt"
    state = torch.load(file)
    state["module"]["b"] = torch.nextafter(state["module"]["b"], torch.tensor(1e3, dtype=torch.bfloat16))
    torch.save(state, file)
    assert torch.equal(read_zero(tmp_path)[0].read("b"), WEIGHTS["b"])


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"])
def test_models_cut_otherwise_are_refused_by_the_file(tmp_path: Path, name: str) -> None:
    write_stage_2(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=name):
        read_zero(tmp_path)


def test_foreign_contents_are_refused(tmp_path: Path) -> None:
    torch.save({"x": 1}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(WeightsError, match="no model state as DeepSpeed writes it"):
        read_zero(tmp_path)
    write_stage_2(tmp_path)
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(WeightsError, match="no state of a ZeRO optimizer"):
        read_zero(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("param_shapes", 3), ("param_shapes", [["a"], ["b"]]), ("module", {"a": 3, "x": 4}),
        ("frozen_param_fragments", {"f": "x"}), ("shared_params", [1]), ("param_shapes", [{"a": "xyz"}, {}]),
    ],
)  # fmt: skip
def test_other_things_in_their_places_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    file = write_stage_2(tmp_path) / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file), key: value}, file)
    with pytest.raises(WeightsError, match="not laid out as DeepSpeed does it"):
        read_zero(tmp_path)


def test_latest_names_a_folder_beside_itself_only(tmp_path: Path) -> None:
    write_stage_2(tmp_path / "global_step2")
    assert rank_folder(tmp_path) is None and rank_folder(tmp_path / "nothing") is None
    for text, expected in (
        ("global_step2\n", tmp_path / "global_step2"), ("global_step3", None), ("", None),
        ("../" + tmp_path.name + "/global_step2", None), (str(tmp_path / "global_step2"), None),
    ):  # fmt: skip
        (tmp_path / "latest").write_text(text)
        assert rank_folder(tmp_path) == expected
    assert rank_folder(tmp_path / "global_step2") == tmp_path / "global_step2"
