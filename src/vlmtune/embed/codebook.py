"""The token embeddings of a language model as a codebook: what word a row stands for, and the way back to its scale.

Embeddings of tokens differ in scale. A resampler is fitted to *normalised* ones, each row less its mean over the hidden
axis and divided by its deviation, and what it gives is brought back with mean and deviation of the nearest token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmtune.errors import WeightsError

PADDING_ID = 0
"""Labels shorter than the number of queries were padded with this id in CalliReader's training (`<unk>` there): a row
that is nearest to it stands for nothing."""

_CHUNK = 16384  # tokens compared at once: bounds the memory of the similarities and of the float32 copies
_LEAST_NORM = 1e-12  # as torch.nn.functional.normalize has it


@dataclass(frozen=True, slots=True)
class Nearest:
    """ids: int64, the nearest token of each row; cosines: float32, how near it is. Both of the rows' leading shape."""

    ids: torch.Tensor
    cosines: torch.Tensor


class Codebook:
    """
    Args:
        normed: (vocabulary, d), the normalised token embeddings, in any floating dtype.
        mu, sigma: (vocabulary,), what was taken off a row and what it was divided by.

    Raises:
        WeightsError: shapes that do not belong together; NaN or infinity.
    """

    def __init__(self, normed: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, *, where: str = "codebook") -> None:
        mu, sigma = mu.flatten().float(), sigma.flatten().float()
        if normed.ndim != 2 or not normed.is_floating_point() or not len(normed) == len(mu) == len(sigma) > 0:
            raise WeightsError(
                f"the codebook has the shape {tuple(normed.shape)}, its means {tuple(mu.shape)} and its deviations "
                f"{tuple(sigma.shape)}",
                where=where,
                expected="(tokens, d), (tokens,) and (tokens,)",
            )
        if not all(bool(tensor.isfinite().all()) for tensor in (normed, mu, sigma)):
            raise WeightsError("the codebook holds NaN or infinity", where=where)
        self.normed, self.mu, self.sigma = normed, mu, sigma
        self._lengths = torch.cat([part.float().norm(dim=1) for part in normed.split(_CHUNK)]).clamp_min(_LEAST_NORM)

    def __len__(self) -> int:
        return len(self.normed)

    @property
    def dim(self) -> int:
        return self.normed.shape[1]

    @staticmethod
    @torch.no_grad()
    def of_embedding(
        weight: torch.Tensor,
        mu: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        *,
        where: str = "codebook",
    ) -> Codebook:
        """The codebook of an input embedding (vocabulary, d), in its dtype.

        Args:
            mu, sigma: (vocabulary,), where they are recorded; else `statistics`. Rows that the embedding has beyond
                theirs (padding of the vocabulary) are left out.
        """
        if mu is None or sigma is None:
            mu, sigma = statistics(weight)
        if mu.numel() > len(weight):
            raise WeightsError(
                f"there are means of {mu.numel()} tokens, and the model has {len(weight)}", where=where,
                remedy="Take the model that the encoder was fitted for.",
            )  # fmt: skip
        weight = weight.detach()[: mu.numel()]
        mean, deviation = (value.flatten()[:, None].to(weight.device, torch.float32) for value in (mu, sigma))
        # A row of one value (an unused token) has no deviation; it becomes zeros, which are near to nothing.
        inverse = torch.where(deviation == 0, 0.0, 1 / deviation)
        normed = torch.empty_like(weight)
        for start in range(0, len(weight), _CHUNK):
            part = slice(start, start + _CHUNK)
            normed[part] = (weight[part].float() - mean[part]) * inverse[part]
        return Codebook(normed, mu, sigma, where=where)

    def to(self, device: torch.device) -> Codebook:
        if self.normed.device == self.mu.device == device:
            return self
        return Codebook(self.normed.to(device), self.mu.to(device), self.sigma.to(device))

    @torch.no_grad()
    def nearest(self, rows: torch.Tensor) -> Nearest:
        """The token of the greatest cosine for each row of (…, d), compared in float32; the first of equal ones."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(_LEAST_NORM)
        best = torch.full((len(flat),), -torch.inf, device=flat.device)
        ids = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            cosines, places = (flat @ self.normed[part].float().T / self._lengths[part]).max(dim=1)
            better = cosines > best
            best, ids = torch.where(better, cosines, best), torch.where(better, places + start, ids)
        return Nearest(ids.reshape(rows.shape[:-1]), best.reshape(rows.shape[:-1]))

    @torch.no_grad()
    def restored(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """rows (n, d) times the deviations of `ids` (n,) plus their means, float32 (n, d)."""
        return rows.float() * self.sigma[ids][:, None] + self.mu[ids][:, None]


@torch.no_grad()
def statistics(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each row of an embedding (vocabulary, d): float32 (vocabulary,) both.

    The deviation is that of the row as a whole (divided by d, not d − 1), so that normalised rows have the length √d.
    """
    means, deviations = [], []
    for part in weight.detach().split(_CHUNK):
        deviation, mean = torch.std_mean(part.float(), dim=1, correction=0)
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
