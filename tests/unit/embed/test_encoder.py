"""Region encoders: what is in a folder of one, and every family's tower; a codebook of any embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from llava_models import xtuner_folder
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from xcomposer2_models import furnish

from vlmtune.embed.codebook import Codebook, statistics
from vlmtune.embed.encoder import CropFeatures, RegionEncoder
from vlmtune.embed.folder import EncoderConfig, read_encoder, write_encoder
from vlmtune.embed.regions import Region, SquareRule
from vlmtune.embed.resampler import PerceiverResampler, ResamplerShape, load_resampler
from vlmtune.errors import DataError, UsageError, WeightsError
from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.fingerprint import fingerprint

SHAPE = ResamplerShape(dim=48, depth=1, heads=4, dim_head=8, num_learns=3, ff_mult=2)


def crops(count: int) -> list[PIL.Image.Image]:
    noise = np.random.default_rng(0)
    return [PIL.Image.fromarray(noise.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]


def encoder_of(model: Path, folder: Path, **more: object) -> Path:
    """A random encoder for a model, as a fitting would write it."""
    torch.manual_seed(0)
    weight = load_model(open_folder(model)).get_input_embeddings().weight
    shape = replace(SHAPE, dim=weight.shape[1])
    config = EncoderConfig(model=str(model), model_sha256=fingerprint(model), heads=4, **more)  # type: ignore[arg-type]
    write_encoder(folder, config, PerceiverResampler(shape), torch.stack(statistics(weight), 1))
    return folder


RECORDED = Path(__file__).parents[2] / "golden" / "xcomposer2"
KINDS = (
    "internvl",
    "llava",
    "llava-merged",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "official-internlm2",
    "official-phi3",
)


@pytest.fixture(params=[*KINDS, "xtuner", "xcomposer2-vl", "xcomposer2-hd4k"])
def model(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model of each family and layout; XTuner's merges visual tokens, hd4k puts separators between them."""
    if request.param == "xtuner":
        xtuner_folder(tmp_path / "model", merging=True)
        return tmp_path / "model"
    if request.param.startswith("xcomposer2"):
        return furnish(RECORDED / request.param.partition("-")[2], tmp_path / "model")
    return tiny_folder(request.param)


def test_every_family_sees_regions(model: Path, tmp_path: Path) -> None:
    """One by one and together the same, as many vectors as the model is wide, differentiable up to the projector."""
    encoder = RegionEncoder.open(encoder_of(model, tmp_path / "encoder"))
    width = encoder.resampler.shape.dim
    some = crops(5)
    together = encoder.encode_crops(some)
    assert together.nearest.ids.shape == (5, 3) and together.rows.shape == (sum(together.counts), width)
    alone = torch.cat([encoder.encode_crops([crop]).rows for crop in some])
    torch.testing.assert_close(together.rows, alone, atol=1e-5, rtol=1e-4)
    small = replace(encoder, batch_size=2).encode_crops(some)
    torch.testing.assert_close(small.rows, together.rows, atol=1e-5, rtol=1e-4)
    features = encoder.features([encoder.features.pixels(crop) for crop in some])
    assert len(features) == 5 and features.shape[2] == width and features.requires_grad
    assert not torch.allclose(features[0], features[1])


def test_a_tower_of_fixed_size_sees_its_own_square(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    edges = {}
    for kind in ("internvl", "llava", "qwen2_5_vl"):
        encoder = RegionEncoder.open(encoder_of(tiny_folder(kind), tmp_path / kind))
        edges[kind] = encoder.features.rule.square
    assert edges == {"internvl": 32, "llava": 32, "qwen2_5_vl": 112}  # the last may see no larger one
    own = encoder_of(tiny_folder("internvl"), tmp_path / "own", regions=SquareRule(square=64, least=20, most=40))
    assert RegionEncoder.open(own).features.rule == SquareRule(square=64, least=20, most=40)


def test_rows_are_the_resamplers_brought_to_the_scale_of_their_nearest_token(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against a plain computation in float64 with another model object."""
    folder = encoder_of(tiny_folder("internvl"), tmp_path / "encoder")
    encoder = RegionEncoder.open(folder)
    picture = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    regions = [Region("a", (0, 0, 30, 20)), Region("b", (10, 10, 70, 50))]
    found = encoder.encode_page(picture, regions)
    weight = load_model(open_folder(tiny_folder("internvl"))).get_input_embeddings().weight.detach().double()
    mu, sigma = weight.mean(1), weight.var(1, correction=0).sqrt()
    inverse = torch.where(sigma == 0, 0, 1 / sigma)
    normed = (weight - mu[:, None]) * inverse[:, None]
    with torch.no_grad():
        cut = [encoder.features.pixels(picture.crop(region.box)) for region in regions]
        raw = encoder.resampler(encoder.features(cut)).double().flatten(0, 1)
    similar = torch.nn.functional.normalize(raw, dim=1) @ torch.nn.functional.normalize(normed, dim=1).T
    ids = similar.argmax(1)
    expected = (raw * sigma[ids][:, None] + mu[ids][:, None])[ids != 0]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    kept = replace(encoder, padding_id=int(ids[0])).encode_page(picture, regions)
    assert len(kept) == int((ids != ids[0]).sum())
    words = replace(encoder, padding_id=None, hard_below=1.1).encode_page(picture, regions)
    torch.testing.assert_close(words.double(), weight[ids], atol=1e-6, rtol=0)  # nothing is nearer than 1.1


def test_an_encoder_is_read_as_it_was_written(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_folder("internvl")
    folder = encoder_of(model, tmp_path / "encoder", regions=SquareRule.of_edge(64), fit={"accuracy": 0.5})
    stored = read_encoder(folder)
    assert stored.config == EncoderConfig(
        model=str(model),
        model_sha256=fingerprint(model),
        heads=4,
        regions=SquareRule.of_edge(64),
        fit={"accuracy": 0.5},
    )
    torch.manual_seed(0)
    again = PerceiverResampler(SHAPE).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.resampler.state_dict().items())
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "padding_id": 3}))
    assert read_encoder(folder).sha256 != stored.sha256
    with pytest.raises(WeightsError, match="fitted for another model"):
        RegionEncoder.open(folder, tiny_folder("llava"))
    (tmp_path / "moved").symlink_to(model)
    for named, found in (("../moved", folder / "../moved"), ("Org/Model-2B", "Org/Model-2B"), (str(model), model)):
        (folder / "config.json").write_text(json.dumps({**record, "model": named}))
        assert read_encoder(folder).model_path() == found
    (folder / "config.json").write_text(json.dumps({**record, "model": "/gone/model"}))
    with pytest.raises(WeightsError, match="is not at /gone/model"):
        RegionEncoder.open(folder)
    assert read_encoder(folder).model_path("x") == "x"


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_the_files_that_callireader_publishes(suffix: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Pickled state dicts, from DDP and in a checkpoint; the number of heads by the published width, or stated."""
    model, ours = tiny_folder("internvl"), tmp_path / "ours"
    shape = replace(SHAPE, heads=1, dim_head=64)
    resampler = PerceiverResampler(shape)
    weight = load_model(open_folder(model)).get_input_embeddings().weight.detach()
    mu_sigma = torch.stack(statistics(weight), 1)
    write_encoder(ours, EncoderConfig(model=str(model), heads=1), resampler, mu_sigma)
    params = tmp_path / "params"
    params.mkdir()
    state = {f"module.{name}": tensor for name, tensor in resampler.state_dict().items()}
    normed = Codebook.of_embedding(weight).normed
    files = {"gauss_norm": {"weight": normed}, "gauss_norm_mu_sigma": {"weight": mu_sigma}}
    if suffix == "safetensors":
        for name, tensors in {"callialign": state, **files}.items():
            save_file(tensors, params / f"{name}.safetensors")
    else:
        torch.save({"model_state_dict": state, "step": 3}, params / f"callialign.{suffix}")
        for name, tensors in files.items():
            torch.save(tensors, params / f"{name}.{suffix}")
    with pytest.raises(UsageError, match="does not say which model"):
        RegionEncoder.open(params)
    found = RegionEncoder.open(params, model)
    assert found.resampler.shape == shape
    expected = RegionEncoder.open(ours).encode_crops(crops(2))
    torch.testing.assert_close(found.encode_crops(crops(2)).rows, expected.rows, atol=1e-6, rtol=0)
    (params / "config.json").write_text('{"resampler": {"heads": 4}}')
    assert RegionEncoder.open(params, model).resampler.shape == replace(shape, heads=4, dim_head=16)


def test_rows_are_what_a_scaling_embedding_gives() -> None:
    """Gemma's multiplies by the square root of its width; pseudo-text stands behind that."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14})
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    nothing: Any = None
    codebook = Codebook.of_embedding(CropFeatures(model, nothing, nothing, SquareRule()).embedding)
    ids = torch.arange(1, 50)
    torch.testing.assert_close(codebook.restored(codebook.normed[ids], ids), model.get_input_embeddings()(ids).detach())


def test_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        read_encoder(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"neither encoder.safetensors nor callialign.pth"):
        read_encoder(tmp_path)
    state = PerceiverResampler(replace(SHAPE, heads=1, dim_head=64)).state_dict()
    for held, words in (
        ({"learns": torch.ones(3)}, "not the weights of a resampler"),
        ({**state, "norm.bias": torch.full((48,), torch.nan)}, "norm.bias holds NaN"),
        (
            {name: tensor for name, tensor in state.items() if name != "norm.bias"},
            "1 missing from the files.*norm.bias",
        ),
        ({**state, "norm.bias": torch.ones(3)}, "of another shape: norm.bias"),
        ({**state, "more": torch.ones(3)}, "not in the model: more"),
        ({**state, "layers.1000000000.0.to_q.weight": torch.ones(3)}, "not in the model: layers.1000000000"),
    ):
        torch.save(held, tmp_path / "callialign.pth")
        with pytest.raises(WeightsError, match=words):
            read_encoder(tmp_path)
    torch.save(state, tmp_path / "callialign.pth")
    for config, words in (
        ("[]", "cannot be read"),
        ('{"resampler": {"heads": 7}}', "not a whole number of 7 heads"),
        ('{"resampler": {"heads": "7"}}', "'7' is no int"),
        ('{"resampler": {"depth": 2}}', "resampler.depth is 2, and the weights have 1"),
        ('{"regions": {"square": 100}}', "1 ≤ least ≤ most ≤ square"),
        ('{"regions": {"square": 1000000000}}', "most ≤ square ≤ 8192"),
        ('{"regions": {"edge": 100}}', "cannot be read"),
        ('{"regions": {"square": Infinity}}', "cannot be read"),
        ('{"padding_id": Infinity}', "cannot be read"),
        ('{"model_type": "llava"}', "this is a model"),
        ('{"kind": "region_encoder", "version": 2}', "version 2"),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(WeightsError, match=words):
            read_encoder(tmp_path)


def test_a_pickle_that_is_more_than_tensors_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"learns": Bomb()}, tmp_path / "callialign.pth")
    with pytest.raises(WeightsError, match="the pickle asks for"):
        read_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"model_state_dict": [1, 2]}, tmp_path / "callialign.pth")
    with pytest.raises(WeightsError, match="something else than weights"):
        read_encoder(tmp_path)


def test_heads_that_the_shapes_do_not_tell_must_be_stated() -> None:
    state = PerceiverResampler(SHAPE).state_dict()  # 32 wide: no whole number of heads of 64
    with pytest.raises(WeightsError, match="State the number of heads"):
        load_resampler(state, heads=None, where="x")
    assert load_resampler(state, heads=4, where="x").shape == SHAPE


def test_parts_of_another_width_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    resampler = PerceiverResampler(replace(SHAPE, dim=32))
    write_encoder(tmp_path / "e", EncoderConfig(heads=4), resampler, torch.ones(5, 2))
    with pytest.raises(WeightsError, match="the resampler is 32, the codebook 48, the language model 48 wide"):
        RegionEncoder.open(tmp_path / "e", tiny_folder("internvl"))
    write_encoder(tmp_path / "e", EncoderConfig(heads=4), PerceiverResampler(SHAPE), torch.ones(5000, 2))
    with pytest.raises(WeightsError, match="means of 5000 tokens"):
        RegionEncoder.open(tmp_path / "e", tiny_folder("internvl"))


def test_vectors_that_are_not_finite_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = RegionEncoder.open(encoder_of(tiny_folder("internvl"), tmp_path / "encoder"))
    encoder.resampler.norm.weight.data[0] = torch.inf
    with pytest.raises(DataError, match="region 1 hold NaN or infinity"):
        encoder.encode_crops(crops(1))
    with pytest.raises(DataError, match="no region"):
        encoder.encode_crops([])


def test_a_codebook_of_any_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.embed.codebook._CHUNK", 7)  # so that several chunks meet
    torch.manual_seed(0)
    weight = torch.randn(40, 16) * torch.rand(40, 1) + torch.randn(40, 1)
    weight[5] = 3.0  # no deviation at all
    codebook = Codebook.of_embedding(weight)
    assert codebook.normed[5].eq(0).all() and codebook.normed.isfinite().all()
    others = torch.arange(40) != 5
    torch.testing.assert_close(codebook.normed[others].norm(dim=1), torch.full((39,), 4.0))
    found = codebook.nearest(codebook.normed + 0.01 * torch.randn(40, 16))
    assert found.ids[others].equal(torch.arange(40)[others]) and (found.cosines[others] > 0.99).all()
    torch.testing.assert_close(codebook.restored(codebook.normed, torch.arange(40)), weight, atol=1e-5, rtol=0)
    equal = Codebook(torch.ones(20, 3), torch.zeros(20), torch.ones(20))
    assert equal.nearest(torch.ones(1, 3)).ids.tolist() == [0]  # the first of equal ones
    for broken in (weight[:, 0], weight.long(), weight[:39], torch.full_like(weight, torch.nan)):
        with pytest.raises(WeightsError):
            Codebook(broken, torch.zeros(40), torch.ones(40))
