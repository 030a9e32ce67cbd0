"""The three kinds of sources: a file (or a list of files), a dataset of the hub, XTuner's three lists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from vlmtune.config.section import ImageOptions, PathText, Section


class Read(Section):
    """How the rows of a source are read; the same for every kind of source."""

    image: ImageOptions | None = None
    """How pictures of this source are cut, where it differs from `model.image`."""
    data_augment: bool = False
    """Show pictures as JPEGs of a random quality from 75 to 100 (seeded), as InternVL's loader does: there each tile
    has a quality of its own; other models' pictures are saved before they are cut."""
    replace_prefix: dict[Annotated[str, Field(min_length=1)], str] = {}
    """Beginnings of media paths and what to read instead: `{/data/old/: images/}`, a folder beside the YAML, which may
    then be read (in a tar: a folder of its members); empty text leaves a path that starts from `root`."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """The question of rows that have a caption, or an answer, and no question of their own; without a mark the media
    stand in front of it."""
    columns: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """Names that vlmtune knows (`question`, `answer`, `image`, `messages`, …) and the rows' own names for them:
    `{answer: label, image: photo}`; `meta.label` is the key `label` of the object `meta`."""
    unmarked_media: Literal["refuse", "front"] = "refuse"
    """What happens to a conversation that lists media and has no mark for any: refuse it, or put them in front of the
    first question, a newline behind each, as InternVL's loader does with a lone picture."""
    pseudo_text_token: Annotated[str, Field(min_length=1)] | None = "[UNUSED_TOKEN_140]"
    """The token that rows with `embedding` repeat in a question, once for each row of the file, where they do not write
    `<embedding>`; null leaves it text."""
    lone_turns: Literal["refuse", "drop"] = "refuse"
    """What happens to a row that begins with an answer or ends with a question: refuse it, or leave these turns out."""

    @field_validator("image")
    @classmethod
    def _one_size_of_tiles(cls, image: ImageOptions | None) -> ImageOptions | None:
        if image is not None and image.size is not None:
            raise ValueError(
                "size is the same for all sources, as their tiles are computed together; set model.image.size"
            )
        return image


MAX_REPEAT = 1_000_000  # more is a slip of the keyboard, and no memory holds the plan of such an epoch
MAX_CHOOSE = 2_000_000_000


class Mixed(Read):
    """How often the rows of a source come in an epoch: one of the three, else once."""

    repeat: Annotated[float, Field(gt=0, le=MAX_REPEAT)] | None = None
    """How often each row comes in an epoch (1 when nothing is said); 1.5 takes half of the rows twice, the other half
    in the next epoch. On a list of files it multiplies what the list says."""
    choose: Annotated[int, Field(ge=1, le=MAX_CHOOSE)] | None = None
    """Rows that an epoch takes, whatever the source holds: every row as evenly as possible, over epochs too."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the epoch's rows among all sources with a weight, which together give as many rows as they hold."""

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> Mixed:
        ways = {"repeat": self.repeat, "choose": self.choose, "weight": self.weight}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            names = f"{', '.join(given[:-1])} and {given[-1]}"
            raise ValueError(f"{names} say the same thing in different ways; give one of them")
        return self


def _one_or_several(value: Any) -> Any:
    """One mistake instead of one per form."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("is no path; expected a folder, a tar file, or a list of them")
    return value


class SourceConfig(Mixed):
    path: PathText
    """A .json list, a .jsonl file, an InternVL meta .json, an XComposer .txt list, a .parquet file, a folder that the
    `datasets` library wrote, or WebDataset .tar shards (`*` and `{000..012}` are understood)."""
    root: Annotated[PathText | tuple[PathText, ...], BeforeValidator(_one_or_several)] | None = None
    """Folder that relative media paths start from (several are tried in turn), or tar file(s) whose members they name
    (parts of a split tar are read as one); else the folder of `path`. A list's own paths are tried in it."""
    split: str | None = None
    """Split of a dataset folder (`train` when it has several)."""
    given_num: bool = True
    """Numbers in an XComposer .txt list are thousands of rows per epoch; false: they are ratios."""


class HubSource(Mixed):
    hub: Annotated[str, Field(min_length=1)]
    """A dataset repository on the hub, `owner/name`; fetched once, then read like a folder."""
    split: str | None = None
    """Split to read (`train` when it has several)."""
    data_files: tuple[str, ...] = ()
    """Patterns of the files to fetch; all when left out."""

    @model_validator(mode="before")
    @classmethod
    def _one_pattern_needs_no_list(cls, values: Any) -> Any:
        return _listed(values, ("data_files",), str)


class XTunerLists(Read):
    """Three lists of one length, as in XTuner's configs."""

    data_paths: Annotated[tuple[PathText, ...], Field(min_length=1)]
    """Annotation files."""
    image_folders: tuple[PathText | None, ...] = ()
    """Media folder of each file; null for rows without pictures. Left out: the folder of each file."""
    repeat_times: tuple[Annotated[float, Field(gt=0, le=MAX_REPEAT)], ...] = ()
    """How often each row of each file comes in an epoch, fractions included; once when left out."""

    @model_validator(mode="before")
    @classmethod
    def _one_file_needs_no_lists(cls, values: Any) -> Any:
        return _listed(values, ("data_paths", "image_folders", "repeat_times"), str | int | float)

    @model_validator(mode="after")
    def _one_length(self) -> XTunerLists:
        count = len(self.data_paths)
        for name, given in (("image_folders", len(self.image_folders)), ("repeat_times", len(self.repeat_times))):
            if given not in (0, count):
                each = "its folder, or null" if name == "image_folders" else "its number"
                raise ValueError(f"{name} has {given} entries, but data_paths has {count}; give every file {each}")
        return self


def _listed(values: Any, names: tuple[str, ...], kind: Any) -> Any:
    """`values` with every single one of `names` put in a list."""
    if not isinstance(values, dict):
        return values
    return {key: [value] if key in names and isinstance(value, kind) else value for key, value in values.items()}


SOURCE_KINDS: dict[str, type[Read]] = {"file": SourceConfig, "hub": HubSource, "lists": XTunerLists}
"""How a mistake in a source names its kind; the first key that a kind requires tells it from the others."""


def _kind_of_source(value: Any) -> str:
    if isinstance(value, dict):
        return "lists" if "data_paths" in value else "hub" if "hub" in value else "file"
    return "lists" if isinstance(value, XTunerLists) else "hub" if isinstance(value, HubSource) else "file"


AnySource = Annotated[
    Annotated[SourceConfig, Tag("file")] | Annotated[HubSource, Tag("hub")] | Annotated[XTunerLists, Tag("lists")],
    Discriminator(_kind_of_source),
]
