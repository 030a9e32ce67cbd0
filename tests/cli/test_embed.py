"""`vlmtune embed` as a user runs it: one picture, folders, what was done before, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.cli.main import main
from vlmtune.config.schema import SourceConfig
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.embed.codebook import Nearest, statistics
from vlmtune.embed.encoder import CropFeatures, RegionEncoder
from vlmtune.embed.folder import EncoderConfig, write_encoder
from vlmtune.embed.regions import SquareRule, read_page
from vlmtune.embed.resampler import PerceiverResampler, ResamplerShape
from vlmtune.models.load import load_model, open_folder
from vlmtune.weights.fingerprint import fingerprint


@pytest.fixture(scope="module")
def encoder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("embed") / "encoder", tiny_folder("internvl")
    torch.manual_seed(0)
    mu_sigma = torch.stack(statistics(load_model(open_folder(model)).get_input_embeddings().weight), 1)
    shape = ResamplerShape(dim=48, depth=1, heads=4, dim_head=8, num_learns=3, ff_mult=2)
    config = EncoderConfig(model=str(model), model_sha256=fingerprint(model), heads=4)
    write_encoder(folder, config, PerceiverResampler(shape), mu_sigma)
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Four pages of one to four regions; one in a folder of its own, with a Chinese name."""
    folder, noise = tmp_path / "pages", np.random.default_rng(0)
    for number, stem in enumerate(("a", "b", "c", "深 处/卷"), start=1):
        picture = folder / f"{stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(picture)
        write_page(picture, [[[0.2 * i, 0.1], [0.2 * i + 0.2, 0.9]] for i in range(number)])
    return folder


def write_page(picture: Path, points: list[list[list[float]]]) -> None:
    shapes = [{"label": "天地玄黄宇宙"[i], "points": both} for i, both in enumerate(points)]
    record = {"shapes": shapes, "imageWidth": 80, "imageHeight": 60}
    picture.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")


def encode(*arguments: object) -> int:
    return main(["embed", *map(str, arguments)])


def expected(encoder: Path, picture: Path) -> torch.Tensor:
    opened = RegionEncoder.open(encoder)
    rule: SquareRule = opened.features.rule
    page = read_page(picture.with_suffix(".json"), picture, open_folder(opened.features.model.name_or_path).media, rule)
    return opened.encode_page(page.open(), page.regions)


def test_one_picture(encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = expected(encoder, pages / "b.png")
    assert encode(encoder, pages / "b.png", "-o", tmp_path / "out" / "b.safetensors") == 0
    assert capsys.readouterr().out.startswith(f"1 page, 2 regions -> {len(wanted)} vectors of 48 numbers (float32) in ")
    assert torch.equal(load_file(tmp_path / "out" / "b.safetensors")["embedding"], wanted)
    assert os.listdir(tmp_path / "out") == ["b.safetensors"]
    assert encode(encoder, pages / "b.png", "-o", tmp_path / "b.pt", "--file-dtype", "bfloat16") == 0
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    assert (tmp_path / "b.pt").stat().st_size < 3000  # the tensor alone
    other = tmp_path / "elsewhere.json"
    (pages / "b.json").rename(other)
    assert encode(encoder, pages / "b.png", "-o", tmp_path / "c.safetensors", "--json", other) == 0
    assert torch.equal(load_file(tmp_path / "c.safetensors")["embedding"], wanted)


def test_a_folder_its_rows_and_a_second_run(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pages / "bare.png").touch()
    out, rows = pages / "emb", pages / "rows.json"
    arguments = (encoder, pages, "-o", out, "--rows", rows, "--ask", "写了什么？", "--batch-size", "3")
    assert encode(*arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 pages, 10 regions -> ") and "1 picture without a JSON of its name" in printed
    assert f"wrote {rows}: 4 rows\n" in printed
    made = json.loads(rows.read_text(encoding="utf-8"))
    assert [row["image"] for row in made] == ["a.png", "b.png", "c.png", "深 处/卷.png"]
    for row in made:
        found = load_file(pages / row["embedding"])["embedding"]
        torch.testing.assert_close(found, expected(encoder, pages / row["image"]), atol=1e-5, rtol=1e-4)
        assert set(row) == {"id", "image", "embedding", "conversations"}
    assert made[3]["conversations"] == [
        {"from": "human", "value": "<image>\n<embedding>\n写了什么？"},
        {"from": "gpt", "value": "天地玄黄"},
    ]
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert len(times) == 4
    # One is cut off, one has another form, the JSON of one is younger: these are made again, and nothing else.
    first = (out / "a.safetensors").read_bytes()
    (out / "a.safetensors").write_bytes(first[:-5])
    save_file({"embedding": torch.ones(2, 3)}, out / "b.safetensors")
    os.utime(pages / "c.json", ns=(times[out / "c.safetensors"] + 10**9,) * 2)
    assert encode(*arguments) == 0
    assert "3 pages, 6 regions -> " in (printed := capsys.readouterr().out) and "; 1 page kept from before" in printed
    assert (out / "深 处" / "卷.safetensors").stat().st_mtime_ns == times[out / "深 处" / "卷.safetensors"]
    assert (out / "a.safetensors").read_bytes() == first
    assert json.loads(rows.read_text(encoding="utf-8")) == made
    os.utime(pages / "c.json", ns=(0, 0))
    assert encode(*arguments) == 0
    assert "0 pages, 0 regions -> " in capsys.readouterr().out


def test_other_settings_are_not_mixed_in(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "emb"
    assert encode(encoder, pages, "-o", out) == 0
    assert encode(encoder, pages, "-o", out, "--file-dtype", "bfloat16") == 2
    assert "embeddings of other settings (file_dtype)" in capsys.readouterr().err
    assert load_file(out / "a.safetensors")["embedding"].dtype == torch.float32
    assert encode(encoder, pages, "-o", out, "--file-dtype", "bfloat16", "--overwrite") == 0
    assert "4 pages, 10 regions" in capsys.readouterr().out
    assert {load_file(file)["embedding"].dtype for file in out.rglob("*.safetensors")} == {torch.bfloat16}
    assert encode(encoder, pages, "-o", tmp_path / "pt", "--suffix", ".pt") == 0
    assert torch.load(tmp_path / "pt" / "a.pt", weights_only=True).shape[1] == 48
    assert encode(encoder, pages, "-o", tmp_path / "pt", "--suffix", ".pt") == 0
    assert "; 4 pages kept from before" in capsys.readouterr().out
    (tmp_path / "pt" / "embed.json").unlink()
    assert encode(encoder, pages, "-o", tmp_path / "pt", "--suffix", ".pt") == 2
    assert "4 of the files that would be written are there, and nothing tells" in capsys.readouterr().err


def test_other_settings_are_refused_beside_outputs_of_other_pages(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else their settings would be forgotten, and they would be kept the next time as what they are not."""
    out = tmp_path / "emb"
    assert encode(encoder, pages, "-o", out) == 0
    for more in ((), ("--overwrite",)):
        half = ("--file-dtype", "bfloat16", *more)
        assert encode(encoder, pages, "-o", out, "--suffix", ".pt", *half) == 2
        error = capsys.readouterr().err
        assert "other settings (file_dtype), 4 of them not of these pages and this suffix, such as a.safet" in error
        assert encode(encoder, pages / "深 处", "-o", out, *half) == 2
    assert encode(encoder, pages, "-o", out) == 0
    assert "; 4 pages kept from before" in capsys.readouterr().out
    assert encode(encoder, pages / "深 处", "-o", out) == 0, "other pages of the same settings have a place there"
    assert not list(out.rglob("*.pt")) and len(list(out.rglob("*.safetensors"))) == 5


def test_nothing_is_replaced_unasked(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows = tmp_path / "model.safetensors", pages / "rows.json"
    file.write_bytes(b"of somebody")
    arguments = (encoder, pages, "-o", pages / "emb", "--rows", rows)
    assert encode(*arguments) == 0
    rows.write_text(rows.read_text(encoding="utf-8").replace("天地玄", "worked on"), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("vlmtune.embed.encoder.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
        assert encode(encoder, pages / "a.png", "-o", file) == 2
        assert f"{file}: is there. Choose another name" in capsys.readouterr().err
        for text in (rows.read_text(encoding="utf-8").replace('"天"', '"worked on"', 1), "{", "{}", "[[]]"):
            rows.write_text(text, encoding="utf-8")
            assert encode(*arguments) == 2
            assert f"{rows}: the file is there, and holds rows that would not be" in capsys.readouterr().err
            assert rows.read_text(encoding="utf-8") == text
    assert file.read_bytes() == b"of somebody"
    assert encode(encoder, pages / "a.png", "-o", file, "--overwrite") == 0 and "embedding" in load_file(file)
    assert encode(*arguments, "--overwrite") == 0
    made = json.loads(rows.read_text(encoding="utf-8"))
    assert [row["labels"][0] for row in made] == ["天"] * 4
    rows.write_text(json.dumps(made[:2]))
    assert encode(*arguments) == 0, "rows of a run of fewer pages are written again"
    assert json.loads(rows.read_text(encoding="utf-8")) == made


def test_bad_regions_refuse_the_whole_or_are_left_out_and_counted(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_page(pages / "a.png", [[[0.5, 0.5], [0.5, 0.9]]])
    write_page(pages / "b.png", [[[0.1, 0.1], [0.5, 0.9]], [[1.2, 0.1], [1.5, 0.9]], [[0.9, 0.1], [1.5, 0.9]]])
    (pages / "d.png").write_bytes((pages / "c.png").read_bytes())
    (pages / "d.json").write_text("{}")
    out = tmp_path / "emb"
    assert encode(encoder, pages, "-o", out) == 3
    assert "1 page cannot be encoded" in capsys.readouterr().err
    (pages / "d.json").unlink()
    assert encode(encoder, pages, "-o", out) == 3
    error = capsys.readouterr().err
    assert "2 regions of 2 pages cannot be cut out" in error and "a.json: region 1 ('天') has no area" in error
    assert "b.json: region 2 ('地') is outside" in error
    assert not out.exists()
    assert encode(encoder, pages, "-o", out, "--skip-bad-regions") == 0
    printed = capsys.readouterr().out
    assert "3 pages, 9 regions" in printed and "1 region left out" in printed
    assert "1 page without an embedding" in printed and "none of its 1 regions can be cut out" in printed
    assert "1 region cut at the edge" in printed
    assert not (out / "a.safetensors").exists() and (out / "b.safetensors").exists()


def test_a_page_that_cannot_be_decoded_does_not_stop_the_others(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pages / "b.png").read_bytes()
    (pages / "b.png").write_bytes(whole[: len(whole) // 2])
    assert encode(encoder, pages, "-o", tmp_path / "emb") == 3
    printed = capsys.readouterr().out
    assert "3 pages, 8 regions" in printed and "b.png: the picture b.png cannot be decoded" in printed
    (pages / "b.png").write_bytes(whole)
    assert encode(encoder, pages, "-o", tmp_path / "emb") == 0
    assert "1 page, 2 regions" in capsys.readouterr().out


def test_pages_without_a_row_or_with_broken_vectors_are_told_by_name(
    encoder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages share the batches of the tower, but one page's trouble is not another's."""
    square = SquareRule().of_edge(32).shown(PIL.Image.open(pages / "b.png").crop((0, 6, 16, 54)))
    broken = np.asarray(square).tobytes()
    shown = CropFeatures.__call__

    def features(self: CropFeatures, pixels: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        found = shown(self, pixels)
        for place, one in enumerate(pixels):
            (seen,) = self.family.view(one, self.spec)
            if np.asarray(seen).tobytes() == broken:
                found[place] = torch.nan
        return found

    monkeypatch.setattr(CropFeatures, "__call__", features)
    assert encode(encoder, pages, "-o", tmp_path / "emb") == 3
    printed = capsys.readouterr().out
    # The first regions of all pages lie in one place, of pictures that differ.
    assert "3 pages, 8 regions" in printed and "b.png: the vectors of region 1 hold NaN" in printed
    monkeypatch.undo()
    monkeypatch.setattr("vlmtune.embed.codebook.Codebook.nearest", lambda self, rows: none_of(rows))
    assert encode(encoder, pages / "a.png", "-o", tmp_path / "a.pt") == 3
    assert "a.png: no row is left" in capsys.readouterr().out
    assert not (tmp_path / "a.pt").exists()


def none_of(rows: torch.Tensor) -> Nearest:
    return Nearest(torch.zeros(rows.shape[:-1], dtype=torch.long), torch.zeros(rows.shape[:-1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{a}", "-o", "x.npy"), "ends in '.npy'"),
        (("{a}", "-o", "x.pt", "--suffix", ".pt"), "--suffix belongs to a folder"),
        (("{pages}", "-o", "x.pt"), "expected a folder"),
        (("{pages}", "-o", "x", "--json", "y.json"), "--json belongs to one picture"),
        (("{pages}", "-o", "x", "--ask", "What?"), "--ask needs --rows"),
        (("{pages}", "-o", "x", "--rows", "y.txt"), "expected .json or .jsonl"),
        (("{pages}", "-o", "x", "--rows", "{pages}/r.json"), "is not below it"),
        (("{a}", "-o", "x.pt", "--batch-size", "0"), "expected 1 or more"),
        (("{a}", "-o", "x.pt", "--hard-vq", "nan"), "expected a cosine"),
        (("{pages}", "-o", "x", "--rows", "r.json", "--ask", "<embedding> <embedding>?"), "holds <embedding> more"),
        (("{a}", "-o", "x.pt", "--max-image-pixels", "100"), "at most 100"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(
    encoder: Path, pages: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmtune.embed.encoder.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    given = [argument.format(a=pages / "a.png", pages=pages) for argument in arguments]
    assert encode(encoder, *given) in (2, 3)
    assert words in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["pages"]


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("Of <image>: <embedding>?", "Of <image>: <embedding>?"),
        ("Read <embedding>.", "<image>\nRead <embedding>."),
    ],
)
def test_a_question_may_say_where_they_stand(encoder: Path, pages: Path, asked: str, written: str) -> None:
    """As in `vlmtune chat`; a second mark would make rows that are refused."""
    rows = pages / "rows.json"
    assert encode(encoder, pages, "-o", pages / "emb", "--rows", rows, "--ask", asked) == 0
    for i, row in enumerate(json.loads(rows.read_text(encoding="utf-8"))):
        assert row["conversations"][0]["value"] == written
        assert len(open_corpus([SourceConfig(path=str(rows))]).sample(i).messages[0].parts) >= 3


def test_an_answer_needs_labels(encoder: Path, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((pages / "a.json").read_text())
    del record["shapes"][0]["label"]
    (pages / "a.json").write_text(json.dumps(record))
    rows = pages / "rows.jsonl"
    assert encode(encoder, pages, "-o", pages / "emb", "--rows", rows, "--ask", "?") == 3
    assert "a.json: a region has no label" in capsys.readouterr().err
    assert encode(encoder, pages, "-o", pages / "emb", "--rows", rows) == 0
    assert "4 rows, still without conversations" in capsys.readouterr().out
    assert json.loads(rows.read_text(encoding="utf-8").splitlines()[3])["labels"] == ["天", "地", "玄", "黄"]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom vlmtune.cli.main import main\ntry:\n    main(['embed', '--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vlmtune embed encoders/characters scrolls" in done.stdout
