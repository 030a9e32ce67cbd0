"""Shards against the safetensors library itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import llava_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.errors import WeightsError
from vlmtune.weights.places import is_plain
from vlmtune.weights.shards import (
    INDEX,
    SINGLE,
    Shards,
    TensorInfo,
    dtype_code,
    read_header,
    write_shards,
)

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "odd.bytes": torch.arange(7, dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "long": torch.tensor([1, -2], dtype=torch.int64),
}


def plan_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [
        TensorInfo(name, dtype_code(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_what_is_written_the_safetensors_library_reads(tmp_path: Path) -> None:
    files = write_shards(tmp_path, plan_of(TENSORS), TENSORS.__getitem__)
    assert files == [tmp_path / SINGLE]
    assert equal(load_file(tmp_path / SINGLE), TENSORS)


def test_every_tensor_is_aligned_to_its_own_size(tmp_path: Path) -> None:
    write_shards(tmp_path, plan_of(TENSORS), TENSORS.__getitem__)
    raw = (tmp_path / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_several_shards_have_an_index_that_transformers_understands(tmp_path: Path) -> None:
    written = write_shards(tmp_path, plan_of(TENSORS), TENSORS.__getitem__, max_shard_bytes=50)
    shards = [path for path in written if path.name != INDEX]
    assert len(shards) > 2 and not (tmp_path / SINGLE).exists()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    together: dict[str, torch.Tensor] = {}
    for path in shards:
        for name, tensor in load_file(path).items():
            assert index["weight_map"][name] == path.name
            together[name] = tensor
    assert equal(together, TENSORS)
    opened = Shards(tmp_path)
    assert equal({name: opened.read(name) for name in opened.infos}, TENSORS)


def test_one_tensor_is_asked_for_at_a_time_and_each_once(tmp_path: Path) -> None:
    asked: list[str] = []
    seen: list[str] = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    def advance(infos):  # type: ignore[no-untyped-def]
        for info in infos:
            seen.append(info.name)
            yield info

    write_shards(tmp_path, plan_of(TENSORS), tensor, advance=advance)
    assert sorted(asked) == sorted(TENSORS)
    assert asked == seen


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"b\.weight is F32 \(4, 3\); expected F32 \(3, 4\)"):
        write_shards(tmp_path, plan_of({"b.weight": TENSORS["b.weight"]}), lambda _: torch.zeros(4, 3))


def test_headers_are_read_without_weights(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    infos = {info.name: info for info in read_header(tmp_path / SINGLE)}
    assert infos["b.weight"] == TensorInfo("b.weight", "F32", (3, 4))
    assert infos["b.weight"].num_bytes == 48


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:-9])
    with pytest.raises(WeightsError, match=r"model\.safetensors: \d+ bytes where the header promises \d+"):
        Shards(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="no safetensors header"):
        Shards(tmp_path)


def test_a_missing_shard_and_a_lost_tensor_are_named(tmp_path: Path) -> None:
    written = write_shards(tmp_path, plan_of(TENSORS), TENSORS.__getitem__, max_shard_bytes=50)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = written[0].name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="the first is ghost"):
        Shards(tmp_path)
    written[1].unlink()
    with pytest.raises(WeightsError, match=written[1].name):
        Shards(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "{root}/model.safetensors", "a/../../model.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(place: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, place.format(root=tmp_path))}))
    with pytest.raises(WeightsError, match="lies outside the folder"):
        Shards(folder)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": ["a"]}', '{"weight_map": ' + "[" * 100_000], ids=len)
def test_an_index_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsError, match="the index cannot be read"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'], ids=len
)
def test_a_header_of_another_form_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="a safetensors header that cannot be read"):
        Shards(tmp_path)


def test_a_header_is_not_read_into_memory_whatever_its_size(tmp_path: Path) -> None:
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 10**10))
        file.truncate(10**10 + 8)  # takes no space
    with pytest.raises(WeightsError, match="no safetensors header"):
        Shards(tmp_path)


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match="no weights in safetensors files"):
        Shards(tmp_path)
    with pytest.raises(WeightsError, match="no folder of this name"):
        Shards(tmp_path / "nowhere")


def test_pickled_weights_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    shards = Shards(tmp_path)
    assert not is_plain(tmp_path)
    assert {name: info.shape for name, info in shards.infos.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in TENSORS.items())
    save_file({"only": torch.ones(2)}, tmp_path / SINGLE)
    assert list(Shards(tmp_path).infos) == ["only"] and is_plain(tmp_path)


def test_pickled_shards_and_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="1 of 2 shards are missing: pytorch_model-00002"):
        Shards(tmp_path)
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert Shards(tmp_path).read("b").tolist() == [0, 0, 0]


def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    import subprocess

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return subprocess.check_call, ("false",)

    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"asks for \w+\.check_call"):
        Shards(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="something else than weights"):
        Shards(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_folders_of_a_model_in_parts(form: llava_models.Form, tmp_path: Path) -> None:
    folder = llava_models.xtuner_folder(tmp_path / "model", form=form)
    shards = Shards(folder)
    shapes = (llava_models.language_shapes, llava_models.tower_shapes, llava_models.projector_shapes)
    assert {name: info.shape for name, info in shards.infos.items()} == {n: s for part in shapes for n, s in part()}
    assert not is_plain(folder)
    assert shards.read("model.0.bias").shape == (llava_models.WIDTH,)
