"""Packed attention against a float64 softmax written out by hand."""

from __future__ import annotations

import pytest
import torch

from vlmtune.nn.attention import packed_attention, packed_mask


class Owner(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(1, h, T, d) each -> (1, T, h, d), causal within each sample and blind beyond it."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(sum(lengths))
    visible = (sample[:, None] == sample[None]) & (order[:, None] >= order[None])
    scores = (query @ key.transpose(2, 3)) / query.shape[-1] ** 0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[7], [3, 4], [1, 1, 9, 2], [5, 1]])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_the_formula(lengths: list[int], key_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, key_heads, sum(lengths), 8, dtype=torch.float64) for _ in range(2))
    found, _ = packed_attention(Owner(4 // key_heads), query, key, value, None, pack_lengths=lengths)
    expected = by_hand(query, key, value, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad((found * direction).sum(), query)[0]
    theirs = torch.autograd.grad((expected * direction).sum(), query)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_lengths_that_do_not_fill_the_row_are_refused() -> None:
    x = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="pack of 4 tokens, but 5 queries"):
        packed_attention(Owner(1), x, x, x, None, pack_lengths=[2, 2])


def test_padding_and_caches_keep_the_usual_mask() -> None:
    plain = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    assert packed_mask(**plain) is None
    padded = packed_mask(**plain, attention_mask=torch.tensor([[True, True, True, False]]))
    assert padded is not None and not padded[0, 0, :, 3].any()
    cached = packed_mask(batch_size=1, q_length=2, kv_length=5, q_offset=3, allow_is_causal_skip=False)
    assert cached is not None and cached[0, 0].sum(-1).tolist() == [4, 5]
