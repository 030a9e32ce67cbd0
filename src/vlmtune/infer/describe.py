"""Facts about a model without its weights: family, chat format, parameters by component, what pictures cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.data.boxes import write_box
from vlmtune.data.lay import lay
from vlmtune.data.media.video import Film
from vlmtune.data.sample import Box, MediaRef, Message, Size, Video
from vlmtune.infer.locate import Located
from vlmtune.models.family import ChatFormat, OpenedFolder
from vlmtune.models.load import open_folder
from vlmtune.weights.names import name_table, skeleton
from vlmtune.weights.shards import Shards, dtype_name, read_header
from vlmtune.weights.strict import demanded, unread

_WHOLE, _BOX = (640, 480), Box((64, 48, 320, 240))
SIZES: tuple[Size, ...] = ((224, 224), (448, 448), (640, 480), (1280, 720), (1920, 1080), (1080, 2400))


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """parameters: numbers in the files per component, tied tensors once. unknown: tensors that the model does not take.

    about_pictures: see `Family.about_pictures`. pictures: (width, height) -> (ids in the sequence, tiles).
    first_frames, frames: the same for the first frame of a video, and for the others. video: two frames as they stand
    in a prompt. box: how one is written, and its unit. why_not_packed: None, or why rows are padded instead.
    """

    path: str
    base: str | None
    family: str
    architecture: str
    layout: str
    dtypes: dict[str, int]
    parameters: dict[str, int]
    unknown: int
    missing: int
    chat: dict[str, Any]
    pictures: dict[str, tuple[int, int]]
    first_frames: dict[str, tuple[int, int]]
    frames: dict[str, tuple[int, int]]
    about_pictures: str | None
    video: str
    box: tuple[str, str]
    why_not_packed: str | None
    adapter: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(located: Located) -> Description:
    """Read headers and configuration only.

    Raises:
        WeightsError: a folder that cannot be opened.
    """
    opened = open_folder(located.model_folder, located.media)
    shards = Shards(located.model_folder)
    model = skeleton(opened)
    table = name_table(model, shards.infos, opened.table)
    parameters: dict[str, int] = {"vision": 0, "projector": 0, "language": 0}
    dtypes: dict[str, int] = {}
    for name, info in shards.infos.items():
        dtypes[dtype_name(info.dtype)] = dtypes.get(dtype_name(info.dtype), 0) + info.num_elements
        component = opened.components.of(table.links[name].parameters[0]) if name in table.links else None
        if component:
            parameters[component] += info.num_elements
    filled = table.filled
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    missing = [name for name, _ in model.named_parameters() if name not in filled | tied]
    same = opened.table is not None or all(link.parameters == (disk,) for disk, link in table.links.items())
    return Description(
        path=str(located.path),
        base=str(located.base) if located.base else None,
        family=opened.family.name,
        architecture=type(model).__name__,
        layout=opened.layout + ("" if same else " (under transformers' legacy hub names)"),
        dtypes=dtypes,
        parameters=parameters,
        unknown=len(unread((disk for disk in shards.infos if disk not in table.links), model)),
        missing=len(demanded(missing, model._keys_to_ignore_on_load_missing)),
        chat=_chat(opened.chat),
        pictures={f"{w}×{h}": _cost(opened, (w, h)) for w, h in SIZES},
        first_frames={f"{w}×{h}": _cost(opened, (w, h), frame=0) for w, h in SIZES},
        frames={f"{w}×{h}": _cost(opened, (w, h), frame=1) for w, h in SIZES},
        about_pictures=opened.family.about_pictures(opened.spec),
        video=_video(opened.chat),
        box=(write_box(_BOX, opened.family.plan([_WHOLE], opened.spec), opened.boxes), opened.boxes.unit),
        why_not_packed=opened.why_not_packed,
        adapter=_adapter(located.path) if located.base else None,
    )


def _cost(opened: OpenedFolder, size: Size, *, frame: int | None = None) -> tuple[int, int]:
    """ids and tiles of a picture, or of the first or second frame of a video of two."""
    if frame is None:
        (plan,) = opened.family.plan([size], opened.spec)
    else:
        plan = opened.family.plan([size, size], opened.spec, [0, 1])[frame]
    return plan.num_tokens, plan.num_tiles


def _video(chat: ChatFormat) -> str:
    """The user's content when it is a video of which two frames are shown."""
    ref = MediaRef(path="")
    film = Film((ref, ref), ((1, 1), (1, 1)), (0.0, 9.96), 10.0)
    pieces = lay([Message("user", (Video(ref),))], replace(chat, opening="", bridge=""), prompt=True, films=[film])
    return "".join("<frame>" if isinstance(piece, int) else piece.text for piece in pieces)


def _chat(chat: ChatFormat) -> dict[str, Any]:
    """A one-turn prompt as the template lays it, and what ends an answer."""
    before, after = chat.image
    prompt = f"{chat.opening}{before}<picture>{after}question{chat.bridge}"
    return {
        "prompt": prompt,
        "answer": f"{chat.answer_lead}answer{chat.stop}",
        "system": chat.system_opening is not None,
        "images_first": chat.images_first,
        "stop_ids": list(chat.stop_ids),
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from peft import PeftConfig

    config: Mapping[str, Any] = PeftConfig.from_pretrained(str(folder)).to_dict()
    file = folder / "adapter_model.safetensors"
    infos = [info for info in read_header(file) if "lora_" in info.name] if file.is_file() else []
    kind = config["peft_type"].value
    if kind == "LORA":
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    return {
        "type": kind,
        "rank": config.get("r"),
        "ranks": sorted({info.shape[0] for info in infos if info.name.endswith("lora_A.weight")}),
        "alpha": config.get("lora_alpha"),
        "parameters": sum(info.num_elements for info in infos),
        "trained_in_full": config.get("modules_to_save") or [],
    }
