"""AuroraCap's whole model against numbers recorded from the reference: loss, logits, gradients, the projector.

Tolerances are those of the records' README: float32 on a CPU. Verdicts: *equal*; *mended* for the gradient of a
position table that the reference replaces in each forward; *refused* where placeholders and pictures do not fit, or the
projector is one that transformers' class has not. All are decided by what a record holds.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from verdicts import Rule, decide, report

from vlmtune.errors import WeightsError
from vlmtune.models.family import ModelFolder
from vlmtune.models.llava import config as configs
from vlmtune.models.llava import folders, pictures
from vlmtune.models.llava.family import LlavaFamily
from vlmtune.models.llava.weights import xtuner_table
from vlmtune.models.load import load_weights, read_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.token_merging import kept_tokens, merged_per_layer
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

IMAGE = -200
LOGITS, LOSS, PROJECTOR = 2e-4, 1e-5, 1e-4
NORM, ELEMENT = 1e-3, 1e-5
PARTS = ("llm.", "visual_encoder.", "projector.")
TABLE = "model.vision_tower.embeddings.position_embedding.weight"


def models() -> list[Path]:
    """Folders that hold a model of three parts and its cases."""
    return [place for place in golden.folders("auroracap") if (place / "visual_encoder" / "config.json").is_file()]


@functools.cache
def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "cases.safetensors")


@functools.cache
def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Case:
    folder: Path
    name: str

    def __getitem__(self, key: str) -> torch.Tensor:
        return numbers(self.folder)[f"{self.name}.{key}"]

    def get(self, key: str) -> torch.Tensor | None:
        return numbers(self.folder).get(f"{self.name}.{key}")

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = record(self.folder)["cases"][self.name]
        return found

    @property
    def slow_fast(self) -> bool:
        """The reference sets its ratio for the first frame and leaves it there."""
        return bool(self.facts["ratio_before"] != self.facts["ratio_after"])

    def copies_its_table(self, side: int) -> bool:
        """The reference trains a position table that a forward made: of another size, or of the frames after the first
        alone, since slow-fast calls its tower twice."""
        shapes = {tuple(picture.shape[1:]) for row in self.shown() for picture in row}
        return self.slow_fast or bool(shapes - {(side, side)})

    def shown(self) -> list[list[torch.Tensor]]:
        """The pictures (3, H, W) of each row; of text alone none: the reference shows a black one."""
        pixels = self.get("pixel_values")
        rows: list[list[torch.Tensor]] = [[] for _ in self["input_ids"]]
        if pixels is None:
            return rows
        pixels = pixels if pixels.dim() == 5 else pixels[:, None]
        for row, ids, given in zip(rows, self["input_ids"], pixels, strict=True):
            if (ids == IMAGE).any():
                row.extend(given)
            else:
                assert not given.any(), "what is left out is nothing but black"
        return rows


def misfits(case: Case) -> bool:
    marks = [int((ids == IMAGE).sum()) for ids in case["input_ids"]]
    return marks != [len(row) for row in case.shown()]


RULES: list[Rule[Case]] = [
    Rule(
        "as many placeholders as pictures",
        "refused",
        "the reference drops what is left over without a word; here the row is an error",
        misfits,
    )
]


def cases() -> list[Case]:
    return [Case(folder, name) for folder in models() for name in record(folder)["cases"]]


def each(verdict: str, *, graded: bool = False) -> list[Any]:
    return [
        pytest.param(case, id=golden.name(case.folder, case.name))
        for case in cases()
        if decide(case, RULES).verdict == verdict and (not graded or "grad_norms" in case.facts)
    ]


def config_of(folder: Path) -> Any:
    """As the program makes it; the folder has no tokenizer, and the next id of the vocabulary is the placeholder."""
    read = read_folder(folder)
    found = folders.parts(read)
    return configs.native_config(
        found.language,
        found.vision,
        found.projector,
        context_id=read.config["vocab_size"],
        has_head="lm_head.weight" in Shards(folder).infos,
        where=str(folder),
    )


def load(folder: Path) -> Any:
    return load_weights(read_folder(folder), LlavaFamily(), config_of(folder), xtuner_table()).eval()


def inputs(case: Case, config: Any) -> dict[str, Any]:
    """The batch as the product lays it: placeholders repeated, rows padded on the right, patches end to end."""
    tower = config.vision_config
    merges = config.vision_feature_layer % (tower.num_hidden_layers + 1)
    rows, laid = [], []
    for ids, labels, seen, shown in zip(
        case["input_ids"], case["labels"], case["attention_mask"], case.shown(), strict=True
    ):
        counts = []
        for number, picture in enumerate(shown):
            _, height, width = picture.shape
            whole = case.slow_fast and len(shown) > 1 and number == 0
            r = merged_per_layer(
                height, width, patch=tower.patch_size, layers=tower.num_hidden_layers,
                ratio=1.0 if whole else case.facts["ratio_before"],
            )  # fmt: skip
            patches = (height // tower.patch_size) * (width // tower.patch_size)
            counts.append(kept_tokens(patches, r, merges=merges))
            laid.append(pictures.as_patches(picture, tower.patch_size, r))
        rows.append(expand(ids[seen], labels[seen], counts, config.image_token_id))
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.stack([nn.functional.pad(ids, (0, longest - len(ids))) for ids, _ in rows]),
        "labels": torch.stack(
            [nn.functional.pad(labels, (0, longest - len(labels)), value=-100) for _, labels in rows]
        ),
        "attention_mask": torch.stack([torch.arange(longest) < len(ids) for ids, _ in rows]).long(),
    }
    return {**batch, **pictures.collate_pixels(laid), "use_cache": False}


def expand(ids: torch.Tensor, labels: torch.Tensor, counts: list[int], context: int) -> tuple[torch.Tensor, ...]:
    left = iter(counts)
    long_ids, long_labels = [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        count = next(left, 1) if token == IMAGE else 1
        long_ids += [context if token == IMAGE else token] * count
        long_labels += [-100 if token == IMAGE else label] * count
    return torch.tensor(long_ids), torch.tensor(long_labels)


def run(model: Any, case: Case) -> tuple[Any, dict[str, Any]]:
    batch = inputs(case, model.config)
    return model(**hand_over(model, batch)), batch


@pytest.mark.parametrize("case", each("equal"))
@torch.no_grad()
def test_rows_logits_and_loss(case: Case) -> None:
    model = load(case.folder)
    output, batch = run(model, case)
    if (labels := case.get("merged_labels")) is not None:  # a row without pictures is not expanded
        assert torch.equal(batch["labels"], labels)
        assert torch.equal(batch["attention_mask"], case["merged_attention_mask"])
    rows = case["logit_rows"]
    seen = batch["attention_mask"][:, rows].bool()
    torch.testing.assert_close(output.logits[:, rows][seen], case["logits"][seen], atol=LOGITS, rtol=0)
    assert float(output.loss) == pytest.approx(float(case["loss"]), abs=LOSS)
    assert float(output.loss) == pytest.approx(case.facts["loss"], abs=LOSS)


@pytest.mark.parametrize("case", each("equal"))
@torch.no_grad()
def test_nothing_is_left_behind_by_the_row_before(case: Case) -> None:
    """Verdict *mended*: after a slow-fast row the reference merges nothing any more."""
    model = load(case.folder)
    first, _ = run(model, case)
    for other in cases():
        if other.folder == case.folder and other.slow_fast:
            run(model, other)
    again, _ = run(model, case)
    assert torch.equal(first.logits, again.logits)


@pytest.mark.parametrize("case", each("refused"))
@torch.no_grad()
def test_pictures_that_do_not_fit_their_placeholders_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        run(load(case.folder), case)


def parameter_of(key: str) -> str | None:
    """The parameter of a name in AuroraModel's state dict; None for `pos_emb`, the position table once more."""
    name = next(key.removeprefix(part) for part in PARTS if key.startswith(part))
    link = xtuner_table().link(name)
    return None if link is None else link.parameters[0]


@pytest.mark.parametrize("case", each("equal", graded=True))
def test_gradients(case: Case) -> None:
    model = load(case.folder)
    output, _ = run(model, case)
    output.loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    copied = case.copies_its_table(model.config.vision_config.image_size)
    compared = 0
    for key, norm in case.facts["grad_norms"].items():
        name = parameter_of(key)
        if name is None:
            continue
        found = 0.0 if own[name] is None else float(own[name].norm())
        if name == TABLE and copied:
            assert found > 0, "the table itself is trained, by all pictures"
            continue
        assert found == pytest.approx(norm or 0.0, rel=NORM, abs=1e-6), key
        expected = case.get(f"grad.{key}")
        if expected is not None:
            torch.testing.assert_close(own[name], expected, atol=ELEMENT, rtol=NORM, msg=key)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("folder", [pytest.param(folder, id=golden.name(folder, "projector")) for folder in models()])
def test_projector(folder: Path) -> None:
    """Weight of the loss: its own output, as the record's gradients have it."""
    projector = load(folder).model.multi_modal_projector
    given, expected = numbers(folder)["projector.input"], numbers(folder)["projector.output"]
    output = projector(given)
    torch.testing.assert_close(output, expected, atol=PROJECTOR, rtol=0)
    grads = {key: value for key, value in numbers(folder).items() if key.startswith("projector.grad.")}
    loss = next(
        loss for loss in (output.sum(), output.pow(2).sum(), output.pow(2).mean()) if _fits(loss, projector, folder)
    )
    loss.backward(retain_graph=True)
    for key, value in grads.items():
        link = xtuner_table().link(key.removeprefix("projector.grad."))
        assert link is not None
        name = link.parameters[0].removeprefix("model.multi_modal_projector.")
        torch.testing.assert_close(dict(projector.named_parameters())[name].grad, value, atol=ELEMENT, rtol=NORM)


def _fits(loss: torch.Tensor, projector: nn.Module, folder: Path) -> bool:
    """Whether this is the loss whose gradients were recorded: the README does not name it."""
    last = list(projector.parameters())[-1]
    (grad,) = torch.autograd.grad(loss, [last], retain_graph=True)
    norms = list(record(folder)["projector"]["grad_norms"].values())
    return float(grad.norm()) == pytest.approx(norms[-1], rel=NORM)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=golden.name(folder, "depth")) for folder in models()])
def test_a_projector_of_another_depth_is_refused(folder: Path) -> None:
    depths = {int(key.split("_depth")[1].split(".")[0]) for key in numbers(folder) if "_depth" in key.split(".")[0]}
    read = ModelFolder(folder, read_folder(folder).config)
    found = folders.parts(read)
    for depth in depths - {2}:
        with pytest.raises(WeightsError, match=f"depth {depth}"):
            configs.native_config(
                found.language, found.vision, {**found.projector, "depth": depth}, context_id=1, has_head=True, where=""
            )


def test_the_records_are_there() -> None:
    assert models() and each("equal") and each("equal", graded=True) and each("refused")
    print(report(cases(), RULES))
