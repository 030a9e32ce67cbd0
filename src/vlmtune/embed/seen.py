"""What the frozen tower and projector see of regions: computed once and kept, where it fits into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import PIL.Image
import torch

from vlmtune.embed.encoder import CropFeatures, crops_of
from vlmtune.embed.labels import Target
from vlmtune.files import free_memory
from vlmtune.progress import track

_SHARE_OF_MEMORY = 0.5


class Seen:
    """The visual tokens of regions by their numbers.

    Attributes:
        kept: whether they lie in memory; else the regions go through the tower whenever they are asked for.
        nbytes: what all of them take.
    """

    def __init__(self, features: CropFeatures, targets: Sequence[Target], *, batch_size: int) -> None:
        """
        Raises:
            DataError: a page that cannot be decoded.
        """
        self._features = features
        self._tokens: torch.Tensor | None = None
        self._crops: list[PIL.Image.Image] = []
        self.kept = True
        self.nbytes = 0
        crops = track(_crops(targets), total=len(targets), label="Looking at the regions")
        at = 0
        while part := list(itertools.islice(crops, batch_size)):
            if self.kept:
                found = self._look(part)
                if self._tokens is None:
                    self._make_room(found, len(targets))
            if self._tokens is None:
                self._crops += part
            else:
                self._tokens[at : at + len(part)] = found.cpu()
            at += len(part)

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        """float32 (len(numbers), n, d), on the model's device."""
        if self._tokens is None:
            return self._look([self._crops[number] for number in numbers]).float()
        return self._tokens[list(numbers)].to(self._features.embedding.device, torch.float32)

    @torch.no_grad()
    def _look(self, crops: Sequence[PIL.Image.Image]) -> torch.Tensor:
        return self._features([self._features.pixels(crop) for crop in crops])

    def _make_room(self, first: torch.Tensor, count: int) -> None:
        self.nbytes = count * first[0].numel() * first.element_size()
        free = free_memory()
        self.kept = free is None or self.nbytes <= _SHARE_OF_MEMORY * free
        if self.kept:
            self._tokens = torch.empty(count, *first.shape[1:], dtype=first.dtype)


def _crops(targets: Sequence[Target]) -> Iterator[PIL.Image.Image]:
    """The regions cut out of their pages, each page being opened once."""
    for _, group in itertools.groupby(targets, key=lambda target: id(target.page)):
        members = list(group)
        yield from crops_of(members[0].page.open(), [target.region for target in members])
