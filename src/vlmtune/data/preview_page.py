"""What the HTML preview shows: rows token by token, and each picture as the model sees it.

The tiles come out of the tensors that training would feed, so a wrong resize, crop or colour is seen here. The page has
a budget of bytes, dealt evenly among rows, then pictures, then tiles: a tile that does not fit is stored smaller, and
left out and counted when even that is too much.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
import PIL.Image

from vlmtune.config.schema import RunConfig
from vlmtune.data.boxes import box_on, write_box
from vlmtune.data.collate import row_pixels
from vlmtune.data.encode import with_origin
from vlmtune.data.media import video
from vlmtune.data.preview import Kind, decode, films, media_counts, runs
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.sample import Box, Encoded, MediaPlan, MediaRef, Sample, Size
from vlmtune.errors import DataError
from vlmtune.models.family import BoxFormat, OpenedFolder

PAGE_BYTES = 3_300_000
"""For all pictures of a page together; as text in the page they take a third more."""
MOST_TOKENS = 6_000
"""Text tokens of one row that the page shows."""
MOST_TILES = 64
"""Tiles of one picture that the page shows."""

_EDGES = (896, 640, 448, 320, 224, 160, 112)  # what a picture is scaled down to while it is too large
_LOSSLESS = 160  # up to this edge a picture is kept to the pixel, if it fits
_LONGEST_CHARACTER = 8  # ids that are held back at most until they make whole characters


@dataclass(frozen=True, slots=True)
class Token:
    """text: what a token says; a character that takes several ids comes once, with all of them."""

    text: str
    ids: tuple[int, ...]
    special: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring positions: tokens of text, or the tag of pictures. media: the pictures' numbers in the row."""

    kind: Kind
    tokens: tuple[Token, ...] = ()
    tag: str = ""
    media: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownBox:
    """A box in pixels of the shown picture."""

    left: float
    top: float
    width: float
    height: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPicture:
    """One picture or frame of a row. index: among its media, from 0; number: among its pictures, from 1.

    tiles: encoded pictures (PNG or JPEG), the first of `num_tiles`. grid: (columns, rows) that they were cut from, a
    thumbnail after them; (0, 0) when they stand in none. whole: the whole picture under its boxes, (width, height)
    `whole_size`. is_scaled: some tiles are smaller here than the model gets them.
    """

    index: int
    number: int | None
    name: str
    size: Size
    num_tokens: int
    num_tiles: int
    tile_size: Size
    tiles: tuple[bytes, ...]
    grid: tuple[int, int] = (0, 0)
    is_scaled: bool = False
    whole: bytes | None = None
    whole_size: Size = (0, 0)
    boxes: tuple[ShownBox, ...] = ()
    frame: int | None = None
    time: float | None = None

    @property
    def num_left_out(self) -> int:
        return self.num_tiles - len(self.tiles)


@dataclass(frozen=True, slots=True)
class ShownFilm:
    number: int
    name: str
    pictures: tuple[ShownPicture, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """One row of the page; with an `error` nothing else is known of it."""

    origin: str
    error: str = ""
    id: str | None = None
    num_tokens: int = 0
    num_trained: int = 0
    counts: tuple[str, ...] = ()
    too_long: bool = False
    stretches: tuple[Stretch, ...] = ()
    num_tokens_left_out: int = 0
    pictures: tuple[ShownPicture, ...] = ()
    films: tuple[ShownFilm, ...] = ()


def show_rows(numbers: Sequence[int], encoder: RowEncoder, max_length: int) -> Iterator[ShownRow]:
    """The rows with these numbers; a bad one comes with its error."""
    for number in numbers:
        try:
            yield _row(number, encoder, max_length, PAGE_BYTES // len(numbers))
        except DataError as error:
            origin = encoder.corpus.origin(number)
            yield ShownRow(origin=origin, error=error.reason if error.where == origin else str(error))


def facts(config: RunConfig, encoder: RowEncoder) -> list[tuple[str, str]]:
    """What of the configuration decides how rows look, as (name, value)."""
    opened = encoder.opened_for(0)
    found = [
        ("model", f"{config.model.path} ({opened.folder.config.get('model_type')}, family {opened.family.name})"),
        ("max_length", f"{config.data.max_length:,} tokens, {'packed' if config.data.packing else 'not packed'}"),
    ]
    options = config.model.image.model_dump(exclude_none=True)
    if options:
        found.append(("image", ", ".join(f"{name} {value}" for name, value in options.items())))
    for source in encoder.corpus.sources:
        own = source.options.image.model_dump(exclude_none=True) if source.options.image else {}
        words = [
            f"{len(source):,} row{'' if len(source) == 1 else 's'}",
            *(f"{name} {value}" for name, value in own.items()),
        ]
        found.append(("source", f"{source.name}: {', '.join(words)}"))
    return found


def _row(number: int, encoder: RowEncoder, max_length: int, budget: int) -> ShownRow:
    opened = encoder.opened(number)
    sample, encoded = encoder.row(number)
    stretches, left_out = _stretches(encoded, opened)
    try:
        pictures = _pictures(sample, encoded, opened, budget)
    except DataError as error:
        raise error if error.where else with_origin(error, sample.origin) from error
    videos, by_index = films(encoded), {picture.index: picture for picture in pictures}
    framed = {index for film in videos for index in film.media}
    return ShownRow(
        origin=sample.origin,
        id=sample.id,
        num_tokens=encoded.num_tokens,
        num_trained=encoded.num_trained,
        counts=tuple(media_counts(encoded)),
        too_long=encoded.num_tokens > max_length,
        stretches=stretches,
        num_tokens_left_out=left_out,
        pictures=tuple(picture for picture in pictures if picture.index not in framed),
        films=tuple(
            ShownFilm(film.number, _name(encoded.media[film.media[0]][0]), tuple(by_index[i] for i in film.media))
            for film in videos
        ),
    )


def _stretches(encoded: Encoded, opened: OpenedFolder) -> tuple[tuple[Stretch, ...], int]:
    """The sequence, and how many tokens of its text are beyond what a page shows."""
    found, shown, left_out = [], 0, 0
    numbers = _numbers(encoded)
    for run in runs(encoded, opened):
        if run.kind == "image":
            tag = run.text[1:-1]
            number = numbers.get(run.media[0])
            tag = tag if number is None else tag.replace("image", f"picture {number}", 1)
            found.append(Stretch("image", tag=tag, media=run.media))
            continue
        ids = encoded.input_ids[run.start : run.start + min(run.num_tokens, MOST_TOKENS - shown)]
        shown, left_out = shown + len(ids), left_out + run.num_tokens - len(ids)
        if len(ids):
            found.append(Stretch(run.kind, tokens=tuple(_tokens(ids, opened, is_first=run.start == 0))))
    return tuple(found), left_out


def _numbers(encoded: Encoded) -> dict[int, int]:
    """The number of each medium that is a picture of its own, from 1."""
    media = enumerate(encoded.media)
    pictures = [index for index, (ref, plan) in media if ref.frame is None and not plan.is_pseudo_text]
    return {index: number for number, index in enumerate(pictures, 1)}


def _tokens(ids: np.ndarray, opened: OpenedFolder, *, is_first: bool) -> Iterator[Token]:
    special = set(opened.tokenizer.all_special_ids)
    start = 0
    for end in range(1, len(ids) + 1):
        text = decode(opened, ids[start:end], is_first=is_first and start == 0)
        if "\ufffd" in text and end < len(ids) and end - start < _LONGEST_CHARACTER:
            continue  # a part of a character
        own = tuple(ids[start:end].tolist())
        yield Token(text, own, special=len(own) == 1 and own[0] in special)
        start = end


def _pictures(sample: Sample, encoded: Encoded, opened: OpenedFolder, budget: int) -> list[ShownPicture]:
    media = [(index, ref, plan) for index, (ref, plan) in enumerate(encoded.media) if not plan.is_pseudo_text]
    if not media:
        return []
    share = budget // len(media)
    times, numbers = _times(encoded, opened), _numbers(encoded)
    boxes = _boxes(sample, encoded)
    plans = [encoded.media[index][1] for index in numbers]
    boxed = {index: encoded.media[index] for index in boxes}
    wholes = dict(zip(boxed, video.open_pictures([ref for ref, _ in boxed.values()], opened.media), strict=True))
    found = []
    for (index, ref, plan), pixels in zip(media, row_pixels(encoded, opened), strict=True):
        tiles = opened.family.view(pixels, encoded.spec)
        picture = ShownPicture(
            index=index,
            number=numbers.get(index),
            name=_name(ref),
            size=plan.size,
            num_tokens=plan.num_tokens,
            num_tiles=plan.num_tiles,
            tile_size=tiles[0].size if tiles else (0, 0),
            tiles=(),
            grid=_grid(plan, tiles),
            frame=ref.frame,
            time=times.get(index),
        )
        if index in boxes:
            picture = _with_boxes(picture, wholes[index], plans, boxes[index], opened.boxes, share // 2)
        kept, scaled = _encoded_tiles(tiles, share - len(picture.whole or b""))
        found.append(replace(picture, tiles=kept, is_scaled=scaled))
    return found


def _times(encoded: Encoded, opened: OpenedFolder) -> dict[int, float]:
    """Seconds from the start of the film, for each frame whose film has a rate."""
    times: dict[int, float] = {}
    for film in films(encoded):
        ref = encoded.media[film.media[0]][0]
        rate = video.header(replace(ref, frame=None), opened.media).rate
        if rate:
            times.update({index: (encoded.media[index][0].frame or 0) / rate for index in film.media})
    return times


def _boxes(sample: Sample, encoded: Encoded) -> dict[int, list[Box]]:
    """The boxes of each medium; their own numbers count the pictures without the frames."""
    pictures = list(_numbers(encoded))
    found: dict[int, list[Box]] = {}
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Box) and part.picture < len(pictures):
                found.setdefault(pictures[part.picture], []).append(part)
    return found


def _with_boxes(
    shown: ShownPicture,
    picture: PIL.Image.Image,
    plans: Sequence[MediaPlan],
    boxes: Sequence[Box],
    style: BoxFormat,
    room: int,
) -> ShownPicture:
    """plans: of the row's pictures, frames not among them. room: bytes for the picture."""
    plan = plans[boxes[0].picture]
    size = plan.resized or plan.size
    whole = _encode(picture.resize(size, PIL.Image.Resampling.BICUBIC), room, max(size))
    placed = []
    for box in boxes:
        x1, y1, x2, y2 = box_on(plan, box)
        label = f"{write_box(box, plans, style)}: ({x1:.0f}, {y1:.0f}) – ({x2:.0f}, {y2:.0f}) of {size[0]}×{size[1]}"
        placed.append(ShownBox(left=x1, top=y1, width=x2 - x1, height=y2 - y1, label=label))
    return replace(shown, whole=whole and whole[0], whole_size=size, boxes=tuple(placed))


def _grid(plan: MediaPlan, tiles: Sequence[PIL.Image.Image]) -> tuple[int, int]:
    """(columns, rows) that the tiles were cut from, if the resized picture tells; a thumbnail may follow them."""
    if plan.resized is None or len(tiles) < 2:
        return 0, 0
    columns, rows = (whole // part for whole, part in zip(plan.resized, tiles[0].size, strict=True))
    return (columns, rows) if columns * rows in (len(tiles), len(tiles) - 1) else (0, 0)


def _encoded_tiles(tiles: Sequence[PIL.Image.Image], budget: int) -> tuple[tuple[bytes, ...], bool]:
    """The first tiles, as long as they fit, and whether any of them had to be scaled down."""
    found: list[bytes] = []
    tiles = tiles[:MOST_TILES]
    edge = max((max(tile.size) for tile in tiles), default=0)
    for number, tile in enumerate(tiles):
        fitting = _encode(tile, budget // (len(tiles) - number), edge)
        if fitting is None:
            break
        data, edge = fitting
        found.append(data)
        budget -= len(data)
    return tuple(found), any(max(tile.size) > edge for tile in tiles[: len(found)])


def _encode(picture: PIL.Image.Image, most: int, edge: int) -> tuple[bytes, int] | None:
    """The picture as a file of at most `most` bytes and its longer edge: `edge` or less; None if nothing helps."""
    if max(picture.size) <= min(edge, _LOSSLESS):
        data = _saved(picture, "PNG")
        if len(data) <= most:
            return data, edge
    for smaller_edge in (edge, *(other for other in _EDGES if other < edge)):
        smaller = picture.copy()
        smaller.thumbnail((smaller_edge, smaller_edge))
        data = _saved(smaller, "JPEG")
        if len(data) <= most:
            return data, smaller_edge
    return None


def _saved(picture: PIL.Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **({"quality": 84} if form == "JPEG" else {}))
    return file.getvalue()


def _name(ref: MediaRef) -> str:
    return ref.path if ref.inline is not None else PurePath(ref.path).name
