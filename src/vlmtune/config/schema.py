"""The run configuration: frozen, typed, unknown keys refused. This is the only declaration of every option.

`config.load` turns YAML and ``key=value`` overrides into a `RunConfig` whose paths are absolute.
No torch here: ``--help`` and a YAML check must be instant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlmtune.config.section import ImageOptions, PathText, Section
from vlmtune.config.sources import AnySource
from vlmtune.config.sources import HubSource as HubSource
from vlmtune.config.sources import Mixed as Mixed
from vlmtune.config.sources import Read as Read
from vlmtune.config.sources import SourceConfig as SourceConfig
from vlmtune.config.sources import XTunerLists as XTunerLists

FORMAT_VERSION = 1

Component = Literal["vision", "projector", "language"]
ChatStyle = Literal["official", "xtuner", "newline"]
COMPONENTS: tuple[Component, ...] = ("vision", "projector", "language")


class VideoOptions(Section):
    """Which frames of a video become pictures; eight spread evenly when neither is given."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    """Frames spread evenly from the first to the last; both ends are among them, see `last_frame`."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second of the film instead of a number of frames."""
    last_frame: bool = True
    """With `num_frames`: the last frame is always shown, as AuroraCap's reader does, so that 1 gives two frames; with
    false, 1 gives the first alone."""
    slow_fast: bool | None = None
    """Show the first frame of a video with all its tokens, and merge those of the others
    (`model.image.token_merge_ratio`); as the model folder says when left out, else false. The only frame of a video is
    merged."""

    @model_validator(mode="after")
    def _one_rule(self) -> VideoOptions:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("num_frames and fps are two ways to choose frames; give one of them")
        return self


MAX_IMAGE_PIXELS = 178_956_970  # Pillow opens nothing larger than twice its warning limit


class MediaOptions(Section):
    """How pictures and videos are read: what a run and a session have to agree on. Not written in a YAML as such."""

    image: ImageOptions = ImageOptions()
    """`model.image`."""
    video: VideoOptions = VideoOptions()
    """`model.video`."""
    boxes: Literal["thousand", "pixels", "unit"] | None = None
    """`model.boxes`."""
    chat: ChatStyle | None = None
    """`model.chat`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """`data.max_image_pixels`."""
    exif: Literal["apply", "ignore"] | None = None
    """`data.exif`."""


class ModelConfig(Section):
    path: PathText
    """Folder of the pretrained model (or a hub id, which needs the network)."""
    image: ImageOptions = ImageOptions()
    """How pictures are cut."""
    video: VideoOptions = VideoOptions()
    """Which frames of a video are seen."""
    boxes: Literal["thousand", "pixels", "unit"] | None = None
    """How boxes are written in the text: 0–1000 of the picture, pixels after the resize, or 0–1; the model's own
    convention when left out."""
    chat: ChatStyle | None = None
    """Another form of the conversation than the model's own, which is taken when this is left out. `xtuner`, for
    InternVL in its official layout: as XTuner trains it (another system text, and all pictures of a turn in front of
    its text); `official` is the form that is taken anyway. For InternLM-XComposer2, `official`: as its own `chat`
    prompts (a system turn, and a bos before every stretch of text), which are not those it was trained with; `newline`:
    as its fine-tuning scripts lay rows down with transformers 4.34 or later, a newline before the last `</s>`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""


class FullTuning(Section):
    """Train whole components; those not named are frozen."""

    method: Literal["full"] = "full"
    """All weights of the chosen components."""
    train: tuple[Component, ...] = COMPONENTS
    """Components that are trained in full."""
    learning_rates: dict[Component, Annotated[float, Field(gt=0)]] = {}
    """Learning rate per component where it differs from `train.learning_rate`."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path rate of the last vision layer, rising linearly from 0 at the first: so often a tile skips one of the
    layer's branches in training, whether the tower itself trains or not."""
    partial_lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of partial LoRA (InternLM-XComposer2) that are dropped in training, whether it trains itself
    or is frozen under an adapter; the official scripts have 0.05 either way."""

    @model_validator(mode="after")
    def _something_trains(self) -> FullTuning:
        if not self.train:
            raise ValueError("no component is trained; name at least one of vision, projector, language")
        _rates_belong_to_trained(self.learning_rates, set(self.train))
        return self


class LoraTuning(Section):
    """Train low-rank adapters through PEFT, and whole components beside them if named."""

    method: Literal["lora", "dora", "rslora", "qlora"] = "lora"
    """The kind of adapter; qlora is LoRA on a base whose Linear layers are kept in 4 bits (NF4) while it trains."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    ranks: dict[Component, Annotated[int, Field(ge=1)]] = {}
    """Rank per component where it differs from `rank`, such as `{vision: 4}`; the head counts as language."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is multiplied by alpha ÷ rank (rslora: by alpha ÷ √rank); twice the rank of each component when left
    out."""
    alphas: dict[Component, Annotated[float, Field(gt=0)]] = {}
    """Alpha per component where it differs from `alpha`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] = ("language",)
    """Components (every Linear of their blocks), `head`, or suffixes of module names."""
    train: tuple[Component, ...] = ()
    """Components that are trained in full beside the adapter."""
    learning_rates: dict[Component, Annotated[float, Field(gt=0)]] = {}
    """Learning rate per component where it differs from `train.learning_rate`."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path rate of the last vision layer, rising linearly from 0 at the first: so often a tile skips one of the
    layer's branches in training, whether the tower itself trains or not."""
    partial_lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of partial LoRA (InternLM-XComposer2) that are dropped in training, whether it trains itself
    or is frozen under an adapter; the official scripts have 0.05 either way."""
    native_base: PathText | None = None
    """Folder of the base in the native layout, for an adapter on an official folder whose class is this program's own
    (InternLM-XComposer2). It is written there once if it is absent; the adapter names it as its base, so that PEFT's
    `AutoPeftModelForCausalLM.from_pretrained(adapter)` works after `import vlmtune.models`."""

    @model_validator(mode="before")
    @classmethod
    def _one_target_needs_no_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("targets"), str):
            values = {**values, "targets": (values["targets"],)}
        return values

    @model_validator(mode="after")
    def _targets_are_not_trained_twice(self) -> LoraTuning:
        if not self.targets:
            raise ValueError("targets is empty; name a component, `head`, or a module suffix")
        twice = sorted(set(self.targets) & set(self.train))
        if twice:
            raise ValueError(f"{', '.join(twice)} stands in both targets and train; a component has one or the other")
        for name, chosen in (("ranks", self.ranks), ("alphas", self.alphas)):
            if all(target in (*COMPONENTS, "head") for target in self.targets):  # a suffix may hit any component
                carrying = {"language" if target == "head" else target for target in self.targets}
                if idle := sorted(set(chosen) - carrying):
                    raise ValueError(f"{name} names {', '.join(idle)}, which carries no adapter; add it to targets")
        return self


def _rates_belong_to_trained(rates: dict[Component, float], trained: set[Component]) -> None:
    idle = sorted(set(rates) - trained)
    if idle:
        raise ValueError(f"learning_rates names {', '.join(idle)}, which is not trained")


class DataConfig(Section):
    sources: Annotated[tuple[AnySource, ...], Field(min_length=1)]
    eval: tuple[AnySource, ...] = ()
    """Held-out sources, as under `sources`, but each row comes once: `repeat`, `choose` and `weight` are refused."""
    allow: tuple[PathText, ...] = ()
    """Folders outside the roots that absolute media paths may point into."""
    max_length: Annotated[int, Field(ge=8)] = 4096
    """Longest row, and size of a pack, in tokens."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a row longer than `max_length`: refuse the run, or drop the row and count it."""
    packing: bool = True
    """Put several rows in one sequence, isolated from each other."""
    group_by_length: bool = False
    """Draw the rows of a step from those of like length, so that less is padded; without packing only. The loss of a
    step then follows its length, and its curve is rougher."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens to rows that cannot be trained: refuse the run, or drop them, list them and count them."""
    max_bad_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of bad rows over which a run is refused although `bad_rows` says drop."""
    prepared: PathText | None = None
    """Folder of the prepared rows (see `vlmtune prepare`); `.prepared` beside the run folder when left out."""
    exif: Literal["apply", "ignore"] | None = None
    """Whether a photo is turned as its EXIF orientation says; the model family's own habit when left out."""
    max_image_pixels: Annotated[int, Field(ge=1, le=MAX_IMAGE_PIXELS)] = MAX_IMAGE_PIXELS
    """Pictures with more pixels than this are refused as decompression bombs; Pillow opens none above the default."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode pictures, and that prepare rows; 0 does it in the main process."""

    @model_validator(mode="after")
    def _packs_need_no_like_lengths(self) -> DataConfig:
        if self.group_by_length and self.packing:
            raise ValueError(
                "data.group_by_length saves padding, and packs have none; set data.packing: false beside it, or leave "
                "it out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_source_needs_no_list(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in ("sources", "eval"):
                if isinstance(values.get(key), dict):
                    values = {**values, key: (values[key],)}
        return values


class EarlyStopping(Section):
    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations without an improvement of the eval loss after which training stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest drop of the eval loss that counts as an improvement."""


class TrainConfig(Section):
    output_dir: PathText | None = None
    """Run folder; `runs/<name of the YAML>` beside the YAML when left out."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the rows; parts of one are allowed."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    global_batch_size: Annotated[int, Field(ge=1)] | None = 16
    """Rows per optimizer step over all devices; accumulation is derived from it. Null with `global_batch_tokens`."""
    global_batch_tokens: Annotated[int, Field(ge=8)] | None = None
    """Tokens per optimizer step instead of rows: a step takes this many ÷ `data.max_length` packs, filled over the
    whole epoch; needs packing."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Rows per device and forward pass; with packing a micro batch is one pack and this is not used."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: down to 0 along a cosine or a line, or constant."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay of matrices; vectors (biases, norms) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running-average coefficients."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on a GPU that has it and float32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] | None = None
    """How several processes share the work; left out: single for one process, ddp for several."""
    seed: int = 0
    """Decides the order of the rows, which of them a fraction takes, and the first values of adapters."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two lines of metrics."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; once per epoch when left out."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; with every evaluation (or epoch) when left out."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Latest checkpoints that are kept beside the best one."""
    early_stopping: EarlyStopping | None = None
    """Stop when the eval loss no longer falls; off when left out."""
    first_step_proof: bool = True
    """After the first step, require a finite, non-zero gradient in every trained tensor."""
    extra: dict[str, Any] = {}
    """Further arguments of transformers.TrainingArguments; a name that vlmtune sets itself is refused."""

    @model_validator(mode="before")
    @classmethod
    def _tokens_take_the_place_of_rows(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("global_batch_tokens") is not None:
            values = {"global_batch_size": None, **values}
        return values

    @model_validator(mode="after")
    def _one_global_batch(self) -> TrainConfig:
        if (self.global_batch_size is None) == (self.global_batch_tokens is None):
            given = "are both null" if self.global_batch_size is None else "say the same thing in different ways"
            raise ValueError(
                f"global_batch_size and global_batch_tokens {given}; give one of them, and null for the other"
            )
        return self


class EvalConfig(Section):
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest generated answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows generated together."""


class RunConfig(Section):
    version: Literal[1] = 1
    """Format of this file."""
    model: ModelConfig
    tuning: Annotated[FullTuning | LoraTuning, Field(discriminator="method")] = FullTuning()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _early_stopping_needs_eval(self) -> RunConfig:
        if self.train.early_stopping and not self.data.eval:
            raise ValueError("train.early_stopping needs data.eval: without held-out rows there is nothing to watch")
        return self

    @model_validator(mode="after")
    def _steps_in_tokens_need_packs(self) -> RunConfig:
        if self.train.global_batch_tokens is not None and not self.data.packing:
            raise ValueError(
                "train.global_batch_tokens needs data.packing: true, as such a step is made of packs; without packing "
                "set train.global_batch_size"
            )
        return self

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """The datasets that are named as repositories of the hub."""
        sources = (*self.data.sources, *self.data.eval)
        return tuple(source.hub for source in sources if isinstance(source, HubSource))

    @property
    def media(self) -> MediaOptions:
        """How pictures and videos are read."""
        return MediaOptions(
            image=self.model.image,
            video=self.model.video,
            boxes=self.model.boxes,
            chat=self.model.chat,
            max_image_pixels=self.data.max_image_pixels,
            exif=self.data.exif,
        )

    @model_validator(mode="after")
    def _four_bits_are_not_sharded(self) -> RunConfig:
        if self.tuning.method == "qlora" and self.train.strategy not in (None, "single", "ddp"):
            raise ValueError(
                f"tuning.method qlora does not go with train.strategy {self.train.strategy}: 4-bit layers are not "
                "sharded; leave the strategy out, or set ddp"
            )
        return self
