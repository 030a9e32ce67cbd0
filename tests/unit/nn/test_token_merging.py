"""Matching and merging against the same written out token by token; counts; what half precision may not lose."""

from __future__ import annotations

import itertools

import naive_merging
import pytest
import torch

from vlmtune.nn.token_merging import Matching, kept_tokens, match, merge, merged_per_layer, merged_tokens


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("protect_first", [True, False])
@pytest.mark.parametrize(("tokens", "r"), [(2, 1), (3, 1), (8, 3), (9, 4), (9, 100), (16, 7), (37, 5), (1, 4), (6, 0)])
def test_equals_merging_token_by_token(tokens: int, r: int, protect_first: bool) -> None:
    x, metric = drawn(3, tokens, 6).requires_grad_(), drawn(3, tokens, 4, seed=1)
    size = torch.randint(1, 9, (3, tokens), generator=torch.Generator().manual_seed(2)).double()
    found, sizes = merge(x, size, match(metric, r, protect_first=protect_first))
    expected = [naive_merging.merged(*one, r, protect_first=protect_first) for one in zip(x, size, metric, strict=True)]
    assert found.shape[1] == tokens - merged_tokens(tokens, r, protect_first=protect_first)
    torch.testing.assert_close(found, torch.stack([tokens for tokens, _ in expected]), rtol=1e-12, atol=1e-12)
    assert torch.equal(sizes, torch.stack([size for _, size in expected]))
    assert torch.equal(sizes.sum(1), size.sum(1)), "every patch is in one token"
    direction = drawn(*found.shape, seed=3)
    ours = torch.autograd.grad((found * direction).sum(), x, retain_graph=True)[0]
    theirs = torch.autograd.grad((torch.stack([one for one, _ in expected]) * direction).sum(), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_pair_changes_nothing() -> None:
    x, size = drawn(2, 5, 3), torch.ones(2, 5)
    assert match(x, 0) is None and match(x[:, :1], 7) is None
    assert merge(x, size, None) == (x, size)


def test_the_first_token_is_never_merged_away() -> None:
    """Even where it is the very same as its neighbour, and all others are far apart."""
    metric = torch.eye(8, dtype=torch.float64)[None].clone()
    metric[0, 1] = metric[0, 0]
    for r in range(1, 9):
        matching = match(metric, r)
        assert matching is not None and int(matching.kept[0, 0]) == 0 and 0 not in matching.merged


def test_keys_of_length_zero_are_like_nothing_and_break_nothing() -> None:
    matching = match(torch.zeros(1, 6, 3), 2)
    x, size = merge(drawn(1, 6, 2), torch.ones(1, 6, dtype=torch.float64), matching)
    assert x.isfinite().all() and x.shape == (1, 4, 2) and float(size.sum()) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_sizes_and_untouched_tokens_exactly(dtype: torch.dtype) -> None:
    """257 + 300 is no bfloat16 number, and 300 ones summed up in it are 256."""
    x, size = drawn(1, 4, 3, dtype=dtype), torch.tensor([[300.0, 257.0, 1.0, 3.0]])
    matching = Matching(*(torch.tensor([[index]]) for index in (1, 0, 0)))
    found, sizes = merge(x, size, matching)
    assert found.dtype == dtype and sizes.tolist() == [[1.0, 557.0, 3.0]]
    assert torch.equal(found[0, 0], x[0, 2]) and torch.equal(found[0, 2], x[0, 3])
    expected = (x[0, 0].double() * 300 + x[0, 1].double() * 257) / 557
    assert torch.equal(found[0, 1], expected.to(dtype))


def test_autocast_does_not_change_the_match() -> None:
    metric = drawn(4, 65, 16, dtype=torch.float32)
    plain = match(metric, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = match(metric, 20)
    assert plain is not None and inside is not None
    assert torch.equal(plain.merged, inside.merged) and torch.equal(plain.into, inside.into)


def test_nothing_of_the_match_has_a_gradient() -> None:
    metric = drawn(1, 9, 4).requires_grad_()
    x, size = merge(drawn(1, 9, 4), torch.ones(1, 9), match(metric, 3))
    assert not x.requires_grad and not size.requires_grad


def test_counts() -> None:
    """CLIP-L at 336 with 14-pixel patches: a tenth asked, 93 of 576 left at the feature layer (16.1 %)."""
    r = merged_per_layer(336, 336, patch=14, layers=24, ratio=0.1)
    assert (r, kept_tokens(576, r, merges=23), kept_tokens(576, r, merges=24)) == (21, 93, 72)
    assert merged_per_layer(336, 336, patch=14, layers=24, ratio=1.0) == 0
    assert merged_per_layer(45, 50, patch=8, layers=4, ratio=0.1) == 7, "pixels, not whole patches (30 of them: 6)"
    for patches, r, merges in itertools.product(range(1, 40), (0, 1, 5, 50), range(5)):
        kept = kept_tokens(patches, r, merges=merges)
        assert 1 <= kept <= patches and (r == 0) <= (kept == patches)
        x, size = drawn(1, patches + 1, 2), torch.ones(1, patches + 1)
        for _ in range(merges):
            x, size = merge(x, size, match(x, r))
        assert x.shape[1] == 1 + kept
