"""Whether rows may share a sequence or a padded batch without changing each other."""

from __future__ import annotations

import numpy as np

from vlmtune.config.schema import RunConfig
from vlmtune.errors import ConfigError
from vlmtune.models.family import OpenedFolder


def resolve_packing(config: RunConfig, opened: OpenedFolder) -> tuple[bool, str | None]:
    """Whether this run packs, and if it was asked to and cannot, why not.

    Raises:
        ConfigError: rows may not be padded together, but `train.micro_batch_size` says so.
    """
    reason = opened.why_not_packed
    limit = opened.shared_length
    packed = config.data.packing and reason is None
    if not packed and limit is not None and config.data.max_length > limit and config.train.micro_batch_size > 1:
        # The longest row of a batch would change the positions of the others (dynamic NTK, longrope).
        raise ConfigError(
            f"rows of up to {config.data.max_length:,} tokens cannot share a batch with this model: its position "
            f"scaling depends on the longest row of a batch beyond {limit:,} tokens",
            where="train.micro_batch_size",
            expected="1, or rows that are packed, where long ones have a pack to themselves",
            remedy=f"Set data.packing: true, or train.micro_batch_size: 1, or data.max_length: {limit} or less.",
        )
    return packed, reason if config.data.packing else None


def room_taken(num_tokens: np.ndarray, max_length: int, shared_length: int | None) -> np.ndarray:
    """int32 (n,): tokens of a pack that each row takes up: its own, or all where it would change those beside it.

    Args:
        shared_length: see `OpenedFolder.shared_length`; the same array comes back where no row is longer.
    """
    if shared_length is None or max_length <= shared_length or not (num_tokens > shared_length).any():
        return num_tokens
    return np.where(num_tokens > shared_length, np.maximum(num_tokens, max_length), num_tokens).astype(num_tokens.dtype)
