"""Operations on tensors: written out element by element, and both ways."""

from __future__ import annotations

import pytest
import torch

from vlmtune.weights.ops import KEEP, Chunk, MeanRows, Op, SplitGQA


def test_a_fused_attention_is_cut_group_by_group() -> None:
    """Two groups of three query heads, one key and one value head each, of two rows."""
    rows = torch.arange(2 * 5 * 2).float()
    query, key, value = SplitGQA(groups=2, queries=3, head_dim=2).split(rows[:, None].expand(-1, 4))
    assert query[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert key[:, 0].tolist() == [6, 7, 16, 17]
    assert value[:, 0].tolist() == [8, 9, 18, 19]


def test_equal_parts() -> None:
    parts = Chunk(3).split(torch.arange(6))
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("op", [KEEP, Chunk(3), SplitGQA(groups=3, queries=2, head_dim=4)])
@pytest.mark.parametrize("shape", [(48,), (48, 5)])
def test_every_operation_has_an_exact_inverse_and_knows_its_shapes(op: Op, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    parts = op.split(tensor)
    assert torch.equal(op.join(parts), tensor)
    assert tuple(tuple(part.shape) for part in parts) == op.shapes(shape)
    assert op.whole(op.shapes(shape)) == shape


def test_rows_beyond_the_vocabulary_are_the_mean_of_the_others() -> None:
    rows, op = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), MeanRows(3)
    whole = op.join((rows,))
    assert whole.tolist() == [[1, 2], [3, 6], [2, 4], [2, 4], [2, 4]]
    assert torch.equal(op.split(whole)[0], rows)
    assert op.shapes((5, 2)) == ((2, 2),) and op.whole(((2, 2),)) == (5, 2)
