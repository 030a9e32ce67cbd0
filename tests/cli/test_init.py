"""``vlmtune init``: examples are listed, copied, and never copied over something."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.cli.main import main
from vlmtune.config.load import load_config


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["init"]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_every_listed_example_is_written_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    for name in names(capsys):
        assert main(["init", name]) == 0
        assert f"vlmtune check {name}.yaml" in capsys.readouterr().out
        load_config(Path(f"{name}.yaml"))


def test_the_repository_shows_the_same_examples(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[2] / "examples"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == names(capsys)


def test_output_names_a_file_a_folder_or_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "auto_lora.yaml", "-o", "new/ui.yaml"]) == 0
    Path("there").mkdir()
    assert main(["init", "auto_lora", "-o", "there"]) == 0
    capsys.readouterr()
    assert main(["init", "auto_lora", "-o", "-"]) == 0
    text = capsys.readouterr().out
    assert Path("new/ui.yaml").read_text() == Path("there/auto_lora.yaml").read_text() == text


def test_a_file_is_not_replaced_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("auto_lora.yaml").write_text("mine")
    assert main(["init", "auto_lora"]) == 2
    assert Path("auto_lora.yaml").read_text() == "mine"
    assert capsys.readouterr().err.startswith("error: auto_lora.yaml: is already there.")
    assert main(["init", "auto_lora", "--force"]) == 0
    assert Path("auto_lora.yaml").read_text() != "mine"


def test_a_mistyped_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "auto_loar"]) == 2
    assert capsys.readouterr().err == "error: vlmtune init: there is no example 'auto_loar'. Did you mean auto_lora?\n"
    assert main(["init", "xyz"]) == 2
    assert "There are auroracap_language, auroracap_projector" in capsys.readouterr().err
