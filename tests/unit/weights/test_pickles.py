"""What a pickled checkpoint may hold, and what happens to everything else."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmtune.errors import WeightsError
from vlmtune.weights import pickles
from vlmtune.weights.foreign.tensors import read_pickle
from vlmtune.weights.shards import Shards


class _Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, torch.hub.load])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, function: Any, zipped: bool) -> None:
    ran = tmp_path / "ran"
    argument = f"touch {ran}" if function is os.system else f"open({str(ran)!r}, 'w')"
    file = tmp_path / "iter_1.pth"
    held = {"state_dict": {"a": torch.ones(2)}, "meta": _Calls(function, argument)}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=rf"asks for ([\w.]*\.)?{function.__name__}, .* Nothing in it was run"):
        read_pickle(file)
    assert not ran.exists()


def test_a_stub_of_getattr_gets_nothing(tmp_path: Path) -> None:
    """The way by which a stub could lead to code: an attribute of an allowed class, then a call of it."""
    ran = tmp_path / "ran"
    file = tmp_path / "iter_1.pth"
    torch.save({"a": _Calls(Path.touch, ran)}, file)
    with pytest.raises(WeightsError, match=r"asks for pathlib\.Path"):
        read_pickle(file)
    body = pickle.PROTO + b"\x02" + b"cbuiltins\ngetattr\nctorch\nload\nX\x01\x00\x00\x00x\x86R."
    with pytest.raises(WeightsError, match=r"torch\.load"):
        pickles.load(_zipped(file, body))
    body = pickle.PROTO + b"\x02" + b"cbuiltins\ngetattr\nX\x01\x00\x00\x00x\x85RX\x01\x00\x00\x00y\x85R."
    with pytest.raises(WeightsError, match=r"the pickle does what a checkpoint does not do .*Inert"):
        pickles.load(_zipped(file, body))  # calls what the stub returned
    assert not ran.exists()


def test_objects_of_numpy_become_stubs(tmp_path: Path) -> None:
    """As mmengine's message hub holds them; this machine's numpy makes the names of today."""
    file = tmp_path / "iter_1.pth"
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": weights, "message_hub": {"loss": np.arange(3), "lr": np.float32(2)}}, file)
    found, text = read_pickle(file)
    assert list(found.infos) == ["a", "b"] and text == "" and len(found) == 2 and "a" in found
    assert torch.equal(found.read("a"), weights["a"]) and torch.equal(found.read("b"), weights["b"])
    assert (found.infos["b"].dtype, found.infos["a"].shape) == ("BF16", (2, 3))


@pytest.mark.parametrize("name", pickles.STUBBED)
def test_every_stub_takes_arguments_and_state(tmp_path: Path, name: str) -> None:
    """A pickle written by hand: the global called with an argument and given a state."""
    module, _, attribute = name.rpartition(".")
    body = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST
    body += pickle.GLOBAL + f"{module}\n{attribute}\n".encode() + b"K\x01\x85R}b"  # Name(1), then BUILD with {}
    body += pickle.APPEND + pickle.STOP
    file = _zipped(tmp_path / "x.pth", body)
    (stub,) = pickles.load(file)
    assert type(stub) is pickles.Inert and not vars(stub)


def test_a_checkpoint_as_mmengine_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms in which mmengine 0.10 pickles its message hub and configuration, with classes of the same names."""
    history = types.ModuleType("mmengine.logging.history_buffer")
    config = types.ModuleType("mmengine.config.config")
    for module in (types.ModuleType("mmengine"), types.ModuleType("mmengine.logging"), history, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._max_length = np.arange(3.0), 1000
            self._statistics_methods = {"mean": _Calls(getattr, type(self), "__str__")}

    class ConfigDict(dict):  # type: ignore[type-arg]
        def __reduce_ex__(self, protocol: Any) -> Any:
            return type(self), (dict(self),)

    for module, made in ((history, HistoryBuffer), (config, ConfigDict)):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 5, "lr": np.float64(1)}}
    weights = {"model.mlp1.0.bias": torch.ones(3)}
    meta = {"cfg": "llm_lora = dict(r=4)", "dataset_meta": ConfigDict(a=ConfigDict(b=1))}
    torch.save({"state_dict": weights, "message_hub": hub, "meta": meta}, tmp_path / "iter_5.pth")
    found, text = read_pickle(tmp_path / "iter_5.pth")
    assert torch.equal(found.read("model.mlp1.0.bias"), torch.ones(3)) and text == "llm_lora = dict(r=4)"


def test_the_list_of_stubs_ends_with_the_file(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # torch gives them in no order
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1)}, file)
    pickles.load(file)
    assert set(torch.serialization.get_safe_globals()) == before


def _zipped(file: Path, body: bytes) -> Path:
    """An archive of torch.save with another pickle inside."""
    torch.save([], file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, body if name.endswith("data.pkl") else data)
    return file


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_a_file_that_is_cut_off_is_one_paragraph(tmp_path: Path, kept: float, zipped: bool) -> None:
    file = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(WeightsError, match=r"iter_1\.pth: .*(cannot be read|does what)"):
        read_pickle(file)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"state_dict": {}}, "no tensors"),
        ({"state_dict": {"a": torch.ones(1), "b": 3, "c": "x"}}, "2 of 3 entries are no tensors: b, c"),
        ({3: torch.ones(1)}, "1 of 1 entries are no tensors: 3"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, r"a has the dtype torch\.complex64; expected plain numbers"),
        ({"epoch": 3, "lr": 0.1}, "2 of 2 entries are no tensors: epoch, lr"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, held: Any, message: str) -> None:
    torch.save(held, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        read_pickle(tmp_path / "x.pth")


def test_a_model_folder_with_other_than_plain_numbers(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1, dtype=torch.complex64)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: a has the dtype torch\.complex64"):
        Shards(tmp_path)


def test_parameters_come_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pth")
    found, _ = read_pickle(tmp_path / "x.pth")
    assert not found.read("a").requires_grad


def test_the_configuration_is_taken_only_as_text(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    weights = {"a": torch.ones(1)}
    for meta, expected in (({"cfg": "a = 1"}, "a = 1"), ({"cfg": {"a": 1}}, ""), ("a = 1", ""), ({}, "")):
        torch.save({"state_dict": weights, "meta": meta}, file)
        assert read_pickle(file)[1] == expected
