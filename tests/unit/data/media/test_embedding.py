"""Files of pseudo-text: what is read, and what is refused in one paragraph."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import embedding, planned
from vlmtune.data.sample import MediaPlan, MediaRef
from vlmtune.errors import DataError

ROWS = torch.arange(12.0).reshape(3, 4) / 8  # exact in all four types


def ref(path: Path, key: str | None = None) -> MediaRef:
    return MediaRef(path=str(path), key=key)


def safe(path: Path, **tensors: torch.Tensor) -> MediaRef:
    safetensors.torch.save_file(tensors, path)
    return ref(path)


def saved(path: Path, value: object, *, old: bool = False) -> MediaRef:
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return ref(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_every_form(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = ROWS.to(dtype)
    forms = [
        saved(tmp_path / "new.pt", tensor),
        saved(tmp_path / "old.pt", tensor, old=True),
        saved(tmp_path / "parameter.pt", torch.nn.Parameter(tensor)),
        saved(tmp_path / "view.pt", tensor.T.contiguous().T),
        saved(tmp_path / "any.suffix", tensor),
        saved(tmp_path / "pickle.safetensors", tensor),
        saved(tmp_path / "old-pickle.safetensors", tensor, old=True),
        safe(tmp_path / "stored.pt", a=tensor),
        safe(tmp_path / "one.safetensors", a=tensor),
    ]
    safe(tmp_path / "store.safetensors", **{"page/7": tensor, "other": torch.zeros(1, 9)})
    forms.append(ref(tmp_path / "store.safetensors", "page/7"))
    for form in forms:
        assert embedding.shape(form) == (4, 3), form
        found = embedding.rows(form, (4, 3))
        assert found.dtype == torch.float32 and torch.equal(found, ROWS) and not found.requires_grad


def test_a_file_inside_a_tar_and_one_inside_the_row(tmp_path: Path) -> None:
    pt, one = io.BytesIO(), safetensors.torch.save({"a": ROWS})
    torch.save(ROWS, pt)
    for content in (pt.getvalue(), one):
        (tmp_path / "x.tar").write_bytes(b"\0" * 512 + content + b"\0" * 100)
        inside = MediaRef(path=str(tmp_path / "x.tar"), offset=512, length=len(content))
        assert embedding.shape(inside) == (4, 3) and torch.equal(embedding.rows(inside), ROWS)
        assert torch.equal(embedding.rows(MediaRef(path="a.pt (in the row)", inline=content)), ROWS)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, ("trapped",))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": ROWS}, "the pickle a.pt holds a dict, not a tensor"),
        ([ROWS], "the pickle a.pt holds a list, not a tensor"),
        (torch.nn.Linear(2, 2), "the pickle a.pt holds something else, not a tensor; no code in it was run"),
        (ROWS.numpy(), "the pickle a.pt holds something else, not a tensor"),
        (ROWS.to_sparse(), "the pickle a.pt holds a Tensor, not"),
        (ROWS.long(), "the embedding a.pt holds numbers of the type int64"),
        (ROWS.to(torch.complex64), "the embedding a.pt holds numbers of the type complex64"),
        (ROWS[0], "the embedding a.pt is a tensor (4)"),
        (ROWS[None], "the embedding a.pt is a tensor (1, 3, 4)"),
        (ROWS[:0], "the embedding a.pt is empty: (0, 4); expected one row at least"),
        (ROWS[:1].expand(10**9, 4), "the embedding a.pt is a tensor (1000000000, 4) of which not all numbers are"),
        (ROWS.to("meta"), "the embedding a.pt is a tensor (3, 4) of which not all numbers are in the file"),
    ],
)
def test_pickles_that_are_refused(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(DataError) as caught:
        embedding.shape(saved(tmp_path / "a.pt", value))
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="no code in it was run"):
        embedding.rows(ref(tmp_path / "a.pt"))
    assert not (tmp_path / "trapped").exists()


def test_other_files_that_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", ROWS)
    content = Path(whole.path).read_bytes()
    cut = safetensors.torch.save({"a": ROWS})[:-4]
    files = {
        "cut.pt": (content[:300], "the embedding file cut.pt is damaged ("),
        "empty.pt": (b"", "the embedding file empty.pt is empty; expected a tensor (n, d)"),
        "text.pt": (b"a text that is longer", "the embedding file text.pt begins with b'a text th'"),
        "cut.safetensors": (
            cut,
            "the embedding file cut.safetensors is damaged (",
        ),
    }
    for name, (data, said) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            embedding.shape(ref(tmp_path / name))
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value), str(caught.value)
    with pytest.raises(DataError, match=r"gone\.pt cannot be opened"):
        embedding.shape(ref(tmp_path / "gone.pt"))
    with pytest.raises(DataError, match=r"whole\.pt#a names a tensor in a pickle"):
        embedding.shape(ref(tmp_path / "whole.pt", "a"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles_are_told_as_such(tmp_path: Path, old: bool) -> None:
    """Whatever byte is wrong: torch has many words for it, a user reads one paragraph."""
    whole = Path(saved(tmp_path / "whole.pt", ROWS, old=old).path).read_bytes()
    generator, refused = random.Random(7), 0
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(content))] = generator.randrange(256)
        cut = generator.choice((len(whole), generator.randrange(len(whole))))
        try:
            embedding.rows(MediaRef(path="a.pt", inline=bytes(content[:cut])))
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_the_name_in_a_store(tmp_path: Path) -> None:
    safe(tmp_path / "s.safetensors", **{name: ROWS.clone() for name in "abcd"})
    with pytest.raises(DataError, match=r"holds 4 tensors \(a, b, c, …\); expected one, or the name of one behind a #"):
        embedding.shape(ref(tmp_path / "s.safetensors"))
    with pytest.raises(DataError, match=r"4 tensors \(a, b, c, …\), and none is called e\. Correct the name"):
        embedding.shape(ref(tmp_path / "s.safetensors", "e"))
    safe(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="holds 0 tensors"):
        embedding.shape(ref(tmp_path / "none.safetensors"))


def test_a_store_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    store = safe(tmp_path / "s.safetensors", a=ROWS)
    assert embedding.shape(store) == (4, 3)
    (tmp_path / "s.safetensors").unlink()
    safe(tmp_path / "s.safetensors", a=ROWS[:2])
    assert embedding.shape(store) == (4, 2)
    with pytest.raises(DataError, match=r"is \(2, 4\) now, but was \(3, 4\) when the row was planned"):
        embedding.rows(store, (4, 3))
    plan = MediaPlan(size=(4, 3), num_tokens=3, num_tiles=0, layout=(), is_pseudo_text=True)
    assert not planned.is_as_planned(((store, plan),), MediaOptions())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_no_model_can_take(tmp_path: Path, value: float) -> None:
    broken = ROWS.double().clone()
    broken[1, 2] = broken[2, 0] = value
    file = saved(tmp_path / "a.pt", broken)
    assert embedding.shape(file) == (4, 3), "the header knows nothing of it"
    with pytest.raises(DataError, match=r"a\.pt has NaN or infinity in 2 of its 3 rows, the first being row 2"):
        embedding.rows(file)
    plan = MediaPlan(size=(4, 3), num_tokens=3, num_tiles=0, layout=(), is_pseudo_text=True)
    with pytest.raises(DataError, match="NaN or infinity"):
        planned.decode(((file, plan),), MediaOptions())
