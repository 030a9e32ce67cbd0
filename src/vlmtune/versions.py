"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vlmtune", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "pillow")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Name -> version of Python and of the installed ones of `packages`."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
