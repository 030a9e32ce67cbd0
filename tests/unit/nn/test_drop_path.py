"""Drop path against the layers written out with their masks, in float64; and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.config.schema import FullTuning, LoraTuning
from vlmtune.errors import ConfigError
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn import drop_path
from vlmtune.tuning.adapters import prepare

RATE = 0.6


def _model(folder: Path, tuning: FullTuning | LoraTuning | None = None) -> Any:
    opened = open_folder(folder)
    return prepare(load_model(opened, dtype=torch.float64), opened, tuning or FullTuning(drop_path=RATE)).double()


def _encoder(model: Any) -> Any:
    """InternViT's stack, the trained copy where PEFT has made one."""
    found = [m for name, m in model.named_modules() if name.endswith("encoder") and "original_module" not in name]
    return found[0]


def _hidden(tiles: int) -> torch.Tensor:
    return torch.randn(tiles, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _by_hand(encoder: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Both residual branches of each layer, times one draw per tile, divided by the probability to stay."""

    def draw(keep: float) -> torch.Tensor | float:
        return torch.empty(len(hidden), 1, 1, dtype=torch.float64).bernoulli_(keep) / keep if keep < 1 else 1.0

    layers = list(encoder.layer)
    for number, layer in enumerate(layers):
        keep = 1 - RATE * number / (len(layers) - 1)
        mixed, _ = layer.attention(layer.layernorm_before(hidden))
        hidden = hidden + draw(keep) * (layer.lambda_1 * mixed)
        hidden = hidden + draw(keep) * (layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden)))
    return hidden


def test_equals_the_layers_written_out(tiny_folder: Callable[[str], Path]) -> None:
    encoder = _encoder(_model(tiny_folder("internvl"))).train()
    bare = _encoder(_model(tiny_folder("internvl"), FullTuning())).train()
    hidden = _hidden(64)
    torch.manual_seed(5)
    found = encoder(hidden).last_hidden_state
    torch.manual_seed(5)
    expected = _by_hand(bare, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    plain = bare(hidden).last_hidden_state
    unchanged = (found - plain).abs().amax(dim=(1, 2)) < 1e-9
    assert not unchanged.all()  # tiles draw for themselves, so some differ from the plain ones …
    assert torch.equal(encoder.eval()(hidden).last_hidden_state, plain)  # … and none when nothing trains


def test_mean_is_kept() -> None:
    dropped = drop_path.DropPath(0.3)
    module = torch.nn.Identity().train()
    branch = torch.ones(20_000, 2, 3, dtype=torch.float64)
    torch.manual_seed(0)
    found, rest = dropped(module, (), (branch, "weights"))
    assert rest == "weights"
    per_tile = found[:, 0, 0]
    assert torch.equal(found, per_tile[:, None, None].expand_as(found))  # a tile as a whole, or not at all
    assert set(per_tile.tolist()) == {0.0, 1 / 0.7}
    sigma = (0.3 / 0.7 / len(branch)) ** 0.5
    assert abs(float(per_tile.mean()) - 1) < 4 * sigma


def test_rates_rise_linearly() -> None:
    assert drop_path.rates(0.4, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path.rates(0.4, 1) == [0.0]


def test_checkpointing_draws_the_same_again(tiny_folder: Callable[[str], Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _model(tiny_folder("internvl")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        hidden = _hidden(8).requires_grad_()
        torch.manual_seed(7)
        _encoder(model)(hidden).last_hidden_state.square().sum().backward()
        gradients.append([hidden.grad, *(p.grad for p in _encoder(model).parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "tuning",
    [
        LoraTuning(rank=2, drop_path=RATE),  # a frozen tower, as in InternVL's own scripts
        LoraTuning(rank=2, targets=("vision",), drop_path=RATE),
        LoraTuning(rank=2, train=("vision",), drop_path=RATE),
    ],
    ids=["frozen", "adapter", "copy"],
)
def test_every_way_to_tune_has_it(tiny_folder: Callable[[str], Path], tuning: LoraTuning) -> None:
    encoder = _encoder(_model(tiny_folder("internvl"), tuning))
    hidden = _hidden(32)
    with torch.no_grad():
        assert not torch.equal(encoder.train()(hidden)[0], encoder(hidden)[0])
        assert torch.equal(encoder.eval()(hidden)[0], encoder(hidden)[0])


@pytest.mark.parametrize(("kind", "has_it"), [("llava", True), ("smolvlm", True), ("qwen2_5_vl", False)])
def test_other_towers_have_it_or_say_why_not(tiny_folder: Callable[[str], Path], kind: str, has_it: bool) -> None:
    if has_it:
        model = _model(tiny_folder(kind))
        words = model.get_input_embeddings()  # has the hook of pseudo-text
        hooked = [m for m in model.modules() if m._forward_hooks and m is not words]
        assert {type(module).__name__.split("Vision")[-1][-3:] for module in hooked} <= {"ion", "MLP"}
        return
    with pytest.raises(ConfigError, match=r"tuning\.drop_path: .*no attention and MLP branch") as caught:
        _model(tiny_folder(kind))
    assert caught.value.exit_code == 2
