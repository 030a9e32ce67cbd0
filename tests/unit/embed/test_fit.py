"""Fitting: labels as tokens, what is held out, the loss, what is measured, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import golden
import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from xcomposer2_models import furnish

from vlmtune.config.schema import MediaOptions
from vlmtune.embed import seen as seen_module
from vlmtune.embed.codebook import Codebook
from vlmtune.embed.encoder import RegionEncoder
from vlmtune.embed.fit import FitSettings, chance, fit, unseen
from vlmtune.embed.labels import (
    Target,
    choose_padding,
    hold_out,
    refuse_bad_labels,
    refuse_tokens_without_direction,
    targets_of,
)
from vlmtune.embed.parts import Parts, open_parts
from vlmtune.embed.regions import Page, Region
from vlmtune.embed.resampler import PerceiverResampler, ResamplerShape
from vlmtune.embed.save import refuse_taken, save_fitted
from vlmtune.embed.seen import Seen
from vlmtune.errors import DataError, TrainingError, UsageError
from vlmtune.models.load import open_folder
from vlmtune.models.text import TextEncoder

SHAPE = ResamplerShape(dim=16, depth=1, heads=2, dim_head=8, num_learns=2, ff_mult=2)
LABELS = ("0", "1", "42")


def page_of(name: str, *labels: str) -> Page:
    """A page that is not on the disk."""
    regions = tuple(Region(label, (10 * i, 0, 10 * i + 8, 8)) for i, label in enumerate(labels))
    files = {"picture": Path(f"{name}.png"), "json": Path(f"{name}.json")}
    return Page(**files, media=MediaOptions(), regions=regions, bad=(), cut=0)


def words(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words, and writes <unk> for all others."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", *tokens])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def some_targets(pages: int = 12, each: int = 5) -> list[Target]:
    """Two tokens at most; token 0 is the padding."""
    found = []
    for number in range(pages):
        page = page_of(f"p{number}", *(LABELS[(number + i) % 3] for i in range(each)))
        found += [Target(page, region, tuple(int(digit) + 1 for digit in region.label)) for region in page.regions]
    return found


def separable(targets: Sequence[Target]) -> Callable[[Sequence[int]], torch.Tensor]:
    """Visual tokens that say the label, and noise."""
    draw = torch.Generator().manual_seed(3)
    means = {ids: torch.randn(4, 16, generator=draw) for ids in sorted({target.ids for target in targets})}
    tokens = torch.stack([means[target.ids] + 0.1 * torch.randn(4, 16, generator=draw) for target in targets])
    return lambda numbers: tokens[list(numbers)]


def codebook() -> Codebook:
    return Codebook.of_embedding(torch.randn(8, 16, generator=torch.Generator().manual_seed(4)))


def resampler(shape: ResamplerShape = SHAPE) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(shape)


def silent(line: str) -> None:
    del line


def test_a_separable_problem_is_learned_and_measured_on_other_pages() -> None:
    targets = some_targets()
    held = hold_out(targets, 0.2, by="page", seed=0)
    lines: list[str] = []
    settings = FitSettings(epochs=40, batch_size=16, learning_rate=3e-3)
    found = fit(resampler(), separable(targets), codebook(), targets, held, settings, padding_id=0, say=lines.append)
    losses = [line["loss"] for line in found.history]
    assert len(losses) == 40 and losses[-1] < 0.1 * losses[0]
    assert found.held_out is not None and found.held_out.label_accuracy == 1 and found.held_out.token_accuracy == 1
    assert {id(reading.target) for reading in found.held_out.readings} == {
        id(target) for target, out in zip(targets, held, strict=True) if out
    }
    assert len(found.learned.readings) + len(found.held_out.readings) == len(targets)
    assert len(lines) == 10 and lines[-1].startswith("epoch 40/40") and "100.0% of the labels" in lines[-1]
    rates = [line["learning_rate"] for line in found.history]
    assert max(rates) <= 3e-3 and rates[-1] < 1e-4 < rates[10]


def test_the_loss_is_the_mean_squared_difference_from_the_normalised_embeddings_padding_included() -> None:
    targets = some_targets(pages=2)
    book, see = codebook(), separable(targets)
    settings = FitSettings(epochs=1, batch_size=100, held_out=0, warmup=0.9)  # the first step has the rate 0
    found = fit(resampler(), see, book, targets, [False] * 10, settings, padding_id=0, say=silent)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4)).double().numpy()
    normed = (weight - weight.mean(1, keepdims=True)) / weight.std(1, keepdims=True)
    goals = np.array([[*target.ids, 0][:2] for target in targets])
    with torch.no_grad():
        rows = resampler().double()(see(range(10)).double()).numpy()
    expected = ((rows - normed[goals]) ** 2).mean()
    assert found.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.held_out is None
    near = rows @ normed.T / np.linalg.norm(normed, axis=1) / np.linalg.norm(rows, axis=2, keepdims=True)
    ids = near.argmax(2)
    assert found.learned.tokens == (goals != 0).sum()
    assert found.learned.tokens_right == ((ids == goals) & (goals != 0)).sum()
    readings = [tuple(row[row != 0]) for row in ids]
    assert [reading.ids for reading in found.learned.readings] == readings


def test_the_same_seed_gives_the_same_weights_and_a_loss_that_is_no_number_stops() -> None:
    targets = some_targets(pages=4)
    held = hold_out(targets, 0.25, by="region", seed=1)
    settings = FitSettings(epochs=2, batch_size=4)
    one, two = (
        fit(resampler(), separable(targets), codebook(), targets, held, settings, padding_id=0, say=silent)
        for _ in range(2)
    )
    state = two.resampler.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.resampler.state_dict().items())
    with pytest.raises(TrainingError, match=r"epoch 1 is nan.*--learning-rate"):
        broken = lambda numbers: torch.full((len(numbers), 4, 16), torch.nan)  # noqa: E731
        fit(resampler(), broken, codebook(), targets, held, settings, padding_id=0, say=silent)


def test_what_is_held_out_is_whole_pages_and_depends_on_the_seed_alone() -> None:
    targets = some_targets(pages=10, each=4)
    held = hold_out(targets, 0.25, by="page", seed=0)
    pages = {
        out: {target.page.json for target, o in zip(targets, held, strict=True) if o is out} for out in (True, False)
    }
    assert not pages[True] & pages[False] and sum(held) == 12  # three pages are the first that are 10 regions
    assert hold_out(targets, 0.25, by="page", seed=0) == held != hold_out(targets, 0.25, by="page", seed=1)
    single = hold_out(targets, 0.25, by="region", seed=0)
    assert sum(single) == 10 and len({t.page.json for t, out in zip(targets, single, strict=True) if out}) > 3
    assert hold_out(targets, 0, by="page", seed=0) == [False] * 40
    with pytest.raises(UsageError, match=r"all 4 regions would be held out: they are on 1 page.*--held-out-by region"):
        hold_out(targets[:4], 0.1, by="page", seed=0)
    with pytest.raises(UsageError, match="all 1 regions"):
        hold_out(targets[:1], 0.1, by="region", seed=0)


def test_chance_and_tokens_that_were_never_learned() -> None:
    page = page_of("p", *"0011", "2")
    targets = [Target(page, region, (int(region.label),)) for region in page.regions]
    assert chance(targets, [False, False, True, False, True]) == 0
    assert chance(targets, [False, False, False, True, False]) == 0
    assert chance(targets, [True, False, False, True, True]) == pytest.approx(1 / 3)
    assert unseen(targets, [False, True, True, False, True]) == 1


def test_labels_that_cannot_be_learned_are_listed_with_their_places() -> None:
    tokenizer = words(["a", "b"])
    targets, bad = targets_of(
        [page_of("x", "a", "", " ", "c"), page_of("y", "b", "a" * 60)], TextEncoder(tokenizer), tokenizer, queries=3
    )
    assert [(target.page.json.name, target.ids) for target in targets] == [("x.json", (2,)), ("y.json", (3,))]
    with pytest.raises(DataError) as caught:
        refuse_bad_labels(bad, queries=3)
    text = str(caught.value)
    for line in (
        "4 labels cannot be learned",
        "x.json: the region (10, 0, 18, 8) has no label",
        "x.json: the region (20, 0, 28, 8) has no label",
        "x.json: the region (30, 0, 38, 8) has the label 'c', which the tokenizer cannot write (it gives <unk>)",
        "--queries",
        "--skip-bad-regions",
    ):
        assert line in text, line
    refuse_bad_labels([], queries=3)


def test_long_labels_and_what_looks_like_a_special_token(tiny_folder: Callable[[str], Path]) -> None:
    opened = open_folder(tiny_folder("internvl"))
    pages = [page_of("x", "12", "1234", "<|im_end|>")]
    targets, bad = targets_of(pages, opened.text, opened.tokenizer, queries=3)
    plain = opened.tokenizer("12", add_special_tokens=False).input_ids
    assert [target.ids for target in targets] == [tuple(plain)]
    assert "'1234' of 4 tokens, and there are 3 queries" in bad[0] and "'<|im_end|>' of" in bad[1]
    longer, bad = targets_of(pages, opened.text, opened.tokenizer, queries=20)
    assert not bad and opened.tokenizer.eos_token_id not in longer[2].ids
    assert opened.tokenizer.decode(list(longer[2].ids)) == "<|im_end|>"


def test_padding_is_id_0_unless_it_cannot_be_told_or_is_a_label() -> None:
    tokenizer = words(["a"])  # 0 <unk>, 1 <s>, 2 a
    ones, no_zero = torch.ones(3), torch.tensor([0.0, 1, 1])
    some = page_of("x", "a")
    assert choose_padding(ones, tokenizer, [Target(some, some.regions[0], (2,))]) == 0
    assert choose_padding(no_zero, tokenizer, [Target(some, some.regions[0], (2,))]) == 1
    assert choose_padding(ones, tokenizer, [Target(some, some.regions[0], (0, 2))]) == 1
    with pytest.raises(UsageError, match="--padding-id"):
        choose_padding(no_zero, tokenizer, [Target(some, some.regions[0], (1,))])


def test_a_token_that_no_vector_can_be_nearest_to_is_refused() -> None:
    page = page_of("x", "a", "b", "c")
    targets = [Target(page, region, (number,)) for number, region in enumerate(page.regions, 1)]
    refuse_tokens_without_direction(torch.ones(4), targets)
    with pytest.raises(DataError, match=r"x.json: the label 'b' has the token 2, .*so have 1 other labels"):
        refuse_tokens_without_direction(torch.tensor([1.0, 1, 0]), targets)


@pytest.fixture
def drawn(tmp_path: Path) -> list[Page]:
    """Six pages of four regions: bars lying or standing, on a grey that varies, with the labels 1 and 22."""
    noise, pages = np.random.default_rng(0), []
    for number in range(6):
        paper = noise.normal(220, 6, (32, 128, 3))
        regions = []
        for place in range(4):
            lying = (place + number) % 2 == 0
            rows, columns = (slice(12, 20), slice(4, 28)) if lying else (slice(4, 28), slice(12, 20))
            paper[rows, 32 * place + columns.start : 32 * place + columns.stop] = noise.uniform(0, 60)
            regions.append(Region("1" if lying else "22", (32 * place, 0, 32 * place + 32, 32)))
        picture = tmp_path / f"{number}.png"
        PIL.Image.fromarray(paper.clip(0, 255).astype(np.uint8)).save(picture)
        media = MediaOptions(exif="ignore")
        files = {"picture": picture, "json": picture.with_suffix(".json")}
        pages.append(Page(**files, media=media, regions=tuple(regions), bad=(), cut=0))
    return pages


def parts_of(folder: Path, pages: list[Page], padding_id: int | None = None) -> tuple[list[Target], Parts]:
    opened = open_folder(folder)
    targets, bad = targets_of(pages, opened.text, opened.tokenizer, queries=2)
    assert not bad
    return targets, open_parts(opened, targets, padding_id=padding_id, device=torch.device("cpu"), dtype=None)


@pytest.mark.parametrize("kind", ["internvl", "llava", "official-internlm2", "qwen2_5_vl", "xcomposer2"])
def test_any_familys_tower_and_words(
    kind: str, drawn: list[Page], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """From the tower to a folder that reads new regions as it was measured; the model itself is not trained."""
    if kind == "xcomposer2":
        model = furnish(golden.OWN / "xcomposer2" / "vl", tmp_path / "vl")
    else:
        model = tiny_folder(kind)
    opened = open_folder(model)
    targets, parts = parts_of(model, drawn)
    before = parts.features.embedding.clone()
    assert not any(parameter.requires_grad for parameter in parts.features.model.parameters())
    held = hold_out(targets, 0.3, by="page", seed=0)
    shape = ResamplerShape(dim=parts.codebook.dim, depth=1, heads=2, dim_head=16, num_learns=2, ff_mult=2)
    settings = FitSettings(epochs=30, batch_size=8, learning_rate=3e-3)
    seen = Seen(parts.features, targets, batch_size=5)
    found = fit(
        parts.new_resampler(shape, 0), seen, parts.codebook, targets, held, settings,
        padding_id=parts.padding_id, say=silent,
    )  # fmt: skip
    assert torch.equal(parts.features.embedding, before)
    assert found.held_out is not None
    if kind != "xcomposer2":  # whose random tower hardly tells two pictures apart
        assert found.held_out.label_accuracy == found.learned.label_accuracy == 1
    out = tmp_path / "encoders" / "bars"
    save_fitted(out, found, parts, settings, targets, held, opened, given=str(model))
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "encoder.safetensors", "held_out.jsonl", "metrics.jsonl",
    ]  # fmt: skip
    encoder = RegionEncoder.open(out)
    assert encoder.padding_id == parts.padding_id and encoder.features.rule == parts.features.rule
    measured = {id(r.target.region): r.ids for part in (found.learned, found.held_out) for r in part.readings}
    for page in drawn:
        rows = encoder.encode_crops([page.open().crop(region.box) for region in page.regions]).nearest.ids.tolist()
        read = [tuple(number for number in row if number != encoder.padding_id) for row in rows]
        assert read == [measured[id(region)] for region in page.regions]
    about = json.loads((out / "config.json").read_text())["fit"]
    assert about["held_out"]["label_accuracy"] == found.held_out.label_accuracy
    assert about["settings"]["epochs"] == 30
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 30
    first = json.loads((out / "held_out.jsonl").read_text().splitlines()[0])
    assert first["right"] == (first["read"].strip() == first["label"])


def test_regions_that_do_not_fit_into_memory_go_through_the_tower_again(
    drawn: list[Page], tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, parts = parts_of(tiny_folder("internvl"), drawn)
    features = parts.features
    kept = Seen(features, targets, batch_size=5)
    monkeypatch.setattr(seen_module, "free_memory", lambda: 1000)
    again = Seen(features, targets, batch_size=5)
    assert kept.kept and not again.kept and kept.nbytes == again.nbytes == 24 * 16 * 48 * 4
    torch.testing.assert_close(kept([3, 20, 4]), again([3, 20, 4]), atol=1e-5, rtol=1e-4)


def test_a_folder_is_whole_or_not_there(
    drawn: list[Page], tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder("internvl")
    targets, parts = parts_of(model, drawn)
    held = [False] * len(targets)
    shape = ResamplerShape(dim=48, depth=1, heads=2, dim_head=8, num_learns=2, ff_mult=1)
    settings = FitSettings(epochs=1, held_out=0)
    seen = Seen(parts.features, targets, batch_size=8)
    found = fit(
        parts.new_resampler(shape, 0), seen, parts.codebook, targets, held, settings,
        padding_id=parts.padding_id, say=silent,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    out = Path("new/encoder")

    def save() -> None:
        save_fitted(out, found, parts, settings, targets, held, open_folder(model), given="model")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vlmtune.embed.save.write_atomic", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        save()
    assert not out.exists() and not list(Path("new").iterdir())
    save()
    first = (out / "encoder.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["model"] == "../../model"
    assert RegionEncoder.open(out).padding_id == parts.padding_id
    save()
    assert (out / "encoder.safetensors").read_bytes() == first and [p.name for p in Path("new").iterdir()] == [
        "encoder"
    ]
    with pytest.raises(UsageError, match=r"an encoder already.*--overwrite"):
        refuse_taken(out, overwrite=False)
    with pytest.raises(UsageError, match="no region encoder"):
        refuse_taken(model, overwrite=True)
    with pytest.raises(UsageError, match="a token of labels"):
        parts_of(model, drawn, padding_id=targets[0].ids[0])
    with pytest.raises(UsageError, match="no token -1"):
        parts_of(model, drawn, padding_id=-1)
