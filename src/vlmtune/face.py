"""Lets a package be called: `vlmtune.train(config)` runs what `vlmtune.train.run` holds.

A package and a function of the same name cannot stand side by side: importing ``vlmtune.train.run`` would put the
package over the function. So the packages `train` and `export` are modules of a class that can be called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__dict__["_called"].partition(":")
        return vars(importlib.import_module(module))[function](*args, **kwargs)


def make_callable(package: str, called: str) -> None:
    """Make the package with this name callable; `called` is ``module:function``, imported at the first call."""
    module = sys.modules[package]
    module.__class__ = _CallableModule
    module.__dict__["_called"] = called
