"""Which tensors of InternLM-XComposer2 train, against what the official script lets train in each of its modes."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
from verdicts import Rule, decide, report
from xcomposer2_models import furnish

from vlmtune.config.schema import Component, FullTuning, LoraTuning
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.tuning.adapters import prepare, target_modules
from vlmtune.tuning.components import native_name
from vlmtune.weights.names import skeleton
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

RECORD = golden.root() / "xcomposer2" / "trainable.json"
SEEDS_TARGETS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


@dataclass(frozen=True)
class Mode:
    """A combination of the official flags, and the counts (trained, all) of each group of tensors."""

    name: str
    use_lora: bool
    fix_vit: bool
    fix_sampler: bool
    groups: tuple[tuple[str, int, int], ...]

    @property
    def beside(self) -> tuple[Component, ...]:
        """What the flags ask to be trained beside the language model."""
        parts: list[Component] = [] if self.fix_vit else ["vision"]
        return (*parts, *(() if self.fix_sampler else ("projector",)))


@cache
def modes() -> list[Mode]:
    if not RECORD.is_file():
        return []
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    return [_mode(name, groups) for name, groups in found.items()]


def _mode(name: str, groups: dict[str, str]) -> Mode:
    flags = {key: value == "True" for key, value in (part.split("=") for part in name.split(","))}
    counts = []
    for group, text in groups.items():
        trained, all_of_them = re.fullmatch(r"(\d+) of (\d+) tensors trainable", text).groups()  # type: ignore[union-attr]
        counts.append((group, int(trained), int(all_of_them)))
    return Mode(name, flags["use_lora"], flags["fix_vit"], flags["fix_sampler"], tuple(counts))


RULES: list[Rule[Mode]] = [
    Rule(
        "LoRA beside trained parts",
        "mended",
        "get_peft_model freezes tower and projector whatever the flags say; `tuning.train` trains them beside it",
        lambda mode: mode.use_lora and bool(mode.beside),
    ),
    Rule(
        "trained tower",
        "mended",
        "post_layernorm is replaced by nothing and missing in the checkpoint; it stays, and stays frozen",
        lambda mode: not mode.fix_vit,
    ),
]


def group_of(name: str) -> str:
    if "plora" in name.lower():
        return "plora"
    starts = {"model.tok_embeddings.": "tok_embeddings", "vit.": "vit", "vision_proj.": "vision_proj"}
    starts |= {"output.": "output", "model.": "llm"}
    return next(group for start, group in starts.items() if name.startswith(start))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedFolder:
    """The recorded model with as many tensors as the record says; held-out records without models have ours."""
    wanted = {group: count for group, _, count in modes()[0].groups}
    known = [*golden.folders("xcomposer2"), *sorted((golden.OWN / "xcomposer2").iterdir())]
    for folder in (one for one in known if (one / "cases.json").is_file()):
        if Counter(map(group_of, Shards(folder).infos)) == wanted:
            return open_folder(furnish(folder, tmp_path_factory.mktemp("xcomposer2") / "base"))
    raise AssertionError(f"no recorded model has {wanted}")


def trained_by(opened: OpenedFolder, tuning: FullTuning | LoraTuning) -> dict[str, tuple[int, int]]:
    """(trained, all) tensors by group; an adapter's own under "lora"."""
    model = prepare(load_model(opened), opened, tuning)
    own = {native_name(n): p.requires_grad for n, p in model.named_parameters() if _is_used(n)}
    assert opened.table is not None
    found: dict[str, list[bool]] = {}
    for name in Shards(opened.folder.path).infos:
        link = opened.table.link(name)
        assert link is not None
        found.setdefault(group_of(name), []).append(own[link.parameters[0]])
    if adapter := [p.requires_grad for n, p in model.named_parameters() if ".lora_" in n]:
        found["lora"] = adapter
    return {group: (sum(flags), len(flags)) for group, flags in found.items()}


def _is_used(name: str) -> bool:
    return ".lora_" not in name and ".original_module." not in name


@pytest.mark.parametrize("mode", [pytest.param(mode, id=golden.name(RECORD, mode.name)) for mode in modes()])
def test_the_same_tensors_train(mode: Mode, opened: OpenedFolder) -> None:
    tuning: FullTuning | LoraTuning = FullTuning(train=("language", *mode.beside))
    if mode.use_lora:
        tuning = LoraTuning(rank=4, train=mode.beside)
    found = trained_by(opened, tuning)
    wanted = {group: (trained, number) for group, trained, number in mode.groups}
    rule = decide(mode, RULES)
    if rule.verdict == "mended":
        own: dict[str, Any] = {group: number for group, (_, number) in found.items()}
        if not mode.fix_vit:  # the two tensors of post_layernorm
            assert wanted["vit"][1] == own["vit"] - 2
            wanted["vit"] = (own["vit"] - 2, own["vit"])
        if not mode.fix_sampler:
            wanted["vision_proj"] = (own["vision_proj"], own["vision_proj"])
    assert found == wanted


ADAPTERS = [folder for folder in golden.folders("xcomposer2") if (folder / "expected.json").is_file()]


@pytest.mark.parametrize("folder", ADAPTERS, ids=map(golden.name, ADAPTERS))
@pytest.mark.parametrize("targets", [("language",), SEEDS_TARGETS], ids=["language", "seed"])
def test_adapters_go_where_the_official_script_puts_them(
    folder: Path, targets: tuple[str, ...], opened: OpenedFolder
) -> None:
    record = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = prepare(load_model(opened), opened, LoraTuning(rank=4, targets=targets))
    assert {name for name, one in model.named_parameters() if one.requires_grad} == set(record["trainable"])


@pytest.mark.parametrize("targets", [("language",), SEEDS_TARGETS], ids=["language", "seed"])
def test_default_targets_are_the_seeds(targets: tuple[str, ...], opened: OpenedFolder) -> None:
    """All five in each layer, and partial LoRA in none of them."""
    layers = range(opened.config.get_text_config().num_hidden_layers)
    wanted = {f"model.layers.{layer}.{name}" for layer in layers for name in SEEDS_TARGETS}
    assert set(target_modules(skeleton(opened), opened, targets)) == wanted


def test_the_verdicts() -> None:
    table = report(modes(), RULES)
    assert "mended" in table
    golden.skip_if_partial()
    assert len(modes()) == 8
