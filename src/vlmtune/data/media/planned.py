"""The media of a row, pictures and pseudo-text alike, compared with what was planned or read once."""

from __future__ import annotations

from vlmtune.config.schema import MediaOptions
from vlmtune.data.media import embedding, video
from vlmtune.data.sample import Planned, pictures_of, pseudo_texts_of


def is_as_planned(media: Planned, options: MediaOptions) -> bool:
    """Whether every medium still has the size that it was planned with; from headers.

    Raises:
        DataError: one that cannot be opened.
    """
    shown = pictures_of(media)
    sizes = video.sizes([ref for ref, _ in shown], options)
    return sizes == [plan.size for _, plan in shown] and all(
        embedding.shape(ref) == plan.size for ref, plan in pseudo_texts_of(media)
    )


def decode(media: Planned, options: MediaOptions) -> None:
    """Reads every medium once, to be sure that each can be.

    Raises:
        DataError: a picture that cannot be decoded, pseudo-text with NaN or infinity.
        UsageError: PyAV is not installed.
    """
    video.decode([ref for ref, _ in pictures_of(media)], options)
    for ref, plan in pseudo_texts_of(media):
        embedding.rows(ref, plan.size)
