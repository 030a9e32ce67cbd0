"""From one layout of a LLaVA model to another by way of a native export, which adds rows for `<image>`."""

from __future__ import annotations

from pathlib import Path

import pytest
from llava_models import xtuner_folder

from vlmtune.export.write import export


@pytest.mark.parametrize("layout", ["xtuner", "llava"])
def test_a_native_export_in_between_changes_no_answer(layout: str, tmp_path: Path) -> None:
    xtuner_folder(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "native", layout="native", device="cpu")
    result = export(tmp_path / "native", tmp_path / "out", layout=layout, device="cpu")
    assert result.comparisons and all(one.difference == 0.0 for one in result.comparisons)
