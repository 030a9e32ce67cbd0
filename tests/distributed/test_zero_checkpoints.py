"""Checkpoints that DeepSpeed itself writes come back as the weights that DeepSpeed itself gathers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file

from vlmtune.errors import WeightsError
from vlmtune.weights.foreign.recognise import rank_folder
from vlmtune.weights.foreign.zero import read_zero

ENTRY = Path(__file__).with_name("zero_entry.py")
CASES = {
    "zero1": {"stage": 1, "bf16": True, "exclude_frozen": False},
    "zero1_float32": {"stage": 1, "bf16": False, "exclude_frozen": True},
    "zero2": {"stage": 2, "bf16": True, "exclude_frozen": False},
    "zero3": {"stage": 3, "bf16": True, "exclude_frozen": False},
    "zero3_float32": {"stage": 3, "bf16": False, "exclude_frozen": False},
    "without": {"stage": 0, "bf16": False, "exclude_frozen": False},
}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints of one launch."""
    folder = tmp_path_factory.mktemp("zero")
    on_two_ranks(ENTRY, CASES, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_equals_what_deepspeed_gathers(written: Path, name: str) -> None:
    found, text = read_zero(written / name)
    expected = load_file(written / f"{name}.safetensors")
    if CASES[name]["exclude_frozen"]:
        expected = {key: value for key, value in expected.items() if "frozen" not in key}
    assert set(found.infos) == set(expected)
    for key, value in expected.items():
        assert found.read(key).dtype == value.dtype
        assert found.infos[key].shape == tuple(value.shape)
        assert torch.equal(found.read(key), value), key
    assert text == "llm_lora = dict(r=4, lora_alpha=8)"


def test_latest_names_the_folder(written: Path) -> None:
    assert rank_folder(written) == written / list(CASES)[-1]
    assert rank_folder(written / "zero2") == written / "zero2"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_missing_is_named(written: Path, tmp_path: Path, name: str, rank: int) -> None:
    for file in (written / name).iterdir():
        if not ("optim" in file.name and f"rank_{rank}_" in file.name):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(WeightsError, match=rf"missing: bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states\.pt"):
        read_zero(tmp_path)
