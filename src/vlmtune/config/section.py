"""The base of every part of the configuration, and what several parts share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _no_zero_byte(path: str) -> str:
    if "\0" in path:
        raise ValueError("holds a zero byte, which no path can")
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_no_zero_byte)]  # `config.load` makes it absolute


MAX_TILES = 1000  # every grid up to this many tiles is compared; a slip of the keyboard would look like a hang


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ImageOptions(Section):
    """How pictures are cut; a field that is left out keeps the value of the model folder's preprocessor."""

    max_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None
    """Most tiles a picture may be cut into, the thumbnail not counted (InternVL: `max_dynamic_patch`, in a `-hf` folder
    `max_patches`). In an official InternVL folder the pictures of a row share them."""
    min_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None
    """Fewest tiles."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Edge of a tile in pixels (official InternVL: `force_image_size`)."""
    thumbnail: bool | None = None
    """Show a picture of several tiles once more as a whole (official InternVL: `use_thumbnail`)."""
    fit: Literal["stretch", "pad_square"] | None = None
    """How a picture that is not cut becomes a square: stretched, or on a square of the mean colour (official InternVL:
    `pad2square`). With `max_tiles: 1`."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Largest area after resizing, in pixels, for models that keep the aspect ratio (Qwen-VL)."""
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    """Smallest area after resizing, in pixels."""
