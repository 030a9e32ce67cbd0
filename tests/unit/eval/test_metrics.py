"""Metrics against hand-made cases and sacrebleu's own command line arithmetic."""

from __future__ import annotations

import pytest
import sacrebleu

from vlmtune.eval.metrics import exact, normalise, score


def test_exact_match_ignores_only_white_space_around() -> None:
    assert exact(" 7\n", "7")
    assert not exact("7.", "7") and not exact("Seven", "seven")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Yes.", "yes", True),
        ("It  is\na cat!", "it is a cat", True),
        ("３", "3", True),  # full width
        ("是的。", "是的", True),
        ("3.5", "35", False),  # a point in a number means something
        ("1,000", "1,000.", True),
        ("no", "not", False),
    ],
)
def test_normalised(a: str, b: str, same: bool) -> None:
    assert (normalise(a) == normalise(b)) is same


def test_scores_are_sacrebleus() -> None:
    said = ["the cat sat on the mat", "a dog", "three people stand here"]
    wanted = ["the cat sat on a mat", "a dog", "three people are standing here"]
    found = score(said, wanted)
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(said, [wanted], use_effective_order=True).score)
    assert found.exact_match == pytest.approx(1 / 3)
    assert "tok:13a" in found.signatures["bleu"]


def test_a_perfect_short_answer_is_perfect() -> None:
    found = score(["7", " 8"], ["7", "8 "])
    assert (found.exact_match, found.normalised_match) == (1, 1)
    assert found.bleu == pytest.approx(100) and found.chrf == pytest.approx(100)


def test_chinese_is_cut_into_characters() -> None:
    found = score(["图中有一只红色的猫坐在垫子上"], ["图中有一只黑色的猫坐在垫子上"])
    assert "tok:zh" in found.signatures["bleu"]
    assert 30 < found.bleu < 100


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError):
        score([], [])
