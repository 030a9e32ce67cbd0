"""What a LLaVA folder holds beside its weights, in each of its layouts, and how a folder of another one is furnished.

`native` are Hugging Face's folders; `xtuner` the language model with `visual_encoder/` and `projector/` inside; `llava`
those of official LLaVA. A checkpoint of a run that began from one of the last two, and a native export of one, have
native weights and `llava.json` beside them, with the configuration files of that folder: this program goes on with them
as the run did, prompts and pictures alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from vlmtune.errors import WeightsError
from vlmtune.files import read_json, write_json
from vlmtune.models import native, sentencepiece
from vlmtune.models.family import NATIVE, ModelFolder, OpenedFolder
from vlmtune.models.llava import config as configs
from vlmtune.models.llava import pictures
from vlmtune.models.llava.config import LLAVA, XTUNER
from vlmtune.models.llava.jinja import TEMPLATE
from vlmtune.models.llava.weights import llava_table, native_table, xtuner_table
from vlmtune.weights.layout import WeightTable
from vlmtune.weights.places import PROJECTOR, TOWER
from vlmtune.weights.shards import Shards

RECORD = "llava.json"
IMAGE = "<image>"
_LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast")
_ROUND = 64  # transformers' conversion of LLaVA pads the vocabulary to multiples of this
_AS_TRANSFORMERS = {"token_merge_ratio": 1.0, "fit": None, "slow_fast": False}
_FITS = {XTUNER: "pad_square", LLAVA: "pad_square"}
"""How other readers of a layout bring pictures to size: XTuner always, official LLaVA by `image_aspect_ratio`."""
_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR_FILES = ("processor_config.json", "chat_template.jinja", "chat_template.json", _PREPROCESSOR)


@dataclass(frozen=True, slots=True)
class Parts:
    """config.json of the three parts, as XTuner's folders have them."""

    language: Mapping[str, Any]
    vision: Mapping[str, Any]
    projector: Mapping[str, Any]


def layout(folder: ModelFolder) -> str:
    """The layout that a folder is in, by its names; folders of other models are `native` too."""
    if configs.is_official(folder.config):
        return LLAVA
    inside = any((folder.path / name).is_dir() for name in (TOWER, PROJECTOR))
    return XTUNER if inside and folder.config.get("model_type") != LLAVA else NATIVE


def origin(folder: ModelFolder) -> str:
    """The layout of the folder that training began from."""
    own = layout(folder)
    file = folder.path / RECORD
    return str(read_json(file)["layout"]) if own == NATIVE and file.is_file() else own


def parts(folder: ModelFolder) -> Parts:
    """The configuration of the three parts: as they came, or made from transformers' own.

    Raises:
        WeightsError: a part that is not there.
    """
    own = layout(folder)
    if own == XTUNER:
        return Parts(folder.config, _part(folder, TOWER), _part(folder, PROJECTOR))
    if own == LLAVA:
        where = str(folder.path)
        return Parts(folder.config, _official_tower(folder), configs.projector_of(folder.config, where=where))
    file = folder.path / RECORD
    if file.is_file():
        record = read_json(file)
        return Parts(record["language"], record["vision"], record["projector"])
    made = configs.filled_native(folder.config)
    return Parts(configs.language_of(made), configs.vision_of(made), configs.xtuner_projector(made))


def _part(folder: ModelFolder, name: str) -> dict[str, Any]:
    file = folder.path / name / "config.json"
    if not file.is_file():
        raise WeightsError(
            f"there is no {name}/ with a config.json in it, but other parts of an XTuner LLaVA model",
            where=str(folder.path),
            expected=f"the language model here, and in it {TOWER}/ and {PROJECTOR}/",
            remedy=f"Copy {name}/ from where the model was written; XTuner leaves out what it did not train, which "
            "then is in the folder that its training began from.",
        )
    return read_json(file)


def _official_tower(folder: ModelFolder) -> dict[str, Any]:
    """Official folders name their tower; its sizes are in the tower's own folder, or in ours."""
    kept = (folder.config.get(configs.RECORD) or {}).get("vision_config")
    if kept:
        return dict(kept)
    named = str(folder.config["mm_vision_tower"])
    for place in (Path(named).expanduser(), folder.path / named):
        if (place / "config.json").is_file():
            return configs.tower_config(read_json(place / "config.json"), where=str(place))
    known = configs.known_tower(named)
    if known is None:
        raise WeightsError(
            f"mm_vision_tower is {named!r}, whose sizes are not known",
            where=str(folder.path / "config.json"),
            expected="a folder with the tower's config.json, or one of OpenAI's CLIP-L towers",
            remedy="Download the tower (its config.json is enough) and write its folder there.",
        )
    return known


def native_config(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Of a folder in another layout than transformers' own."""
    found = parts(folder)
    names = Shards(folder.path).infos
    vision = configs.tower_config(found.vision, where=str(folder.path))
    if vision["model_type"] == "siglip_vision_model":
        vision["vision_use_head"] = any(".head." in name for name in names)
    return configs.native_config(
        found.language,
        vision,
        found.projector,
        context_id=context_id(tokenizer),
        has_head="lm_head.weight" in names,
        where=str(folder.path),
    )


def open_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The folder's own; where it has no `<image>`, as in all but native folders, that is the next id."""
    tokenizer = _plain_tokenizer(folder)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _plain_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """From tokenizer.json; of Llama's folders (Vicuna's) that have none, from their SentencePiece model."""
    if not (folder.path / "tokenizer.json").is_file() and (folder.path / sentencepiece.FILE).is_file():
        settings = sentencepiece.read_settings(folder.path)
        if settings.get("tokenizer_class") in _LLAMA:
            return sentencepiece.build(folder.path, settings)
    official = layout(folder) == LLAVA
    kind = configs.causal(folder.config, where=str(folder.path))["model_type"] if official else None
    return native.open_tokenizer(folder, kind=kind)


def context_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.get_vocab()[IMAGE])


def preprocessor_folder(folder: ModelFolder) -> ModelFolder:
    """The folder in which the image processor's file lies.

    Raises:
        WeightsError: it is not there.
    """
    if layout(folder) != XTUNER:
        return folder
    _part(folder, TOWER)
    return ModelFolder(folder.path / TOWER, folder.config)


def layouts(folder: ModelFolder, config: PretrainedConfig) -> Mapping[str, WeightTable]:
    found = {XTUNER: xtuner_table(), LLAVA: llava_table()}
    if layout(folder) != NATIVE or _added_rows(config):
        found[NATIVE] = native_table(_added_rows(config))
    return found


def _added_rows(config: PretrainedConfig) -> int:
    """Rows that embedding and head of a native folder have beyond the model's: `<image>`, `<pad>`, and some to a round
    number; none where `<image>` is in the vocabulary."""
    found = config.to_dict()
    rows, image = int(found["text_config"]["vocab_size"]), int(found["image_token_index"])
    return 0 if image < rows else -(-(image + 2) // _ROUND) * _ROUND - rows


def companions(folder: ModelFolder) -> Mapping[str, bytes]:
    """What a native checkpoint needs beside the usual files to go on as this folder would."""
    began = origin(folder)
    if began == NATIVE:
        return {}
    found = parts(folder)
    record = {"layout": began, "language": found.language, "vision": found.vision, "projector": found.projector}
    files = {RECORD: json.dumps(record, indent=2, ensure_ascii=False).encode()}
    preprocessor = preprocessor_folder(folder).path / _PREPROCESSOR
    return {**files, _PREPROCESSOR: preprocessor.read_bytes()}


def write_files(opened: OpenedFolder, layout: str, out: Path, record: Mapping[str, Any]) -> list[str]:
    """The files of a folder of `layout` beside its weights; see `Family.write_files`.

    Args:
        record: how pictures were seen in training, see `pictures.record_of`; what it leaves out: as in transformers.
    """
    record = {**_AS_TRANSFORMERS, **record}
    write = {XTUNER: _write_xtuner, LLAVA: _write_llava}.get(layout, _write_native)
    return [*write(opened, out, record), *_unknown_to_others(layout, record)]


def _unknown_to_others(layout: str, record: Mapping[str, Any]) -> list[str]:
    """How other readers of a layout show pictures otherwise than training did."""
    gaps, fit = [], record.get("fit")
    if record.get("token_merge_ratio", 1) != 1:
        gaps.append("others show this model all tokens of a picture")
    if fit not in (None, _FITS.get(layout)):
        gaps.append(f"others bring pictures to size in their own way, this model was trained with fit {fit}")
    kept = f"what it was trained with stands in config.json under {configs.RECORD}, and this program follows it"
    return [f"{gap}; {kept}" for gap in gaps]


def _write_native(opened: OpenedFolder, out: Path, record: Mapping[str, Any]) -> list[str]:
    folder = opened.folder
    if origin(folder) == NATIVE:
        native.copy_files(folder.path, out)
        write_json(out / "config.json", {**folder.config, configs.RECORD: dict(record)})
        _preprocessor(opened, out)
        return []
    config, added = opened.config.to_dict(), _added_rows(opened.config)
    config["text_config"]["vocab_size"] += added
    tokenizer = _native_tokenizer(folder, rows=config["text_config"]["vocab_size"])
    tokenizer.save_pretrained(out)
    config.update({"ignore_index": -100, "pad_token_id": tokenizer.pad_token_id, configs.RECORD: dict(record)})
    write_json(out / "config.json", config)
    (out / RECORD).write_bytes(companions(folder)[RECORD])
    native.copy_licences(folder.path, out)
    if (folder.path / "generation_config.json").is_file():
        (out / "generation_config.json").write_bytes((folder.path / "generation_config.json").read_bytes())
    vision = config["vision_config"]
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": 1 if vision["model_type"] == "clip_vision_model" else 0,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    write_json(out / "processor_config.json", processor)
    _preprocessor(opened, out)
    notes = [f"embedding and head have {added} rows more than the model, for {IMAGE}: the mean of the others"]
    return notes if added else []


def _native_tokenizer(folder: ModelFolder, *, rows: int) -> PreTrainedTokenizerBase:
    """With `<image>`, a token to pad with if there is room for it, and the prompt as a template."""
    tokenizer = open_tokenizer(folder)
    if tokenizer.pad_token is None and len(tokenizer) < rows:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _write_xtuner(opened: OpenedFolder, out: Path, record: Mapping[str, Any]) -> list[str]:
    folder, found = opened.folder, parts(opened.folder)
    _language_files(folder, out)
    language = {name: value for name, value in found.language.items() if not configs.is_of_pictures(name)}
    if origin(folder) == LLAVA:
        language.update(configs.causal(language, where=str(folder.path)))
    write_json(out / "config.json", {**language, **_of_head(opened), configs.RECORD: dict(record)})
    for name, config in ((TOWER, found.vision), (PROJECTOR, found.projector)):
        (out / name).mkdir(exist_ok=True)
        write_json(out / name / "config.json", config)
    _preprocessor(opened, out / TOWER)
    scripts = sorted((folder.path / PROJECTOR).glob("*.py")) if (folder.path / PROJECTOR).is_dir() else []
    for file in scripts:
        (out / PROJECTOR / file.name).write_bytes(file.read_bytes())
    missing = (
        f"the base has no Python files of XTuner's {PROJECTOR}/; `xtuner chat` asks for them: copy them from an "
        "-xtuner folder"
    )
    return [] if scripts else [missing]


def _write_llava(opened: OpenedFolder, out: Path, record: Mapping[str, Any]) -> list[str]:
    folder, found = opened.folder, parts(opened.folder)
    _language_files(folder, out)
    kept = {**record, "vision_config": configs.tower_config(found.vision, where=str(folder.path))}
    if origin(folder) == LLAVA:
        config = dict(found.language)
    else:
        aspect = "pad" if record.get("fit") == "pad_square" else "square"
        config = configs.llava_config(opened.config.to_dict(), found.language, aspect=aspect)
    write_json(out / "config.json", {**config, **_of_head(opened), configs.RECORD: kept})
    _preprocessor(opened, out)
    if config["mm_vision_tower"]:
        return []
    return ["official LLaVA opens its tower by mm_vision_tower in config.json: write the tower's name or folder there"]


def _of_head(opened: OpenedFolder) -> dict[str, Any]:
    """What the weights decide, whatever config.json said of them: a native export in between may have added rows, and
    a head may lie in files that call it tied."""
    made: Any = opened.config
    return {"vocab_size": made.text_config.vocab_size, "tie_word_embeddings": made.tie_word_embeddings}


def _language_files(folder: ModelFolder, out: Path) -> None:
    """Tokenizer, generation settings and licence; what belongs to a processor of transformers stays behind."""
    native.copy_files(folder.path, out)
    for name in _PROCESSOR_FILES:
        (out / name).unlink(missing_ok=True)


def _preprocessor(opened: OpenedFolder, out: Path) -> None:
    file = preprocessor_folder(opened.folder).path / _PREPROCESSOR
    if not file.is_file():  # in processor_config.json, as transformers 5 writes it
        return
    settings = read_json(file)
    if opened.media.image.size is not None:
        settings.update(pictures.picture_settings(opened.spec))
    write_json(out / _PREPROCESSOR, settings)
