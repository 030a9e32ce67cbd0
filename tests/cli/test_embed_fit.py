"""`vlmtune embed fit` as a user runs it: pages to an encoder that `vlmtune embed` takes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file

from vlmtune.cli.main import main


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Four pages with six regions each: black is 0, grey is 1, white is 23."""
    folder, noise = tmp_path / "pages", np.random.default_rng(0)
    folder.mkdir()
    for number in range(4):
        paper, shapes = np.full((40, 240), 128.0), []
        for place in range(6):
            kind = (number + place) % 3
            paper[:, 40 * place : 40 * place + 40] = (10, 128, 245)[kind] + noise.normal(0, 4, (40, 40))
            corners = [[40 * place, 0], [40 * place + 40, 40]]
            shapes.append({"label": ("0", "1", "23")[kind], "points": corners})
        PIL.Image.fromarray(paper.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        record = {"shapes": shapes, "imageWidth": 240, "imageHeight": 40}
        (folder / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def fit(*arguments: object) -> int:
    small = ("--queries", "2", "--depth", "1", "--heads", "2", "--head-width", "16", "--learning-rate", "3e-3")
    return main(["embed", "fit", *map(str, arguments), *small])


def test_pages_to_an_encoder_to_rows(
    pages: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoder"
    arguments = (pages, "--model", tiny_folder("internvl"), "-o", out, "--held-out", "0.25")
    assert fit(*arguments, "--epochs", "40", "--batch-size", "6") == 0
    printed = capsys.readouterr().out
    assert "24 regions of 4 pages: 18 to learn from, 6 held out (whole pages)\n" in printed
    assert "  3 different labels of 1 to 2 tokens\n" in printed and "epoch 40/40" in printed
    assert "held out: 100.0% of 6 labels right, 100.0% of 8 tokens (always the commonest label: 33.3%;" in printed
    rows = pages / "rows.json"
    assert main(["embed", str(out), str(pages), "-o", str(pages / "emb"), "--rows", str(rows), "--ask", "What?"]) == 0
    assert len(load_file(pages / "emb" / "0.safetensors")["embedding"]) == 8  # 0 1 23 twice, a row for each digit
    assert json.loads(rows.read_text())[0]["conversations"][1]["value"] == "01230123"
    assert fit(*arguments) == 2
    assert "an encoder already" in capsys.readouterr().err
    assert fit(*arguments, "--epochs", "1", "--held-out", "0", "--overwrite") == 0
    assert "Nothing was held out" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["fit"]["settings"]["epochs"] == 1


def test_what_cannot_be_learned_is_refused_or_left_out(
    pages: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((pages / "1.json").read_text())
    record["shapes"][0]["label"], record["shapes"][1]["label"] = "", "12345"
    (pages / "1.json").write_text(json.dumps(record))
    out = tmp_path / "encoder"
    arguments = (pages, "--model", tiny_folder("internvl"), "-o", out, "--epochs", "1")
    assert fit(*arguments) == 3
    message = capsys.readouterr().err
    assert f"{pages / '1.json'}: the region (0, 0, 40, 40) has no label" in message
    assert "'12345' of 5 tokens, and there are 2 queries" in message and "2 labels cannot be learned" in message
    record["shapes"][2]["points"] = [[5, 5], [5, 9]]
    (pages / "1.json").write_text(json.dumps(record))
    assert fit(*arguments) == 3
    assert "has no area" in capsys.readouterr().err
    assert fit(*arguments, "--skip-bad-regions") == 0
    printed = capsys.readouterr().out
    assert "21 regions of 4 pages" in printed and "3 left out:" in printed
    for wrong in (("--held-out", "1"), ("--epochs", "0"), ("--learning-rate", "0"), ("--held-out-by", "book")):
        assert main(["embed", "fit", *map(str, arguments), *wrong]) == 2
    (pages / "2.json").write_text("{")
    assert fit(*arguments, "--overwrite") == 3
    assert "2.json: is not JSON" in capsys.readouterr().err


def test_help_knows_both_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  embed fit " in shown and "\n  embed  " in shown
    with pytest.raises(SystemExit):
        main(["help", "embed", "fit"])
    assert capsys.readouterr().out.startswith("usage: vlmtune embed fit ")
