"""Where the recorded numbers of official implementations lie.

`VLMTUNE_GOLDEN` names a folder with `internvl/` (and others) in it; without it, the slim copy in tests/golden is read.
Test ids are paths in that folder, so that a report says which record did not hold.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OWN = Path(__file__).parent / "golden"
"""The slim copy of the records that is part of this repository."""
_SHARED = Path(__file__).parents[2] / "shared" / "golden"


def root() -> Path:
    """
    Raises:
        pytest.UsageError: VLMTUNE_GOLDEN names no folder; without that, every test would be skipped.
    """
    folder = Path(os.environ.get("VLMTUNE_GOLDEN") or OWN).absolute()
    if not folder.is_dir():
        raise pytest.UsageError(f"VLMTUNE_GOLDEN: there is no folder {folder}")
    return folder


def skip_if_partial() -> None:
    """For tests that every kind of record is there: other folders of the form may hold a part of them."""
    if root().resolve() not in (OWN.resolve(), _SHARED.resolve()):
        pytest.skip(f"{root()} need not hold every kind of record")


def folders(place: str) -> list[Path]:
    """The folders in `place` (such as ``internvl/forward``), in order; none where the records hold no such place."""
    found = root() / place
    return sorted(child for child in found.iterdir() if child.is_dir()) if found.is_dir() else []


def name(path: Path, *more: str) -> str:
    """A test id: ``internvl/forward/qwen2/b``."""
    return "/".join([path.absolute().relative_to(root()).as_posix(), *more])


def tokenizer_folder(kind: str) -> Path:
    """A real tokenizer's folder (``tokenizer``, ``tokenizer_phi3``, ``tokenizer_qwen2``), also for held-out records.

    They are not part of this repository: a checkout that stands alone skips the tests that need them, and says so.
    """
    for place in (root(), _SHARED):
        if (place / "internvl" / kind).is_dir():
            return place / "internvl" / kind
    pytest.skip(f"the official tokenizer files (internvl/{kind}) are neither in {root()} nor in {_SHARED}")
