"""The wheel: built, installed into an empty environment, and used outside the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from vlmtune.cli.main import VERBS
from vlmtune.version import __version__

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src"

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, REPOSITORY, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds only the wheel, and sees this environment's libraries.

    The libraries come by one line in a .pth file: a folder added that way does not have its own .pth files read, so
    an editable install of vlmtune beside them stays out of sight.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    call(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel,
        cwd=folder,
    )  # fmt: skip
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kept = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert held == kept
    assert {"vlmtune/py.typed", "vlmtune/examples/auto_lora.yaml", "vlmtune/quickstart/digits.csv.gz"} <= held


def test_the_wheel_names_its_licence_and_its_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "License-File: LICENSE\n" in text and "License-File: NOTICE\n" in text
    needs = {
        re.split(r"[<>=]", line[15:])[0]
        for line in text.splitlines()
        if line.startswith("Requires-Dist: ") and "extra" not in line
    }
    assert needs == {
        "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "pillow", "numpy", "pydantic",
        "protobuf", "pyyaml", "rich", "jinja2", "sacrebleu", "tensorboard",
    }  # fmt: skip


def test_the_command_works_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    assert call(installed / "vlmtune", "--version", cwd=tmp_path) == f"vlmtune {__version__}\n"
    overview = call(installed / "vlmtune", "--help", cwd=tmp_path)
    assert all(f"\n  {verb}" in overview for verb in VERBS)
    where = call(installed / "python", "-c", "import vlmtune; print(vlmtune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_package_data_is_found(installed: Path, tmp_path: Path) -> None:
    assert "auto_lora" in call(installed / "vlmtune", "init", cwd=tmp_path)
    call(installed / "vlmtune", "init", "auto_lora", cwd=tmp_path)
    assert (tmp_path / "auto_lora.yaml").read_text() == (SOURCE / "vlmtune/examples/auto_lora.yaml").read_text()
    call(installed / "vlmtune", "quickstart", "digits", "--only", "data", cwd=tmp_path)
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797


def test_every_module_imports(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, vlmtune\n"
        "for module in pkgutil.walk_packages(vlmtune.__path__, 'vlmtune.'): importlib.import_module(module.name)"
    )
    call(installed / "python", "-c", code, cwd=tmp_path)
