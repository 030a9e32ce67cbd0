"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from vlmtune.version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "pillow")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Name -> version of vlmtune, Python, and of the installed ones of `packages`."""
    found = {"vlmtune": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
