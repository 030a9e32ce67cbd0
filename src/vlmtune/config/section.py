"""The base of every part of the configuration, and what several parts share."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails


def _no_zero_byte(path: str) -> str:
    if "\0" in path:
        raise ValueError("holds a zero byte, which no path can")
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_no_zero_byte)]  # `config.load` makes it absolute


MAX_TILES = 1000  # every grid up to this many tiles is compared; a slip of the keyboard would look like a hang


def _number(annotation: Any) -> str | None:
    """pydantic's error for what is no such number, where a type asks for one and not for true or false as well."""
    kinds = _kinds(annotation)
    if bool in kinds or not kinds & {int, float}:
        return None
    return "float_type" if float in kinds else "int_type"


def _kinds(annotation: Any) -> set[Any]:
    """The types in a union."""
    inner = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else ()
    return {kind for one in inner for kind in _kinds(one)} if inner else {annotation}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _flags_are_no_numbers(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """pydantic takes true for 1 wherever a number is asked for."""
        faults = [
            InitErrorDetails(type=fault, loc=(name,), input=value)
            for name, value in (values.items() if isinstance(values, dict) else ())
            if isinstance(value, bool) and name in cls.model_fields
            if (fault := _number(cls.model_fields[name].annotation))
        ]
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return handler(values)


class ImageOptions(Section):
    """How pictures are cut; a field that is left out keeps the value of the model folder's preprocessor."""

    max_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None
    """Most tiles a picture may be cut into, the thumbnail not counted (InternVL: `max_dynamic_patch`, in a `-hf` folder
    `max_patches`; XComposer2 4khd: `hd_num`, 16 when left out). In an official InternVL folder the pictures of a row
    share them."""
    min_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None
    """Fewest tiles."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Edge of a tile in pixels, or of the square where pictures are not cut (official InternVL: `force_image_size`;
    XComposer2 but 4khd: `img_size`)."""
    thumbnail: bool | None = None
    """Show a picture of several tiles once more as a whole (official InternVL: `use_thumbnail`)."""
    fit: Literal["stretch", "pad_square", "keep_aspect"] | None = None
    """How a picture that is not cut is brought to the tower's size: stretched to the square; put on a square of the
    mean colour first (official InternVL: `pad2square`, with `max_tiles: 1`; XTuner: `pad_image_to_square`); or with its
    shorter side brought to the square's and the other in proportion (LLaVA models only; AuroraCap:
    `keep_aspect_ratio`). As the model folder's preprocessor does when left out; XTuner's folders pad."""
    token_merge_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a picture's tokens that merging in the vision tower is to leave, for LLaVA models with a CLIP or SigLIP
    tower (AuroraCap: `visual_token_merge_ratio`, `token_kept_ratio`); 1 merges nothing. More are left than the share
    says (16 % for 0.1 in CLIP-L), since a layer merges half of its tokens at most and the last layers are not used:
    `vlmtune info` shows the numbers."""
    swap_sides: bool | None = None
    """With `fit: keep_aspect`: give a picture its height as width and its width as height, as AuroraCap's loader does,
    which twists it; false when left out, and true for XTuner's folders."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Largest area after resizing, in pixels, for models that keep the aspect ratio (Qwen-VL)."""
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    """Smallest area after resizing, in pixels."""
