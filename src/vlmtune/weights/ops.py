"""What may happen to a tensor on its way from a file to the model: operations with exact inverses.

None of them changes a number of the model, so that a tensor comes back bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Op(Protocol):
    """`split` takes the tensor of a file apart into parameters; `join` is its inverse."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor: ...

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Shapes of the parts of a tensor of shape `whole`.

        Raises:
            ValueError: a tensor of this shape cannot be taken apart.
        """
        ...

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        """Shape of the tensor that `join` makes of such parts."""
        ...


@dataclass(frozen=True, slots=True)
class Keep:
    """One tensor, one parameter, as it is."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor,)

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (only,) = parts
        return only

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        return (whole,)

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        return parts[0]


KEEP = Keep()


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` equal parts stacked along dimension 0, such as a ViT's qkv (3·d, d)."""

    count: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.contiguous() for part in tensor.chunk(self.count))

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        import torch

        return torch.cat(parts)

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        if not whole or whole[0] % self.count:
            raise ValueError(f"{self.count} equal parts")
        return ((whole[0] // self.count, *whole[1:]),) * self.count

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        return _stacked(parts)


@dataclass(frozen=True, slots=True)
class SplitGQA:
    """InternLM2's wqkv: per group of key heads its query heads, then one key head and one value head.

    whole (groups · (queries + 2) · head_dim, …) -> query (groups · queries · head_dim, …), key and value
    (groups · head_dim, …). Source: the layout ``(h gs d)`` in OpenGVLab's modeling_internlm2.py, gs = 2 + queries.
    """

    groups: int
    queries: int
    head_dim: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = tensor.shape[1:]
        heads = tensor.reshape(self.groups, self.queries + 2, self.head_dim, *rest)
        parts = (heads[:, : self.queries], heads[:, self.queries], heads[:, self.queries + 1])
        return tuple(part.reshape(-1, *rest).contiguous() for part in parts)

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        import torch

        query, key, value = parts
        rest = query.shape[1:]
        heads = [
            query.reshape(self.groups, self.queries, self.head_dim, *rest),
            key.reshape(self.groups, 1, self.head_dim, *rest),
            value.reshape(self.groups, 1, self.head_dim, *rest),
        ]
        return torch.cat(heads, dim=1).reshape(-1, *rest)

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        rows = self.groups * (self.queries + 2) * self.head_dim
        if not whole or whole[0] != rows:
            raise ValueError(f"{rows} rows: {self.groups} groups of {self.queries} + 2 heads of {self.head_dim}")
        query = (self.groups * self.queries * self.head_dim, *whole[1:])
        key = (self.groups * self.head_dim, *whole[1:])
        return query, key, key

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        return _stacked(parts)


@dataclass(frozen=True, slots=True)
class MeanRows:
    """A table over a vocabulary that has `count` rows more on disk than in the model; they are the mean of the others.

    Of an output head, a mean row gives the mean of the other logits, which is never the largest: greedy answers stay
    what they were.
    """

    count: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor[: -self.count],)

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        import torch

        (rows,) = parts
        mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
        return torch.cat([rows, mean.expand(self.count, *rows.shape[1:])])

    def shapes(self, whole: Shape) -> tuple[Shape, ...]:
        return ((whole[0] - self.count, *whole[1:]),)

    def whole(self, parts: tuple[Shape, ...]) -> Shape:
        ((rows, *rest),) = parts
        return (rows + self.count, *rest)


def _stacked(parts: tuple[Shape, ...]) -> Shape:
    return (sum(part[0] for part in parts), *parts[0][1:])
