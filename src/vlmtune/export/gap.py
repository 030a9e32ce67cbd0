"""How far an export of a QLoRA run is from the model that was trained, whose base layers were 4-bit.

The adapter was fitted to the rounded base and is exported on the exact one, so the answers differ a little. This is
information: the export is held to the exact base with its adapter, see `verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from vlmtune.config.schema import LoraTuning
from vlmtune.data.sample import Encoded
from vlmtune.errors import VlmtuneError
from vlmtune.infer.locate import Located
from vlmtune.infer.session import Session, attach, choose_device
from vlmtune.models.load import open_folder

if TYPE_CHECKING:
    from vlmtune.export.verify import Expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """differences: prompt -> largest absolute difference of a logit in float32. skipped: why there are none."""

    differences: Mapping[str, float]
    skipped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def was_quantised(located: Located) -> bool:
    """Whether the adapter was trained by `method: qlora`, as its provenance says."""
    return located.base is not None and _tuning(located).get("method") == "qlora"


def _tuning(located: Located) -> Mapping[str, Any]:
    return (located.provenance.get("config") or {}).get("tuning") or {}


def skip(reason: str) -> Gap:
    return Gap(differences={}, skipped=reason)


def measure(located: Located, expected: Expected, device: str | None) -> Gap:
    """Loads the base in 4 bits under its adapter and asks it the prompts of the comparison.

    Args:
        expected: logits of the exact base with its adapter, in float32.

    Returns:
        The differences; without bitsandbytes, or where the base cannot be loaded in 4 bits, the reason.
    """
    from vlmtune.tuning import quantised

    if not quantised.is_installed():
        return skip("bitsandbytes is not installed")
    try:
        tuning = LoraTuning.model_validate(_tuning(located))
    except ValidationError:
        return skip("provenance.json does not say which layers were 4-bit")
    place = choose_device(device)
    opened = open_folder(located.model_folder, located.media)
    try:
        model = quantised.load_quantised(opened, tuning, dtype=torch.float32, device=place)
    except VlmtuneError as error:
        return skip(str(error))
    session = Session(attach(model, located.path).eval(), opened, located)
    return Gap(differences=_differences(expected.prompts, expected.logits, session.logits(expected.prompts)))


def _differences(
    prompts: Sequence[Encoded], exact: Sequence[torch.Tensor], rounded: Sequence[torch.Tensor]
) -> dict[str, float]:
    rows = zip(prompts, exact, rounded, strict=True)
    return {prompt.origin: float((a - b).abs().max()) for prompt, a, b in rows}
