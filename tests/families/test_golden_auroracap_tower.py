"""Token merging and the merging tower against numbers recorded from AuroraCap's own encoders.

Tolerances are those of the records' README: float32 on a CPU. Verdicts: *equal*; *mended* where the reference raises on
a picture of another size (its SigLIP encoder), decided by the error in the record.
"""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import golden
import naive_merging
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from vlmtune.models.llava.tower import GRIDS, MergingTower
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.token_merging import kept_tokens, match, merge, merged_per_layer

pytestmark = pytest.mark.golden

ROOT = golden.root() / "auroracap"
PREFIX = "vision_model."
STATES, POSITIONS, LOSS = 1e-4, 1e-5, 1e-5


def encoders() -> list[Path]:
    """Folders that hold a tower and its cases: ``clip``, ``siglip``."""
    return [
        folder
        for folder in golden.folders("auroracap")
        if (folder / "cases.json").is_file() and "vision" in record_of(folder / "config.json")["model_type"]
    ]


@functools.cache
def record_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "cases.safetensors")


def each_case(*, works: bool) -> list[Any]:
    return [
        pytest.param(folder, name, id=golden.name(folder, name))
        for folder in encoders()
        for name, case in record_of(folder / "cases.json")["cases"].items()
        if ("error" not in case) == works
    ]


def plain_tower(folder: Path) -> Any:
    """The folder's tower as transformers builds it, with all of its weights."""
    model = AutoModel.from_config(AutoConfig.for_model(**record_of(folder / "config.json")))
    state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state)
    return model.float().eval()


def tower_of(folder: Path, strategy: str = "default") -> Any:
    return MergingTower.wrap(plain_tower(folder), strategy=strategy)


def pixels_of(folder: Path, name: str) -> torch.Tensor:
    return numbers(folder)[f"{name.rpartition('.ratio_')[0]}.pixel_values"]


def ratio_of(name: str) -> float:
    return float(name.rpartition(".ratio_")[2])


def batch(tower: Any, pixels: torch.Tensor, ratio: float) -> dict[str, torch.Tensor]:
    """Pictures (n, 3, H, W) of one size as the trainer hands them over."""
    patch, (height, width) = tower.config.patch_size, pixels.shape[-2:]
    r = merged_per_layer(height, width, patch=patch, layers=tower.config.num_hidden_layers, ratio=ratio)
    patches = torch.cat([naive_merging.patches_of(picture, patch) for picture in pixels])
    return {"pixel_values": patches, GRIDS: torch.tensor([[height, width, r]] * len(pixels))}


def features(tower: Any, pixels: torch.Tensor, ratio: float) -> torch.Tensor:
    """hidden_states[-2] without the dummy: (n, tokens, d)."""
    found = tower(**hand_over(tower, batch(tower, pixels, ratio)), output_hidden_states=-2).hidden_states[-2][:, 1:]
    return found[0].unflatten(0, (len(pixels), -1))


@pytest.mark.parametrize(("folder", "name"), each_case(works=True))
@torch.no_grad()
def test_features_and_token_counts(folder: Path, name: str) -> None:
    case, tower, pixels = record_of(folder / "cases.json")["cases"][name], tower_of(folder), pixels_of(folder, name)
    assert list(pixels.shape[-2:]) == case["image_hw"] and ratio_of(name) == case["ratio"]
    given = batch(tower, pixels, case["ratio"])
    assert given[GRIDS][:, 2].tolist() == [case["r"]] * len(pixels)
    found = features(tower, pixels, case["ratio"])
    assert found.shape[1] == case["features_tokens"]
    torch.testing.assert_close(found, numbers(folder)[f"{name}.features"], atol=STATES, rtol=0)
    counts = case["tokens_per_hidden_state"]
    assert [1 + kept_tokens(counts[0] - 1, case["r"], merges=n) for n in range(len(counts))] == counts


@pytest.mark.parametrize(("folder", "name"), each_case(works=True))
@torch.no_grad()
def test_hidden_states_and_sizes(folder: Path, name: str) -> None:
    """All tokens of every state, the first included; sizes exactly."""
    case, tower, pixels = record_of(folder / "cases.json")["cases"][name], tower_of(folder, "full"), numbers(folder)
    given = batch(tower, pixels_of(folder, name), case["ratio"])
    states = list(tower.states(given["pixel_values"], given[GRIDS]))
    assert [state.groups[0].tokens for state in states] == case["tokens_per_hidden_state"]
    sizes = [torch.stack(state.of_pictures(state.sizes))[..., None] for state in states]
    assert torch.equal(sizes[-2], pixels[f"{name}.sizes_at_minus2"])
    laid = tower(**hand_over(tower, given), output_hidden_states=True).hidden_states
    for number, state in enumerate(states):
        if (expected := pixels.get(f"{name}.sizes_after_layer_{number}")) is not None:
            assert torch.equal(sizes[number], expected)
        if (expected := pixels.get(f"{name}.hidden_{number}")) is not None:
            torch.testing.assert_close(torch.stack(state.of_pictures(state.hidden[0])), expected, atol=STATES, rtol=0)
            torch.testing.assert_close(laid[number][0], expected.flatten(0, 1), atol=STATES, rtol=0)


def graded() -> list[Any]:
    return [
        pytest.param(folder, name, id=golden.name(folder, name))
        for folder in encoders()
        for name, case in record_of(folder / "cases.json")["cases"].items()
        if "grad_norms" in case
    ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("folder", "name"), graded())
def test_gradients(folder: Path, name: str, checkpointing: bool) -> None:
    """Those of the position table are *mended*: the reference's belong to a table of the picture's size that it throws
    away; ours to the model's own, through the interpolation. Its `pos_emb` has none, and we have no such thing."""
    case, io, tower = record_of(folder / "cases.json")["cases"][name], numbers(folder), tower_of(folder)
    if checkpointing:
        tower.train().activation_checkpointing_enable()
    found = features(tower, pixels_of(folder, name), case["ratio"])
    loss = (found * io[f"{name}.grad_weight"]).sum() / found.shape[1]
    torch.testing.assert_close(loss, io[f"{name}.grad_loss"][0], atol=LOSS, rtol=1e-5)
    loss.backward()
    grads = {PREFIX + key: parameter.grad for key, parameter in tower.named_parameters()}
    expected = {key.partition(".grad.")[2]: io[key] for key in io if key.startswith(f"{name}.grad.")}
    norms = {key: norm for key, norm in case["grad_norms"].items() if key != "pos_emb"}
    assert set(norms) == set(grads)
    for key in expected:
        if key.endswith("position_embedding.weight"):
            expected[key] = onto_own_table(tower, expected[key], *case["image_hw"])
            norms[key] = float(expected[key].norm())
    for key, norm in norms.items():
        grad = grads[key]
        assert (grad is None or not grad.any()) == (norm is None), key
        if grad is not None and norm is not None:
            assert float(grad.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), key
    for key, tensor in expected.items():
        torch.testing.assert_close(grads[key], tensor, atol=1e-5, rtol=1e-3, msg=key)


def onto_own_table(tower: Any, grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The gradient of a stretched table -> that of the table of the model."""
    table = tower.embeddings.position_embedding.weight.detach().clone().requires_grad_()
    leading = len(table) - round(len(table) ** 0.5) ** 2
    patch = tower.config.patch_size
    found = torch.cat([table[:leading], naive_merging.positions(table[leading:], height // patch, width // patch)])
    return torch.autograd.grad(found, table, grad)[0]


def tables() -> list[Any]:
    return [
        pytest.param(folder, key, id=golden.name(folder, key))
        for folder in encoders()
        for key in numbers(folder)
        if key.endswith(".position_embedding_used")
    ]


@pytest.mark.parametrize(("folder", "key"), tables())
@torch.no_grad()
def test_the_position_table_that_is_used(folder: Path, key: str) -> None:
    """What the embeddings add to patches of zeros. Nothing is left behind on the model."""
    tower = tower_of(folder)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    height, width = numbers(folder)[key.replace("position_embedding_used", "pixel_values")].shape[-2:]
    given = batch(tower, torch.zeros(1, 3, height, width), 1.0)
    for parameter in (*tower.embeddings.patch_embedding.parameters(), *own(tower.embeddings, "class_embedding")):
        parameter.zero_()
    entering: list[torch.Tensor] = []
    tower.embeddings.register_forward_hook(lambda module, args, output: entering.append(output[0]))
    next(tower.states(given["pixel_values"], given[GRIDS]))
    torch.testing.assert_close(entering[0], numbers(folder)[key], atol=POSITIONS, rtol=0)
    after = tower.state_dict()
    assert set(after) == set(before)
    table = "embeddings.position_embedding.weight"
    assert torch.equal(after[table], before[table])


def own(module: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    return [parameter for key, parameter in module.named_parameters(recurse=False) if key == name]


@pytest.mark.parametrize(("folder", "name"), each_case(works=False))
@torch.no_grad()
def test_sizes_that_the_reference_cannot_take(folder: Path, name: str) -> None:
    """Verdict *mended*: its SigLIP encoder stretches positions as if there were a class token and raises; ours follows
    CLIP's rule, and gives what the same steps give written out."""
    tower, pixels = tower_of(folder), pixels_of(folder, name)
    assert tuple(pixels.shape[-2:]) != (tower.config.image_size,) * 2
    r = int(batch(tower, pixels, ratio_of(name))[GRIDS][0, 2])
    found = features(tower, pixels, ratio_of(name))
    for ours, picture in zip(found, pixels, strict=True):
        hidden, _ = naive_merging.states(tower, picture, r)[-2]
        torch.testing.assert_close(ours, hidden[1:], atol=STATES, rtol=0)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=golden.name(folder, "state")) for folder in encoders()])
@torch.no_grad()
def test_nothing_is_left_behind_and_names_are_those_of_transformers(folder: Path) -> None:
    """*Mended*: the reference's tables, extra keys and shapes after a call (`state` in the record). Every picture in
    its one call, and the plain tower afterwards."""
    plain, tower = plain_tower(folder), tower_of(folder)
    native = torch.randn(1, 3, *[plain.config.image_size] * 2, generator=torch.Generator().manual_seed(0))
    expected = plain(native, output_hidden_states=True).hidden_states
    for param in each_case(works=True):
        if param.values[0] == folder:
            features(tower, pixels_of(*param.values), ratio_of(param.values[1]))
    hand_over(tower, {})
    found = tower(native, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    state, own = plain.state_dict(), tower.state_dict()
    assert list(own) == list(state) and all(torch.equal(own[name], state[name]) for name in state)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=golden.name(folder, "mixed")) for folder in encoders()])
@torch.no_grad()
def test_all_cases_of_a_tower_in_one_call(folder: Path) -> None:
    """Pictures of all sizes and ratios, end to end, against the records of each by itself."""
    tower = tower_of(folder)
    cases = [param.values for param in each_case(works=True) if param.values[0] == folder]
    given = [batch(tower, pixels_of(*case), ratio_of(case[1])) for case in cases]
    inputs = {key: torch.cat([one[key] for one in given]) for key in given[0]}
    found = tower(**hand_over(tower, inputs), output_hidden_states=[-2]).hidden_states[-2][0, 1:]
    expected = torch.cat([numbers(folder)[f"{name}.features"].flatten(0, 1) for _, name in cases])
    torch.testing.assert_close(found, expected, atol=STATES, rtol=0)


def merges() -> list[Any]:
    path = ROOT / "tome.json"
    return [pytest.param(name, id=golden.name(path, name)) for name in (record_of(path) if path.is_file() else ())]


@pytest.mark.parametrize("name", merges())
def test_matching_and_merging(name: str) -> None:
    case, io = record_of(ROOT / "tome.json")[name], load_file(ROOT / "tome.safetensors")
    x, size, metric = (io[f"{name}.{part}"] for part in ("x", "size", "metric"))
    matching = match(metric, case["r"], protect_first=case["class_token"])
    for sizes, suffix in ((size[..., 0], ""), (torch.ones_like(size[..., 0]), "_no_size")):
        found, total = merge(x, sizes, matching)
        assert found.shape[1] == case["tokens_out"]
        torch.testing.assert_close(found, io[f"{name}.merged{suffix}"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(total[..., None], io[f"{name}.merged_size{suffix}"], atol=0, rtol=1e-6)


def count_rows() -> list[Any]:
    path = ROOT / "token_count_table.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [pytest.param(row, id=golden.name(path, str(number))) for number, row in enumerate(rows, start=2)]


@pytest.mark.parametrize("row", count_rows())
def test_token_counts(row: dict[str, str]) -> None:
    height, width, patch, layers = (int(row[key]) for key in ("image_h", "image_w", "patch", "layers"))
    patches = (height // patch) * (width // patch)
    assert patches == int(row["patches"])
    r = merged_per_layer(height, width, patch=patch, layers=layers, ratio=float(row["ratio"]))
    assert r == int(row["r"])
    assert kept_tokens(patches, r, merges=layers - 1) == int(row["tokens_kept_hidden_minus2"])
    assert kept_tokens(patches, r, merges=layers) == int(row["tokens_kept_last"])


def test_the_records_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    equal, mended = each_case(works=True), each_case(works=False)
    assert equal and graded() and tables() and merges() and count_rows()
    with capsys.disabled():
        print(
            f"\nauroracap tower: {len(equal)} equal, {len(mended)} mended (sizes that the reference's SigLIP refuses), "
            f"{len(graded())} with gradients, {len(merges())} merges, {len(count_rows())} token counts"
        )
