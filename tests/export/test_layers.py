"""`--verify layers` says what `full` says, notices what `full` notices, and never holds the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, save_tiny
from torch import nn

from vlmtune.cli.main import main
from vlmtune.errors import ExportError, WeightsError
from vlmtune.export import layers, merge, verify, write
from vlmtune.export.layers import Meter
from vlmtune.export.write import ExportResult, export
from vlmtune.infer.locate import Located, locate
from vlmtune.infer.session import load
from vlmtune.weights.shards import Shards

FOLDERS = (*KINDS, "official-internlm2", "official-phi3", "xcomposer2", "xcomposer2-4khd")


def _both_ways(path: Path, into: Path, **options: Any) -> list[ExportResult]:
    results = [export(path, into / mode, verify=mode, device="cpu", **options) for mode in ("full", "layers")]
    assert [result.verify for result in results] == ["full", "layers"]
    return results


@pytest.mark.parametrize("kind", FOLDERS)
def test_logits_are_those_of_the_model_in_memory(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    """Buffers, ties, fused tensors and packed attention come out as `from_pretrained` has them, bit by bit."""
    session = layers.open_source(locate(tiny_folder(kind)), "cpu", Meter())
    whole = load(tiny_folder(kind), device="cpu", dtype="float32")
    for one, other in zip(session.logits(verify.fixed_prompts()), whole.logits(verify.fixed_prompts()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "method", "dtype", "layout"),
    [
        ("internvl", None, "bfloat16", None),
        ("internvl", "dora", "bfloat16", None),
        ("llava", None, "float32", None),
        ("llava", "lora", "bfloat16", None),
        ("official-internlm2", None, "bfloat16", "official"),
        ("official-internlm2", "lora", "float32", "native"),
        ("official-internlm2", "dora", "bfloat16", "official"),
        ("xcomposer2-4khd", "lora", "bfloat16", "official"),
    ],
)
def test_figures_are_those_of_full(
    kind: str,
    method: str | None,
    dtype: str,
    layout: str | None,
    tiny_folder: Callable[[str], Path],
    adapter_folder: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    path = tiny_folder(kind) if method is None else adapter_folder(kind, method)
    full, streamed = _both_ways(path, tmp_path, layout=layout, dtype=dtype)
    assert [one.prompt for one in streamed.comparisons] == ["text prompt", "picture prompt"]
    for one, other in zip(full.comparisons, streamed.comparisons, strict=True):
        assert other.difference == pytest.approx(one.difference, rel=1e-3, abs=1e-6)
        assert other.one_cast == pytest.approx(one.one_cast, rel=1e-3, abs=1e-6)
        assert (other.one_cast > 0) == (dtype == "bfloat16" or method is not None)
        assert other.limit == max(verify.TOLERANCE, 2 * other.one_cast)


def test_the_mode_is_printed_and_stored(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One case for each mode; what is in memory is said only where it is not the model."""
    for mode, words in (
        ("full", "--verify full, in memory"),
        ("layers", "GB of the weights"),
        ("none", "not compared"),
    ):
        out = tmp_path / mode
        command = ["export", str(tiny_folder("llava")), "-o", str(out), "--verify", mode, "--device", "cpu"]
        assert main(command) == 0
        assert words in capsys.readouterr().out
        record = json.loads((out / "export.json").read_text())
        assert record["verify"] == mode
        assert (record["weights_in_memory"] is not None) == (mode == "layers")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["internvl", "official-internlm2"])
def test_one_changed_tensor_is_noticed(
    kind: str, dtype: Any, adapter_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish: Any = write.files.finish_files

    def corrupt(draft: Path, *rest: Any, **more: Any) -> None:
        finish(draft, *rest, **more)
        tensors = load_file(draft / "model.safetensors")
        name = next(
            name for name in tensors if name.endswith(("layers.1.mlp.down_proj.weight", "1.attention.wo.weight"))
        )
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(write.files, "finish_files", corrupt)
    with pytest.raises(ExportError, match="not the trained one"):
        export(adapter_folder(kind, "lora"), tmp_path / "out", dtype=dtype, verify="layers", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    if change == "unknown":
        tensors["stranger.weight"] = torch.ones(2)
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match={"unknown": r"stranger\.weight"}.get(change, r"1\.mlp\.down_proj\.weight")):
        layers.open_source(Located(path=folder), "cpu", Meter())


@pytest.fixture(scope="module")
def sizeable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many equal layers beside which the embeddings are small."""
    folder = save_tiny("llava", tmp_path_factory.mktemp("sizeable"))
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config.text_config.update({"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 512})
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def test_weights_come_and_go(sizeable: Path) -> None:
    """Counted from outside: what lies in memory under the names of the parameters, before and behind every module."""
    meter = Meter()
    session = layers.open_source(Located(path=sizeable), "cpu", meter)
    seen: list[int] = []
    for module in session.model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(_resident(session.model)))
        module.register_forward_hook(lambda *_: seen.append(_resident(session.model)), prepend=True)
    before = _resident(session.model)
    session.logits(verify.fixed_prompts())
    whole = sum(parameter.nbytes for parameter in session.model.parameters())
    largest = max(parameter.nbytes for parameter in session.model.parameters())
    assert before == _resident(session.model) < whole / 100 and meter.live == 0
    assert largest <= meter.peak <= max(seen) < whole / 20


def _resident(model: nn.Module) -> int:
    """Bytes of parameters whose numbers exist; a stand-in repeats one number along strides of 0."""
    return sum(one.nbytes if any(one.stride()) or one.numel() == 1 else 4 for one in _unique(model))


def _unique(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from {id(one): one for one in model.parameters()}.values()


def test_weights_that_were_not_read_cannot_pass_for_an_answer(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a module used the weights of another one that does not run."""
    right = layers._used_by

    def forgetful(module: nn.Module) -> Iterator[nn.Module]:
        yield from (one for one in right(module) if not isinstance(one, nn.LayerNorm))

    monkeypatch.setattr(layers, "_used_by", forgetful)
    session = layers.open_source(locate(tiny_folder("llava")), "cpu", Meter())
    with pytest.raises(ExportError, match="uses those of another"):
        layers.ask(session, verify.fixed_prompts()[1:], "asking")


def test_what_does_not_fit_is_compared_layer_by_layer(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(tiny_folder("llava"), tmp_path / "fits", device="cpu").verify == "full"
    monkeypatch.setattr(layers, "free_memory", lambda: 100_000)
    assert export(tiny_folder("llava"), tmp_path / "out", device="cpu").verify == "layers"
    with pytest.raises(ExportError, match=r"--verify full: the model takes .* --verify layers") as caught:
        export(tiny_folder("llava"), tmp_path / "refused", verify="full", device="cpu")
    assert caught.value.exit_code == 4
    assert export(tiny_folder("llava"), tmp_path / "unchecked", verify="none", device="cpu").verify == "none"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "out", "unchecked"]


def test_the_memory_of_the_gpu_counts(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = Shards(tiny_folder("llava"))
    free = {"cuda": 100_000}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[place.type], 10**12))
    assert layers.choose(None, source, "cuda:0") == "layers"
    assert layers.choose(None, source, "cpu") == "full"
    free["cuda"] = 10**11
    assert layers.choose(None, source, "cuda:0") == "full"


def test_what_is_merged_as_a_whole_is_compared_as_a_whole(
    adapter_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise merge.NotStreamable("of a test")

    monkeypatch.setattr(write, "plan_merge", refuse)
    assert export(adapter_folder("llava", "lora"), tmp_path / "out", verify="layers", device="cpu").verify == "full"
