"""What a resampler is fitted to: the labels of regions as tokens, and which regions are kept to measure it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from vlmtune.embed.codebook import PADDING_ID
from vlmtune.embed.regions import Page, Region
from vlmtune.errors import DataError, UsageError
from vlmtune.models.text import Segment, TextEncoder

HeldOutBy = Literal["page", "region"]

_LISTED = 20  # bad labels that a message shows


@dataclass(frozen=True, slots=True)
class Target:
    """ids: the tokens of the region's label, without padding."""

    page: Page
    region: Region
    ids: tuple[int, ...]


def targets_of(
    pages: Sequence[Page], text: TextEncoder, tokenizer: PreTrainedTokenizerBase, *, queries: int
) -> tuple[list[Target], list[str]]:
    """The regions with a label that a resampler can learn, page by page; and a sentence on each of the others.

    A label is tokenised as it would be in the middle of a prompt, where the rows of its region will stand: tokenizers
    that put a space before a first word put none. What looks like a special token is ordinary text.

    Args:
        queries: the most tokens that a label may have.
    """
    targets, bad = [], []
    unknown = tokenizer.unk_token_id
    for page in pages:
        for region in page.regions:
            ids = tuple(text.encode([Segment(region.label, False, False)], at_start=False)[0].tolist())
            if why := _why_not(region.label, ids, queries, unknown, tokenizer):
                bad.append(f"{page.json}: the region {region.box} {why}")
            else:
                targets.append(Target(page, region, ids))
    return targets, bad


def _why_not(
    label: str, ids: tuple[int, ...], queries: int, unknown: int | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A clause on why a label cannot be learned; empty if it can."""
    if not label.strip():
        return "has no label"
    if not ids:
        return f"has the label {label!r:.40}, of which the tokenizer makes nothing"
    if unknown is not None and unknown in ids:
        return f"has the label {label!r:.40}, which the tokenizer cannot write (it gives {tokenizer.unk_token})"
    if len(ids) > queries:
        return f"has the label {label!r:.40} of {len(ids)} tokens, and there are {queries} queries"
    return ""


def refuse_bad_labels(bad: Sequence[str], *, queries: int) -> None:
    """All labels that cannot be learned, in one message.

    Raises:
        DataError: there are some.
    """
    if not bad:
        return
    shown = "\n".join(f"  {line}" for line in bad[:_LISTED])
    more = f"\n  and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else ""
    raise DataError(
        f"{len(bad):,} label{'s' if len(bad) > 1 else ''} cannot be learned:\n{shown}{more}\n",
        expected=f"1 to {queries} tokens that the model has",
        remedy="Correct them, take more queries for long ones (--queries), or leave them out with --skip-bad-regions.",
    )


def refuse_tokens_without_direction(sigma: torch.Tensor, targets: Sequence[Target]) -> None:
    """
    Args:
        sigma: (vocabulary,), the deviations of the token embeddings.

    Raises:
        DataError: a label has a token that no row can be nearest to: beyond the embedding, or with one of one value.
    """
    known = {number for number, deviation in enumerate(sigma.tolist()) if deviation > 0}
    bad = [target for target in targets if not known.issuperset(target.ids)]
    if bad:
        first = bad[0]
        missing = min(set(first.ids) - known)
        raise DataError(
            f"the label {first.region.label!r:.40} has the token {missing}, of which the model has no embedding, or "
            f"one of a single value; so have {len(bad) - 1:,} other labels",
            where=str(first.page.json), expected="tokens that the model was trained with", remedy="Change the labels.",
        )  # fmt: skip


def choose_padding(sigma: torch.Tensor, tokenizer: PreTrainedTokenizerBase, targets: Sequence[Target]) -> int:
    """The token that queries are fitted to which a label leaves over, and whose rows are dropped afterwards.

    It is `PADDING_ID`, as in CalliReader, unless its embedding is of one value (transformers sets that of a pad token
    to zeros), which no row is ever nearest to, or a label has it (id 0 is a word of some tokenizers); then the first
    special token that is neither.

    Args:
        sigma: (vocabulary,), the deviations of the token embeddings.

    Raises:
        UsageError: there is none.
    """
    used = {number for target in targets for number in target.ids}
    special = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    for number in (PADDING_ID, *special):
        if number is not None and number < len(sigma) and sigma[number] > 0 and number not in used:
            return int(number)
    raise UsageError(
        "no special token of the model could stand for the end of a label: each has an embedding of one value, or is a "
        "label itself",
        where="vlmtune embed fit",
        remedy="Name a token that no label has: --padding-id ID.",
    )


def hold_out(targets: Sequence[Target], share: float, *, by: HeldOutBy, seed: int) -> list[bool]:
    """Which regions are not learned from, a share of them at least, drawn with `seed`.

    By page, no page has regions on both sides: regions of one page share hand, paper and light, so that others of the
    same page would be easier than any new page.

    Raises:
        UsageError: a share that leaves nothing on one side.
    """
    if share == 0:
        return [False] * len(targets)
    pages: dict[object, int] = {}
    keys = [id(target.page) if by == "page" else index for index, target in enumerate(targets)]
    numbers = [pages.setdefault(key, len(pages)) for key in keys]
    order = list(range(len(pages)))
    random.Random(seed).shuffle(order)
    sizes = Counter(numbers)
    held: set[int] = set()
    count = 0
    for number in order:
        if count >= share * len(targets):
            break
        held.add(number)
        count += sizes[number]
    found = [number in held for number in numbers]
    if all(found):
        raise UsageError(
            f"all {len(targets)} regions would be held out: they are on {len(pages)} page{'s' * (len(pages) > 1)}"
            if by == "page"
            else f"all {len(targets)} regions would be held out",
            where="--held-out",
            remedy="Annotate more pages, take a smaller share, or draw single regions: --held-out-by region.",
        )
    return found
