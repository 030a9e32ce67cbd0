"""The model card: README.md of an exported folder, from facts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "qlora": "QLoRA"}


@dataclass(frozen=True, slots=True)
class Part:
    """A model that an export comes from.

    role: what it is to the export. name: hub id, or name of its folder. licence: None where its folder states none.
    """

    role: str
    name: str
    licence: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known about an export; empty fields are left out of the card.

    made: what was done to the parts, the end of a sentence. parts: the pretrained model, or several.
    layout: how the weights are named: ``native``, or the publisher's. config: the run's configuration as plain values.
    """

    name: str
    made: str
    parts: Sequence[Part]
    architecture: str
    layout: str
    dtype: str
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    comparisons: Sequence[Mapping[str, Any]] = ()


_NATIVE = (
    "```python",
    "from transformers import AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor",
    "",
    'model = AutoModelForImageTextToText.from_pretrained("PATH", dtype="auto")',
    'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    'image_processor = AutoImageProcessor.from_pretrained("PATH", backend="pil")',
    "```",
    "",
    "`AutoProcessor.from_pretrained` gives tokenizer and image processor in one; for some architectures it needs",
    "torchvision. `vlmtune chat PATH --image FILE` asks it in a terminal.",
)
_OFFICIAL = (
    "The folder has the publisher's layout: whatever loads the base model (LMDeploy, vLLM, the publisher's own code",
    "and evaluation kits) loads this one in its place. `vlmtune chat PATH --image FILE` asks it in a terminal, without",
    "running the Python files beside the weights.",
)


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's README names in its front matter; None if it names none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        front = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None


def public_name(base: str) -> str:
    """A hub id as it is; of a folder its name alone, since the rest of the path may be private."""
    return Path(base).name if Path(base).is_absolute() else base


def write_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML front matter that the hub understands."""
    names = [part.name for part in facts.parts]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": names[0] if len(names) == 1 else names,
        "tags": ["vlmtune"],
    }
    licences = {part.licence for part in facts.parts}
    if len(licences) == 1 and None not in licences:
        front["license"] = facts.parts[0].licence
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {facts.name}",
        "",
        f"`{facts.architecture}` in {facts.dtype}, {facts.made}.",
        "",
        *(line for part in facts.parts for line in _about(part)),
        *_training(facts.config),
        "",
        "## Load it",
        "",
        *(_NATIVE if facts.layout == "native" else _OFFICIAL),
        *_check(facts),
        "",
    ]
    return "\n".join(lines)


def _about(part: Part) -> list[str]:
    role = part.role.lower()
    licence = part.licence or f"not stated in the {role}'s folder; look it up before you publish this model"
    return [f"- {part.role}: `{part.name}`", f"- Licence of the {role}: {licence}"]


def _training(config: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    tuning = config.get("tuning") or {}
    if tuning:
        method = str(tuning.get("method", "full"))
        detail = f", rank {tuning['rank']}" if "rank" in tuning else ""
        own = ", ".join(f"{rank} on {component}" for component, rank in (tuning.get("ranks") or {}).items())
        detail += f" ({own})" if own else ""
        lines.append(f"- Method: {_NAMES.get(method, method)}{detail}")
    sources = (config.get("data") or {}).get("sources") or ()
    if sources:
        # Names only: the paths of the machine that trained say nothing to a reader and may be private.
        lines.append("- Training data: " + ", ".join(f"`{Path(str(source['path'])).name}`" for source in sources))
    train = config.get("train") or {}
    if train:
        length = "max_steps" if train.get("max_steps") else "epochs"
        batches = (("global_batch_size", "rows per step"), ("global_batch_tokens", "tokens per step at most"))
        facts = ((length, length.removeprefix("max_")), *batches)
        told = [f"{train[key]} {label}" for key, label in facts if train.get(key) is not None]
        told += [f"learning rate {train['learning_rate']}"] if "learning_rate" in train else []
        lines.append("- Training: " + ", ".join(told))
    return lines


def _check(facts: CardFacts) -> list[str]:
    lines = ["", "## Provenance", ""]
    lines += [f"- {name} {version}" for name, version in facts.versions.items()]
    for one in facts.comparisons:
        lines.append(
            f"- Compared with the model that it was written from on a fixed {one['prompt']}: largest difference of a "
            f"logit {one['difference']:.1e} (allowed {one['limit']:.1e})"
        )
    return [*lines, "- `export.json` holds the whole record."]
