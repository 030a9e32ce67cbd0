"""TextEncoder against the tokenizer's own ids of the whole text."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmtune.models.text import Segment, TextEncoder


def sentencepiece_like(scheme: str = "first", *, eats_right: bool = False) -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<unk>", "▁", "▁a", "a", "b", "ab", "▁ab", "c", ":", "\n", "▁c", "<", "s", ">", "/", "x"]
    words += ["▁abc", "abc"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "c"), ("▁ab", "c"), ("ab", "c")]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    bpe.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True, rstrip=eats_right)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def template(text: str, trained: bool = False) -> Segment:
    return Segment(text, trained=trained, template=True)


def words(text: str, trained: bool = False) -> Segment:
    return Segment(text, trained=trained, template=False)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_ids_equal_the_whole_text(scheme: str) -> None:
    tokenizer = sentencepiece_like(scheme)
    segments = [
        template("<s>"),
        words("ab c"),
        template("\nx:"),
        words(" abc", trained=True),
        template("</s>", trained=True),
    ]
    segments += [template("a: "), words("b")]
    ids, _ = TextEncoder(tokenizer).encode(segments, at_start=True)
    assert ids.tolist() == tokenizer("<s>ab c\nx: abc</s>a: b", add_special_tokens=False).input_ids


def test_only_the_first_word_of_the_sequence_gets_a_space() -> None:
    encoder = TextEncoder(sentencepiece_like("first"))
    start, _ = encoder.encode([words("ab")], at_start=True)
    later, _ = encoder.encode([words("ab")], at_start=False)
    assert start.tolist() != later.tolist()


def test_special_text_in_words_is_plain() -> None:
    tokenizer = sentencepiece_like()
    encoder = TextEncoder(tokenizer)
    ids, _ = encoder.encode([template("<s>"), words("a</s>b"), template("</s>")], at_start=True)
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "a</s>b"


def test_a_special_token_swallows_the_space_that_it_swallows_in_the_whole_text() -> None:
    tokenizer = sentencepiece_like("never", eats_right=True)
    ids, trained = TextEncoder(tokenizer).encode([template("</s>\n"), words(" ab", trained=True)], at_start=True)
    whole = tokenizer("</s>\n ab", add_special_tokens=False).input_ids
    assert len(whole) == 2, "the tokenizer under test does not swallow"
    # The prompt before the answer ends with the token alone, whatever white space the answer begins with.
    assert ids.tolist() == whole
    assert trained.tolist()[0] is False and all(trained.tolist()[1:])


def test_an_answer_begins_behind_a_border() -> None:
    tokenizer = sentencepiece_like("never")
    encoder = TextEncoder(tokenizer)
    prompt, _ = encoder.encode([template("x:"), words("a")], at_start=True)
    ids, trained = encoder.encode([template("x:"), words("a"), words("bc", trained=True)], at_start=True)
    assert ids.tolist()[: len(prompt)] == prompt.tolist()
    assert trained.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_text_behind_a_trained_one_in_the_same_token_is_trained() -> None:
    encoder = TextEncoder(sentencepiece_like("never"))
    ids, trained = encoder.encode([words("a", trained=True), words("b")], at_start=True)
    assert len(ids) == 1 and trained.tolist() == [True]


def test_pickles() -> None:
    encoder = TextEncoder(sentencepiece_like())
    again = pickle.loads(pickle.dumps(encoder))
    segments = [template("<s>"), words("abc </s> c", trained=True)]
    assert encoder.encode(segments, at_start=True)[0].tolist() == again.encode(segments, at_start=True)[0].tolist()


def test_nothing_gives_nothing() -> None:
    ids, trained = TextEncoder(sentencepiece_like()).encode([words("")], at_start=True)
    assert len(ids) == len(trained) == 0
