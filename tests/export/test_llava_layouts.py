"""From one layout of a LLaVA model to another by way of a native export, which adds rows for `<image>`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llava_models import xtuner_folder

from vlmtune.export.write import export
from vlmtune.models.load import open_folder


@pytest.mark.parametrize("layout", ["xtuner", "llava"])
def test_a_native_export_in_between_changes_no_answer(layout: str, tmp_path: Path) -> None:
    xtuner_folder(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "native", layout="native", device="cpu")
    result = export(tmp_path / "native", tmp_path / "out", layout=layout, device="cpu")
    assert result.comparisons and all(one.difference == 0.0 for one in result.comparisons)


def test_what_a_layout_without_template_changes_is_said(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """A -hf folder's own template is not Vicuna's as XTuner lays it."""
    for layout, others in (("xtuner", True), ("native", False)):
        result = export(tiny_folder("llava"), tmp_path / layout, layout=layout, device="cpu", verify="none")
        assert any("no chat template" in note for note in result.notes) == others
        before, after = open_folder(tiny_folder("llava")).chat, open_folder(tmp_path / layout).chat
        assert (before.bridge, before.again) == (after.bridge, after.again) or others
    xtuner_folder(tmp_path / "base")
    result = export(tmp_path / "base", tmp_path / "llava", layout="llava", device="cpu", verify="none")
    assert not any("no chat template" in note for note in result.notes)
