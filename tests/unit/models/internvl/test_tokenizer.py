"""Tokenizers of official folders: a small SentencePiece model written here, and ids recorded from the real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepieces import write_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlmtune.errors import WeightsError
from vlmtune.models.family import ChatFormat, ModelFolder
from vlmtune.models.internvl.tokenizer import check_fits, context_token_id, lone_space, open_tokenizer, write_native
from vlmtune.models.text import TextEncoder

_RECORDED = Path(__file__).parents[3] / "fixtures" / "sentencepiece_ids.json"
_IM = {"<|im_start|>": 270, "<|im_end|>": 271, "<img>": 275, "</img>": 276, "<IMG_CONTEXT>": 277, "<box>": 278}


def folder(place: Path, *, added: dict[str, int] | None = None, spec: Any = None, **settings_: Any) -> ModelFolder:
    write_model(place, **(spec or {}))
    decoder = {str(number): {"content": text, "special": True} for text, number in (added or _IM).items()}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    described = {"tokenizer_class": "InternLM2Tokenizer", **names, "added_tokens_decoder": decoder, **settings_}
    (place / "tokenizer_config.json").write_text(json.dumps(described))
    return ModelFolder(place, {})


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_pieces_are_joined_by_score(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path))
    assert plain(tokenizer, "abc") == ["a", "bc"]
    assert plain(tokenizer, " ab") == ["▁", "ab"]
    assert tokenizer("ab").input_ids == [1, 263]


def test_no_text_becomes_a_control_or_byte_piece(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path))
    ids = TextEncoder(tokenizer)._later.encode("</s><0x41><unk>", add_special_tokens=False).ids
    assert bytes(number - 3 for number in ids) == b"</s><0x41><unk>"


def test_a_place_that_became_a_special_token_has_no_other_name(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 271
    assert tokenizer("[SPARE_4]", add_special_tokens=False).input_ids != [271]
    assert tokenizer("[X][X]", add_special_tokens=False).input_ids == [266, 266]


def test_places_in_pictures_may_be_written_by_anyone(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path))
    words = TextEncoder(tokenizer)._later
    assert words.encode("<box>a", add_special_tokens=False).ids == [278, 260]
    assert 275 not in words.encode("<img>a", add_special_tokens=False).ids
    assert tokenizer.decode([278, 260], skip_special_tokens=True) == "<box>a"


@pytest.mark.parametrize(
    ("settings_", "together", "apart"),
    [
        ({"legacy": False}, ["▁", "▁a", "<|im_end|>", "a"], ["▁a"]),
        ({"legacy": True}, ["▁", "▁a", "<|im_end|>", "▁a"], ["▁a"]),
        ({"legacy": True, "add_prefix_space": False}, ["▁", "▁a", "<|im_end|>", "▁a"], ["▁a"]),
        ({"legacy": False, "add_prefix_space": False}, ["▁a", "<|im_end|>", "a"], ["a"]),
    ],
)
def test_llama_puts_a_space_in_front(
    tmp_path: Path, settings_: dict[str, Any], together: list[str], apart: list[str]
) -> None:
    model = {"add_dummy_prefix": True}
    tokenizer = open_tokenizer(folder(tmp_path, tokenizer_class="LlamaTokenizer", spec=model, **settings_))
    assert plain(tokenizer, " a<|im_end|>a") == together
    assert plain(tokenizer, "a") == apart
    wanted = (259,) if "add_prefix_space" not in settings_ and not settings_["legacy"] else ()
    assert lone_space(tokenizer, "<|im_start|>") == wanted
    assert lone_space(tokenizer, "<s>") == ()


@pytest.mark.parametrize("settings_", [{}, {"legacy": True}, {"legacy": None}])
def test_yi_puts_no_space_in_front(tmp_path: Path, settings_: dict[str, Any]) -> None:
    """Its SentencePiece model is trained without (arXiv 2403.04652, 2.2), and the old LlamaTokenizer asks the model."""
    spec = {"add_dummy_prefix": False}
    tokenizer = open_tokenizer(folder(tmp_path, tokenizer_class="LlamaTokenizer", spec=spec, **settings_))
    assert plain(tokenizer, "ab<|im_end|>a") == ["ab", "<|im_end|>", "a"]
    assert tokenizer.decode(tokenizer(" ab", add_special_tokens=False).input_ids) == " ab"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.one_of(st.sampled_from("abc  \n[X]"), st.characters(exclude_categories=["Cs"]))))
def test_decoding_gives_the_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = _kept(tmp_path_factory)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text.replace("▁", " ")


_KEPT: list[PreTrainedTokenizerFast] = []


def _kept(factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if not _KEPT:
        _KEPT.append(open_tokenizer(folder(factory.mktemp("kept"))))
    return _KEPT[0]


def test_older_folders_list_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    found = folder(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del described["added_tokens_decoder"]
    described["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "added_tokens.json").write_text(json.dumps(_IM))
    assert open_tokenizer(found)("a<|im_end|>").input_ids == [1, 260, 271]


@pytest.mark.parametrize("spec", [{"remove_extra_whitespaces": True}, {"precompiled_charsmap": b"x"}])
def test_other_kinds_of_models_are_refused(tmp_path: Path, spec: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="of a kind"):
        open_tokenizer(folder(tmp_path, spec=spec))


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no tokenizer"):
        open_tokenizer(ModelFolder(tmp_path, {}))
    found = folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(WeightsError, match="no SentencePiece model"):
        open_tokenizer(found)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        open_tokenizer(found)


def test_a_vocabulary_without_the_tokens_of_pictures_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path, added={"<|im_end|>": 271, "<img>": 275}))
    with pytest.raises(WeightsError, match="lacks <IMG_CONTEXT>, </img>"):
        context_token_id(tokenizer, where="here")
    assert context_token_id(open_tokenizer(folder(tmp_path)), where="here") == 277


def test_a_tokenizer_longer_than_the_embedding(tmp_path: Path) -> None:
    """Only what a conversation can hold counts: an unused special token may lie outside."""
    form = ChatFormat(
        opening="<|im_start|>", bridge="", stop="<|im_end|>", again="", close="", image=("<img>", "</img>")
    )
    tokenizer = open_tokenizer(folder(tmp_path, added={**_IM, "<unused>": 279}))
    check_fits(tokenizer, form, 279, where="here")
    with pytest.raises(WeightsError, match=r"'<box>' \(278\) lie outside its 278 rows"):
        check_fits(tokenizer, form, 278, where="here")
    with pytest.raises(WeightsError, match=r"'<IMG_CONTEXT>' \(277\)"):
        check_fits(tokenizer, form, 277, where="here")


def test_native_files_give_the_same_ids(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder(tmp_path))
    form = ChatFormat(
        opening="<|im_start|>", bridge="", stop="<|im_end|>", again="", close="", image=("<img>", "</img>")
    )
    out = tmp_path / "native"
    out.mkdir()
    write_native(tokenizer, form, out)
    again = AutoTokenizer.from_pretrained(out)
    for text in ("abc  é<|im_end|>\n [X]", "", "</s>a", "<box>"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.start_image_token, again.end_image_token, again.context_image_token_id) == ("<img>", "</img>", 277)


@pytest.mark.golden
@pytest.mark.parametrize("language", ["internlm2", "phi3"])
def test_ids_of_the_sentencepiece_library(language: str, tmp_path: Path) -> None:
    """Recorded with sentencepiece 0.2.1 on random and nasty texts; Phi-3's as the parts behind a special token."""
    golden.tokenizer_folder(official.KINDS[language])
    tokenizer = open_tokenizer(official.folder(language, "Hermes-2", tmp_path))
    recorded = json.loads(_RECORDED.read_text(encoding="utf-8"))
    later = TextEncoder(tokenizer)._later
    for text, ids in zip(recorded["texts"], recorded[language], strict=True):
        assert later.encode(text, add_special_tokens=False).ids == ids, text
