"""How well predictions fit references: exact match, and BLEU and chrF as sacrebleu computes them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """exact_match and normalised_match: shares of the rows, 0–1. bleu and chrf: sacrebleu's corpus scores, 0–100."""

    exact_match: float
    normalised_match: float
    bleu: float
    chrf: float
    signatures: dict[str, str]
    """How sacrebleu computed its scores, for comparing them with published ones."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def score(predictions: Sequence[str], references: Sequence[str]) -> Metrics:
    """Compare each prediction with its one reference; both are stripped first.

    Raises:
        ValueError: no rows, or not the same number of both.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    said = [text.strip() for text in predictions]
    wanted = [text.strip() for text in references]
    bleu = BLEU(tokenize=_tokenizer(wanted), effective_order=True)
    chrf = CHRF()
    return Metrics(
        exact_match=_share([exact(a, b) for a, b in zip(said, wanted, strict=True)]),
        normalised_match=_share([normalise(a) == normalise(b) for a, b in zip(said, wanted, strict=True)]),
        bleu=bleu.corpus_score(said, [wanted]).score,
        chrf=chrf.corpus_score(said, [wanted]).score,
        signatures={"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
    )


def exact(prediction: str, reference: str) -> bool:
    """Equal but for white space around them."""
    return prediction.strip() == reference.strip()


def normalise(text: str) -> str:
    """Without case, punctuation, and differences of white space and of Unicode width: what a reader would call the same
    answer.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    # A point or comma between digits is part of a number, not punctuation.
    text = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", text)
    return " ".join(text.split())


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's Chinese tokeniser when most letters are Han: the default one would see each sentence as one word."""
    letters = [char for text in references for char in text if char.isalpha()]
    han = sum("\u4e00" <= char <= "\u9fff" for char in letters)
    return "zh" if han * 2 > len(letters) else "13a"
