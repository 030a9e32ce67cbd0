"""What a model card says of where the weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.export.write import _origin
from vlmtune.infer.locate import Located

BASE = Path("somebody/base")


@pytest.mark.parametrize(
    ("located", "said", "base"),
    [
        (Located(path=Path("run"), base=BASE, provenance={"base": "a/b"}), "fine-tuned with vlmtune", "somebody/base"),
        (Located(path=Path("run"), provenance={"base": "a/b"}), "fine-tuned with vlmtune", "a/b"),
        (
            Located(path=Path("peft"), base=BASE),
            "trained with another program and put together with vlmtune",
            "somebody/base",
        ),
        (
            Located(path=Path("iter_5.pth"), base=BASE, foreign="pickle"),
            "trained with another program and put together with vlmtune",
            "somebody/base",
        ),
        (Located(path=BASE), "converted with vlmtune: the weights are those of the model below", "somebody/base"),
    ],
)
def test_only_what_was_trained_here_is_said_to_be(located: Located, said: str, base: str) -> None:
    made, (part,) = _origin(located)
    assert made == said and part.name == base
