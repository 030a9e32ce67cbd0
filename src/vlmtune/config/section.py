"""The base of every part of the configuration, and what several parts share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PathText = Annotated[str, Field(min_length=1)]  # `config.load` makes it absolute


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ImageOptions(Section):
    """How pictures are cut; a field that is left out keeps the value of the model folder's preprocessor."""

    max_tiles: Annotated[int, Field(ge=1)] | None = None
    """Most tiles a picture may be cut into (InternVL: `max_patches`; the thumbnail is not counted)."""
    min_tiles: Annotated[int, Field(ge=1)] | None = None
    """Fewest tiles."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Largest area after resizing, in pixels, for models that keep the aspect ratio (Qwen-VL)."""
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    """Smallest area after resizing, in pixels."""
