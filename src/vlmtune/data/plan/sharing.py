"""Whether rows may share a sequence or a padded batch without changing each other."""

from __future__ import annotations

from vlmtune.config.schema import RunConfig
from vlmtune.errors import ConfigError
from vlmtune.models.family import OpenedFolder


def resolve_packing(config: RunConfig, opened: OpenedFolder) -> tuple[bool, str | None]:
    """Whether this run packs, and if it was asked to and cannot, why not.

    Raises:
        ConfigError: rows may not even be padded together, but `train.micro_batch_size` says so.
    """
    reason = opened.why_not_packed
    limit = opened.shared_length
    if limit is not None and config.data.max_length > limit:
        # The longest row of a batch would change the positions of the others (dynamic NTK, longrope).
        reason = f"its position scaling depends on the longest row of a batch beyond {limit:,} tokens"
        if config.train.micro_batch_size > 1:
            raise ConfigError(
                f"rows of up to {config.data.max_length:,} tokens cannot share a batch with this model: {reason}",
                where="train.micro_batch_size",
                remedy=f"Set train.micro_batch_size: 1, or data.max_length: {limit} or less.",
            )
    return config.data.packing and reason is None, reason if config.data.packing else None
