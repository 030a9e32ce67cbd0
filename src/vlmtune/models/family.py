"""What a model family is to the rest of the program.

A family is one object without state. Nothing outside `models/registry.py` names a family; everything else asks the
`OpenedFolder` that `models.load.open_folder` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlmtune.config.schema import ChatStyle, Component, ImageOptions, MediaOptions
from vlmtune.data.sample import BoxUnit, Encoded, MediaPlan, Retouch, Size
from vlmtune.models.text import TextEncoder
from vlmtune.weights.layout import WeightTable

NATIVE = "native"
"""The layout that transformers itself reads and writes."""
OFFICIAL = "official"
"""The layout of a model's publisher, where that is another."""

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFormat:
    """The text around the frames of one video.

    ::

        opening  before frame  joint  before frame  joint  before frame  close

    Filled in: in `opening` {count} (frames that are shown) and {duration} (of the film, H:MM:SS); in `before` {number}
    (from 1) and {time} (MM:SS).
    """

    opening: str = ""
    before: str = ""
    joint: str = ""
    close: str = ""
    count_in_words: bool = False
    """{count} as an English word; needs the package num2words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How a box stands in the text.

    template: with {x1}, {y1}, {x2} and {y2}; special tokens in it are special.
    unit: thousand: 0–1000 of the picture; pixels: of the picture after the family's resize; unit: 0–1 of the picture.
    decimals: digits after the point, with the unit `unit`; the others are whole numbers.
    """

    template: str = "[{x1}, {y1}, {x2}, {y2}]"
    unit: BoxUnit = "thousand"
    decimals: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """A chat template as data: the text around the contents, in the order in which it is laid down.

    ::

        opening                                   user  bridge  answer  close
        system_opening[0]  system  system_opening[1]  user  bridge  answer  again  user  bridge  answer  close

    A user content begins with `user_lead` when text comes first; an answer begins with `answer_lead`. A generation
    prompt ends after a `bridge`. `stop` ends an answer: `again` and `close` both begin with it. Trained are the
    answer's lead, its text and its `stop`; with `trains_close` also what `close` adds behind the last one.
    """

    opening: str
    prefix_ids: tuple[int, ...] = ()
    """Ids before the opening (a bos token that the tokenizer, not the template, adds)."""
    text_prefix_ids: tuple[int, ...] | None = None
    """`prefix_ids` of a conversation without pictures, where they differ."""
    repeats_prefix: bool = False
    """`prefix_ids` stand again before every text behind a picture."""
    system_opening: tuple[str, str] | None = None
    """Text before and after the system content; None when the template has no system role."""
    bare_opening: str | None = None
    """The opening of a conversation whose system text is empty; None where that stands between `system_opening`."""
    user_lead: str = ""
    bridge: str
    answer_lead: str = ""
    stop: str
    again: str
    close: str
    trains_close: bool = False
    image: tuple[str, str]
    """Text before and after a picture's ids."""
    images_first: bool = False
    """The template puts the pictures of a turn before its text, wherever they stood."""
    text_joint: str = ""
    """What the template puts between two texts of a turn (with `images_first`)."""
    block: tuple[str, str, str] | None = None
    """With `images_first`: text before and after all pictures of a turn together, and between them and the turn's text;
    None where each picture stands for itself."""
    image_joint: str = ""
    """With `block`: text between two pictures of a turn."""
    strips: bool = False
    """The template trims every text of a turn."""
    strips_ends: bool = False
    """The template trims the ends of a turn, and leaves the text beside pictures as it is."""
    runs_alone: bool = False
    """What stands between two special tokens or pictures is tokenised as a text of its own, with whatever the tokenizer
    puts before a first word; else as what follows in one text."""
    fold_newlines: bool = True
    """A newline beside an `<image>` mark belongs to the mark and is left to the template."""
    stop_ids: tuple[int, ...] = ()
    """Token ids at which generation ends."""
    frames: FrameFormat | None = None
    """What stands around the frames of a video; None: each frame stands as a picture of its own would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Name prefixes (of `named_parameters`, without the dot) that belong to each component."""

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    blocks: Mapping[Component, tuple[str, ...]] = field(default_factory=dict)
    """Prefixes of the transformer blocks inside a component: where LoRA on that component sits."""
    head: tuple[str, ...] = ("lm_head",)
    """The output head; it counts as language."""
    pictures_only: str | None = None
    """Regex over full names of parameters of the language component that only visual tokens reach."""
    undemanded: str | None = None
    """Regex over full names of parameters that train, but get a gradient from some rows only: nobody can demand one."""

    def of(self, parameter: str) -> Component | None:
        """The component of a parameter by its full name, the longest prefix winning; None if no prefix covers it."""
        found: tuple[int, Component] | None = None
        groups: tuple[tuple[Component, tuple[str, ...]], ...] = (
            ("vision", self.vision),
            ("projector", self.projector),
            ("language", self.language + self.head),
        )
        for component, prefixes in groups:
            for prefix in prefixes:
                inside = parameter == prefix or parameter.startswith(prefix + ".")
                if inside and (found is None or len(prefix) > found[0]):
                    found = (len(prefix), component)
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder on disk with its config.json, read once."""

    path: Path
    config: Mapping[str, Any]


class Family(Protocol):
    """The interface; tests/families/test_conformance.py is the definition of done for an implementation."""

    name: str

    def exif(self, folder: ModelFolder) -> Literal["apply", "ignore"]:
        """Whether the loaders that this folder's users come from turn photos as EXIF says."""
        ...

    def matches(self, folder: ModelFolder) -> bool:
        """Whether a folder is this family's; the first match in the registry wins."""
        ...

    def model_class(self, folder: ModelFolder) -> type[PreTrainedModel]: ...

    def config(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, spec: Any) -> PretrainedConfig:
        """The configuration of `model_class`, whatever layout the folder is in.

        Args:
            spec: of `media_spec`; a family may note in the configuration what later runs have to know of it.
        """
        ...

    def layout(self, folder: ModelFolder) -> str:
        """How the tensors of this folder are named and packed: ``native``, or one of `layouts`."""
        ...

    def layouts(self, folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
        """The layouts beside transformers' own that this model can be read from and written in.

        Under ``native``, how a native folder is written, where its files hold more than the model's tensors.

        config: as `config` gives it.
        """
        ...

    def home_layout(self, folder: ModelFolder) -> str:
        """The layout that whoever brought this model wants it back in: that of the folder which training began from."""
        ...

    def install(self, model: PreTrainedModel) -> None:
        """Puts hooks on a loaded model for what transformers' class does not do itself."""
        ...

    def companions(self, folder: ModelFolder) -> Mapping[str, bytes]:
        """Files by name, beside the usual ones, that a native checkpoint needs to go on as this folder would."""
        ...

    def write_files(self, opened: OpenedFolder, layout: str, out: Path) -> list[str]:
        """The files of a folder of `layout` beside its weights, so that others use the model as `opened` does.

        Returns:
            Sentences on what others will do in another way, whatever the files say.

        Raises:
            ExportError: the layout has no words for something that this model needs.
        """
        ...

    def components(self, folder: ModelFolder) -> Components: ...

    def tokenizer(self, folder: ModelFolder) -> PreTrainedTokenizerBase: ...

    def media_spec(self, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, media: MediaOptions) -> Any:
        """Everything that decides how pictures become tiles and ids; picklable; only the family looks inside.

        Raises:
            ConfigError: an option in `media.image`, or `media.video.slow_fast`, without effect on this model.
        """
        ...

    def chat(
        self,
        folder: ModelFolder,
        tokenizer: PreTrainedTokenizerBase,
        text: TextEncoder,
        spec: Any,
        style: ChatStyle | None,
    ) -> ChatFormat:
        """
        Args:
            style: `model.chat`; the model's own format without.

        Raises:
            WeightsError: the folder says no format, or one that is not known.
            ConfigError: a style that this model has not.
        """
        ...

    def boxes(self, folder: ModelFolder) -> BoxFormat:
        """How the model was taught to write boxes."""
        ...

    def about_pictures(self, spec: Any) -> str | None:
        """What a reader of `vlmtune info` could not guess about this model's pictures; None if nothing."""
        ...

    def lays_end_to_end(self, spec: Any) -> bool:
        """Whether the pictures of a micro batch go through the tower as one row: its first axis is then no picture."""
        ...

    def plan(self, sizes: Sequence[Size], spec: Any, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
        """All pictures of one sample at once (some families divide a tile budget among them); sizes only.

        frames: for each of them its number in the video that it is a frame of, as `MediaRef.frame`, or None; all None
            when left out. The numbers ascend within a video.
        """
        ...

    def span_ids(self, plan: MediaPlan, spec: Any) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (num_tokens,) of one picture and a boolean (num_tokens,) mask of the placeholders among them."""
        ...

    def pixels(
        self, picture: PIL.Image.Image, plan: MediaPlan, spec: Any, retouch: Retouch | None = None
    ) -> dict[str, torch.Tensor]:
        """One picture as model inputs; must agree with its plan.

        retouch: a change to each tile (families whose own loaders change tiles), or to the picture before it is cut.
        """
        ...

    def view(self, pixels: dict[str, torch.Tensor], spec: Any) -> list[PIL.Image.Image]:
        """What the tower sees, as pictures again: tiles in their order; nothing where that cannot be told."""
        ...

    def collate_pixels(self, pixels: Sequence[dict[str, torch.Tensor]], spec: Any) -> dict[str, torch.Tensor]:
        """The pictures of a micro batch as keyword arguments of the model's forward, in sequence order."""
        ...

    def position_inputs(
        self, rows: Sequence[Sequence[Encoded]], pixels: Sequence[Sequence[dict[str, torch.Tensor]]], spec: Any
    ) -> dict[str, torch.Tensor]:
        """Extra inputs that depend on positions (multi-axis RoPE, token types), for rows of packed samples; or {}.

        `rows[b]` are the samples laid end to end in row b. The values are padded to the longest row on the right.
        """
        ...

    def prompt_inputs(self, prompts: Sequence[Encoded], spec: Any) -> dict[str, torch.Tensor]:
        """Extra arguments of `generate` beside ids, mask and pixels, padded on the left; or {}."""
        ...

    def why_not_packed(self, config: PretrainedConfig) -> str | None:
        """None if packed rows equal unpacked ones for this model, else the reason why it must pad."""
        ...

    def shared_length(self, config: PretrainedConfig) -> int | None:
        """Most tokens that a row may have to share a pack or a padded batch with others; None if any may.

        Models whose position scaling looks at the longest row of a batch change their neighbours beyond this length.
        """
        ...

    def lawful_zeros(self, config: PretrainedConfig) -> str | None:
        """A regex over full names of parameters without gradient by construction (behind the feature layer)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFolder:
    """A model folder opened without its weights: all that check, preview, the loader and prompts need. Picklable."""

    folder: ModelFolder
    family: Family
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    layout: str
    """See `Family.layout`."""
    layouts: Mapping[str, WeightTable]
    """See `Family.layouts`."""
    spec: Any
    text: TextEncoder
    chat: ChatFormat
    components: Components
    why_not_packed: str | None
    shared_length: int | None
    media: MediaOptions
    """How pictures and videos are read; `exif` is decided."""
    boxes: BoxFormat

    @property
    def table(self) -> WeightTable | None:
        """How the tensors of this folder are named and packed; None for transformers' own layout."""
        return None if self.layout == NATIVE else self.layouts[self.layout]

    def with_image(self, options: ImageOptions | None) -> OpenedFolder:
        """The same folder for a source that cuts its pictures in its own way."""
        if options is None:
            return self
        image = self.media.image.model_copy(update=options.model_dump(exclude_none=True))
        media = self.media.model_copy(update={"image": image})
        return replace(self, spec=self.family.media_spec(self.folder, self.tokenizer, media), media=media)
