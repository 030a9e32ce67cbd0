"""LoRA that the official trainer and XTuner saved, against what the official code computes with it.

Every recorded case goes the way of `vlmtune export`: the checkpoint with its adapter inside
(``wrapped_model.safetensors``), the adapter folders that PEFT wrote, and XTuner's names in a pickle. Tolerances are
those of the records' README.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from furnished import add_tokenizer, furnish, recorded_batch
from safetensors.torch import load_file

from vlmtune.export.foreign import laid_out
from vlmtune.export.write import export
from vlmtune.infer.locate import locate
from vlmtune.infer.session import Session, load, load_located
from vlmtune.nn.pseudo_text import MASK, ROWS
from vlmtune.nn.side_inputs import hand_over
from vlmtune.weights.layout import Link, WeightTable
from vlmtune.weights.shards import Shards

pytestmark = pytest.mark.golden

CASES = golden.folders("internvl/lora")
EIT = golden.root() / "internvl" / "eit"
MERGED, LOGITS, LOSS = 1e-6, 2e-4, 2e-5
WRAPPED, LANGUAGE, VISION = "wrapped_model.safetensors", "peft_language_model", "peft_vision_model"


def meta(case: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((case / "meta.json").read_text(encoding="utf-8"))
    return record


def base_of(record: Mapping[str, Any]) -> Path:
    base = golden.root() / "internvl" / str(record["base"])
    if not base.is_dir():
        pytest.skip(f"these records do not hold the base of the adapter ({base})")
    return base


def forms(case: Path) -> list[str]:
    """The forms in which a case is recorded."""
    return [form for form in (WRAPPED, LANGUAGE) if (case / form).exists()]


EACH = [pytest.param(case, form, id=golden.name(case, form)) for case in CASES for form in forms(case)]


@pytest.fixture
def given(case: Path, form: str, tmp_path: Path) -> dict[str, Any]:
    """The arguments of `export` (path, base, second adapter) for a case in one of its forms."""
    base = base_of(meta(case))
    if form == LANGUAGE:
        second = case / VISION
        folder = furnish(base, tmp_path / "base")
        return {"path": case / LANGUAGE, "base": folder, "second_adapter": second if second.is_dir() else None}
    folder = tmp_path / "wrapped"
    folder.mkdir()
    shutil.copyfile(case / WRAPPED, folder / "model.safetensors")
    shutil.copyfile(case / "config.json", folder / "config.json")
    return {"path": add_tokenizer(base, folder)}


@contextmanager
def adapted(given: Mapping[str, Any], out: Path, **more: Any) -> Iterator[Session]:
    """The model under the converted adapter, as the export verifies against it."""
    located = locate(given["path"], base=given.get("base"), foreign=True)
    with laid_out(located, out, alpha=more.get("alpha"), second=given.get("second_adapter")) as laid:
        yield load_located(laid.located, device="cpu", dtype="float32")


def close(found: torch.Tensor, expected: torch.Tensor, seen: torch.Tensor) -> None:
    torch.testing.assert_close(found[seen], expected[seen], atol=LOGITS, rtol=0)


@pytest.mark.parametrize(("case", "form"), EACH)
def test_export_is_the_official_merge(case: Path, form: str, given: dict[str, Any], tmp_path: Path) -> None:
    base, io = base_of(meta(case)), load_file(case / "lora_io.safetensors")
    result = export(**given, out=tmp_path / "out", layout="official", device="cpu")
    before, after = Shards(base), Shards(tmp_path / "out")
    assert {name: (info.dtype, info.shape) for name, info in after.infos.items()} == {
        name: (info.dtype, info.shape) for name, info in before.infos.items()
    }
    merged = set(meta(case)["merged_weight_names"])
    assert result.counts["merged"] == len(merged) and result.counts["unchanged"] == len(before) - len(merged)
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.infos if name not in merged)
    saved = {name.removeprefix("expected.merged."): io[name] for name in io if name.startswith("expected.merged.")}
    assert saved and set(saved) <= merged
    for name, expected in saved.items():
        torch.testing.assert_close(after.read(name), expected, atol=MERGED, rtol=0)
    batch = recorded_batch(base, batch_of(case))
    with torch.no_grad():
        output: Any = load(tmp_path / "out", device="cpu").model(**batch)
    close(output.logits, io["expected.logits_merged"], batch["attention_mask"].bool())
    torch.testing.assert_close(output.loss, io["expected.loss_merged"], atol=LOSS, rtol=0)


def batch_of(case: Path) -> str:
    """The record says it in words: "b (inputs in …)"."""
    return str(meta(case)["batch"]).split()[0]


@pytest.mark.parametrize(("case", "form"), EACH)
def test_the_converted_adapter_computes_and_learns_as_the_official_one(
    case: Path, form: str, given: dict[str, Any], tmp_path: Path
) -> None:
    base, io, record = base_of(meta(case)), load_file(case / "lora_io.safetensors"), meta(case)
    batch = recorded_batch(base, batch_of(case))
    with adapted(given, tmp_path / "out") as session:
        for name, parameter in session.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        output: Any = session.model(**batch)
        output.loss.backward()
        table = session.opened.layouts["official"]
    close(output.logits.detach(), io["expected.logits_lora_active"], batch["attention_mask"].bool())
    torch.testing.assert_close(output.loss.detach(), io["expected.loss_lora_active"], atol=LOSS, rtol=0)
    found = official_gradients(session.model, table, record["grad_l2"])
    for name, norm in record["grad_l2"].items():
        assert float(found[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for name, grad in io.items():
        if name.startswith("expected.grad."):
            whole = found[name.removeprefix("expected.grad.")][: len(grad)]
            assert float((whole - grad).abs().max()) <= 1e-3 * float(grad.abs().max()) + 1e-7, name


def official_gradients(model: Any, table: WeightTable, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients under the official names. Where a fused layer is split here, A stands once in each part, so that its
    gradients add up; those of B are rows of the fused one."""
    parameters = dict(model.named_parameters())
    found = {}
    for name in names:
        layer, half = name.replace("base_model.model.", "", 1).removesuffix(".default.weight").rsplit(".", 1)
        link = table.link(f"{layer}.weight")
        assert isinstance(link, Link), layer
        at = [f"base_model.model.{one.removesuffix('.weight')}.{half}.default.weight" for one in link.parameters]
        grads = [
            torch.zeros_like(parameters[one]) if parameters[one].grad is None else parameters[one].grad for one in at
        ]
        found[name] = sum(grads[1:], grads[0]) if half == "lora_A" else link.op.join(tuple(grads))
    return found


XTUNER = EIT / "xtuner_lora_checkpoint.safetensors"
NEEDS_XTUNER = pytest.mark.parametrize("place", [pytest.param(EIT, id=golden.name(XTUNER))])


@pytest.fixture
def xtuner(tmp_path: Path) -> dict[str, Any]:
    """XTuner's checkpoint in the form in which mmengine saves it, and the base that it belongs to."""
    if not XTUNER.is_file():
        pytest.skip(f"these records hold no checkpoint of XTuner ({golden.name(XTUNER)})")
    record = json.loads((EIT / "forward.json").read_text(encoding="utf-8"))
    file = tmp_path / "iter_5.pth"
    torch.save({"state_dict": load_file(XTUNER), "meta": {"iter": 5}, "message_hub": {}}, file)
    return {"path": file, "base": furnish(base_of(record), tmp_path / "base")}


@NEEDS_XTUNER
def test_a_checkpoint_of_xtuner(place: Path, xtuner: dict[str, Any], tmp_path: Path) -> None:
    """LoRA on every linear layer and the head, and the projector, on a batch with given embeddings."""
    record, io = (
        json.loads((place / "forward.json").read_text(encoding="utf-8")),
        load_file(place / "forward.safetensors"),
    )
    facts = record["lora"]
    alpha = float(facts["lora_alpha"])
    with adapted(xtuner, tmp_path / "out", alpha=alpha) as session:
        for name, parameter in session.model.named_parameters():
            parameter.requires_grad_(".lora_" in name or "multi_modal_projector" in name)
        output, seen = with_embeddings(session, record, io)
        output.loss.backward()
        table = session.opened.layouts["official"]
    close(output.logits.detach(), io["lora.expected.logits"], seen)
    torch.testing.assert_close(output.loss.detach(), io["lora.expected.loss"], atol=LOSS, rtol=0)
    found = official_gradients(session.model, table, [name for name in facts["grad_l2"] if ".lora_" in name])
    found |= {name: gradient(session.model, table, name) for name in facts["grad_l2"] if ".lora_" not in name}
    for name, norm in facts["grad_l2"].items():
        assert float(found[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    export(**xtuner, out=tmp_path / "out", layout="official", lora_alpha=alpha, device="cpu")
    exported = load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        output, seen = with_embeddings(exported, record, io)
    close(output.logits, io["lora.expected.merged_logits"], seen)
    after = Shards(tmp_path / "out")
    for name, norm in facts["merged_l2"].items():
        assert float(after.read(f"language_model.{name}").norm()) == pytest.approx(norm, rel=1e-6)
    trained = load_file(XTUNER)
    for name in trained:
        if "mlp1" in name:
            assert torch.equal(after.read(name.removeprefix("model.")), trained[name])


def with_embeddings(session: Session, record: Mapping[str, Any], io: Mapping[str, torch.Tensor]) -> Any:
    """The model's output for batch e1, in which the given rows stand, in order, where the ids say."""
    ids, mask = io["e1.input.input_ids"], io["e1.input.attention_mask"]
    inputs = {
        "input_ids": ids,
        "pixel_values": io["e1.input.pixel_values_flat"],
        "attention_mask": mask.long(),
        "labels": io["e1.input.labels"],
        "use_cache": False,
        ROWS: io["e1.input.embedding_flat"],
        MASK: ids == record["embeds_token_id"],
    }
    model: Any = session.model
    return model(**hand_over(model, inputs)), mask.bool()


def gradient(model: Any, table: WeightTable, name: str) -> torch.Tensor:
    """Of a layer that is trained whole, by its official name; PEFT keeps it beside the old one."""
    link = table.link(name)
    assert isinstance(link, Link), name
    (one,) = link.parameters
    grads = {key.replace(".modules_to_save.default.", "."): value.grad for key, value in model.named_parameters()
             if value.grad is not None}  # fmt: skip
    found = [grad for key, grad in grads.items() if key.endswith(f".{one}")]
    assert len(found) == 1, name
    return found[0]


@NEEDS_XTUNER
def test_without_alpha_xtuners_checkpoint_is_refused(place: Path, xtuner: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"alpha .* is not in this checkpoint.*--lora-alpha N"):
        export(**xtuner, out=tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "iter_5.pth"]


def test_something_ran() -> None:
    """Folders that hold no such records would make this file pass empty."""
    print(f"{len(EACH)} checkpoints of {len(CASES)} LoRA cases, {int(XTUNER.is_file())} of XTuner")
    assert not CASES or EACH
