"""The one sample type that flows: Sample (what a row says) -> Encoded (ids and labels) -> Batch (tensors).

Every data format is a pure function from a row to `Sample`; every stage downstream knows only these types.
Sizes of pictures are ``(width, height)`` in pixels, sizes of tensors ``(H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import PIL.Image
    import torch

Role = Literal["system", "user", "assistant"]
BoxUnit = Literal["pixels", "thousand", "unit"]
Size = tuple[int, int]  # (width, height)
Retouch = Callable[["PIL.Image.Image"], "PIL.Image.Image"]  # a change to an RGB picture that keeps its size
IGNORED = -100  # label of a position that is not trained (torch.nn.functional.cross_entropy's default)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRef:
    """Where the bytes of a picture or video are.

    A whole file, a slice of one (a member of a tar), or bytes that stood in the row itself (data URI, parquet cell).
    """

    path: str
    """Absolute path of the file; for `inline` bytes a name for messages."""
    offset: int = 0
    """First byte."""
    length: int | None = None
    """Number of bytes; None reads to the end of the file."""
    inline: bytes | None = None
    """The encoded bytes themselves; `path`, `offset` and `length` are then not read."""
    more: tuple[tuple[str, int, int], ...] = ()
    """(path, offset, length) of the bytes that follow in other files: a member that straddles parts of a split tar."""
    frame: int | None = None
    """The picture is this frame of the video, counted from 0; None for a picture file."""
    key: str | None = None
    """Pseudo-text is the tensor of this name in a safetensors file; None for a file with one tensor."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    ref: MediaRef


@dataclass(frozen=True, slots=True)
class Video:
    ref: MediaRef


@dataclass(frozen=True, slots=True)
class PseudoText:
    """Embeddings from a file, (n, d) in the space of the language model's input, which stand in place of words."""

    ref: MediaRef
    run: int | None = None
    """How many reserved tokens stood in its place in the text; None where a mark stood."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on a picture, in a question or an answer; the model's own way of writing it is laid down for it."""

    corners: tuple[float, float, float, float]
    """(x1, y1, x2, y2): left, top, right, bottom; 0 ≤ x1 ≤ x2 and 0 ≤ y1 ≤ y2."""
    picture: int = 0
    """Which picture: its number among the row's `Sample.images`, from 0."""
    unit: BoxUnit = "pixels"
    """pixels of the picture as it is looked at (`data.exif`), before any resize; 0–1000 of it; or 0–1 of it."""


Part = Text | Image | Video | PseudoText | Box


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]

    @property
    def is_blank(self) -> bool:
        """Whether nothing is said: white space at most, and no box."""
        return not self.text.strip() and not any(isinstance(part, Box) for part in self.parts)

    @property
    def text(self) -> str:
        """The text parts joined; media and boxes leave no trace."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row: system? (user assistant)+, in order. `data.rows.adapters` guarantees the order of the roles."""

    messages: tuple[Message, ...]
    origin: str
    """`coco.jsonl:124` (line), `coco.json:124` (row, counted from 1), `x.parquet:124`, `shard.tar:name`."""
    id: str | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Image))


@dataclass(frozen=True, slots=True)
class Span:
    """A run of placeholder positions in the ids; the truth about where media stand, never a search by token id."""

    start: int
    length: int
    kind: Literal["image", "video", "pseudo_text"]
    index: int
    """Which medium of the sample (a picture may own several spans, one per tile row)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPlan:
    """What a picture of a given size, or a file of pseudo-text, becomes; known from the header alone.

    `layout` is the family's own description (tiles, grid, rows and columns); only the family reads it.
    """

    size: Size
    """Of the picture; of pseudo-text (d, n): how long a row is, and how many there are."""
    num_tokens: int
    """Ids that the picture takes in the sequence, separators included; a row of pseudo-text takes one."""
    num_tiles: int
    layout: tuple[int, ...]
    is_frame: bool = False
    """A frame of a video: families that cut pictures into tiles leave it whole."""
    resized: Size | None = None
    """(width, height) of the whole picture after the family's resize; None when the model sees only a part of it."""
    is_pseudo_text: bool = False


Planned = tuple[tuple[MediaRef, MediaPlan], ...]
"""The media of a row in their order, frames of videos included: where the bytes of each are, and what it becomes."""


def pictures_of(media: Planned) -> Planned:
    """Those that are pictures or frames."""
    return tuple(medium for medium in media if not medium[1].is_pseudo_text)


def pseudo_texts_of(media: Planned) -> Planned:
    """Those that are pseudo-text."""
    return tuple(medium for medium in media if medium[1].is_pseudo_text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A row without the ids of its media.

    ids: int32 (n,), of the text with its special tokens. trained: bool (n,).
    places: for each medium, how many of `ids` stand before it. media: where each one's bytes are, and its plan.
    """

    ids: np.ndarray
    trained: np.ndarray
    places: tuple[int, ...]
    media: Planned

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + sum(plan.num_tokens for _, plan in self.media)

    @property
    def num_trained(self) -> int:
        """Positions that give a loss; the first position of a row has nothing before it to predict it."""
        first = bool(len(self.trained)) and bool(self.trained[0]) and 0 not in self.places
        return int(np.count_nonzero(self.trained)) - first


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A sample as ids, labels and references to media; no pixels.

    input_ids, labels: int32 (T,); labels hold IGNORED outside the trained segments and are not shifted.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    spans: tuple[Span, ...]
    media: Planned
    origin: str
    spec: Any = None
    """The family's picture settings that the media were planned with; a source may have its own."""
    retouch: Callable[[int], Retouch] | None = None
    """What is done to the pictures of medium i of the row (`data_augment`); None leaves them as they are."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def at_pictures(self) -> np.ndarray:
        """Where features of pictures and frames go: bool (T,)."""
        return self._at(pseudo_text=False)

    @property
    def at_pseudo_text(self) -> np.ndarray:
        """Where rows of pseudo-text go: bool (T,)."""
        return self._at(pseudo_text=True)

    def _at(self, *, pseudo_text: bool) -> np.ndarray:
        found = np.zeros(len(self.input_ids), dtype=bool)
        for span in self.spans:
            if (span.kind == "pseudo_text") == pseudo_text:
                found[span.start : span.start + span.length] = True
        return found

    @property
    def num_trained(self) -> int:
        """Positions that give a loss: a label at position 0 has nothing before it to predict it."""
        return int((self.labels[1:] != IGNORED).sum())


def stacked(masks: Sequence[np.ndarray], *, left: bool = False) -> np.ndarray:
    """Masks of rows, each bool (T,), as bool (B, L): False in the padding, on the right or on the `left`."""
    found = np.zeros((len(masks), max(map(len, masks))), dtype=bool)
    for row, mask in zip(found, masks, strict=True):
        start = len(row) - len(mask) if left else 0
        row[start : start + len(mask)] = mask
    return found


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro batch, ready for the model.

    inputs: keyword arguments of the model's forward: input_ids (1, L) packed or (B, L) padded, position_ids or
        attention_mask, pixel values, grids, `use_cache=False`, and `logits_to_keep`, a boolean (B, L) mask of the
        positions whose next token is trained.
    targets: int64 (n,): the trained next tokens, in the order in which the mask picks hidden states.
    stand_in: pixel inputs of one smallest picture, for a micro batch without pictures (see `nn.stand_in`); or None.
    """

    inputs: dict[str, Any]
    targets: torch.Tensor
    stand_in: dict[str, torch.Tensor] | None = None
    num_tokens: int = 0
    """Tokens without padding."""
    num_images: int = 0
    origins: tuple[str, ...] = field(default=())
