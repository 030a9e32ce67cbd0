"""What every folder in transformers' own layout says in the same way, whatever the family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from vlmtune.config.schema import ChatStyle, VideoOptions
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import Components, ModelFolder

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", *_LICENCES,
)  # fmt: skip
"""What is taken over from a model folder; weights, code, training state and other people's READMEs are not."""


def open_tokenizer(folder: ModelFolder, *, kind: str | None = None) -> PreTrainedTokenizerBase:
    """
    Args:
        kind: model_type of the language model, where config.json says one that transformers does not know.

    Raises:
        WeightsError: the tokenizer has no fast form.
    """
    options = {} if kind is None else {"config": AutoConfig.for_model(kind)}
    tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False, **options)
    if not tokenizer.is_fast:
        raise WeightsError(
            f"the tokenizer {type(tokenizer).__name__} has no fast form",
            where=str(folder.path),
            expected="a tokenizer.json",
            remedy="Convert it once with transformers and save it into the folder.",
        )
    return tokenizer


def read_template(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja chat template of a folder.

    Raises:
        WeightsError: there is none.
    """
    jinja, legacy = folder.path / "chat_template.jinja", folder.path / "chat_template.json"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    if legacy.exists():
        return str(json.loads(legacy.read_text(encoding="utf-8"))["chat_template"])
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise WeightsError(
        "the folder has no chat template",
        where=str(folder.path),
        expected="chat_template.jinja",
        remedy="Without it the prompt that the model was trained with is unknown. Use the instruction-tuned "
        "checkpoint, or write the template into the folder.",
    )


def refuse_style(style: ChatStyle | None) -> None:
    """
    Raises:
        ConfigError: `model.chat` asks for other prompts than those of the folder's chat template.
    """
    if style not in (None, "official"):
        models = {"xtuner": "InternVL in its official layout", "newline": "InternLM-XComposer2"}
        raise ConfigError(
            f"is {style}, but this folder brings its own chat template",
            where="model.chat",
            expected=f"official, or nothing: {style} is known for {models[style]}",
        )


def refuse_slow_fast(options: VideoOptions) -> None:
    """
    Raises:
        ConfigError: `slow_fast` is asked of a model that merges no tokens.
    """
    if options.slow_fast:
        raise ConfigError(
            "has no effect: this model merges no tokens, so that the first frame of a video is like the others",
            where="model.video.slow_fast",
            expected="a LLaVA model with a CLIP or SigLIP tower, and model.image.token_merge_ratio below 1",
        )


def components(vision_blocks: str) -> Components:
    """Where transformers keeps the parts of a model of tower, two-layer projector and decoder (LLaVA, InternVL).

    vision_blocks: name of the list of the tower's blocks.
    """
    projector = ("model.multi_modal_projector",)
    return Components(
        vision=("model.vision_tower",),
        projector=projector,
        language=("model.language_model",),
        blocks={"vision": (vision_blocks,), "projector": projector, "language": ("model.language_model.layers",)},
    )


def shared_length(config: PretrainedConfig) -> int | None:
    """Most tokens that a row may have to share a pack or a padded batch with others; None if any may.

    Where RoPE depends on the length, transformers takes the frequencies from the longest row of the batch once it is
    beyond this length.
    """
    text = config.get_text_config()
    rope = text.rope_parameters or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    return int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)


def copy_files(source: Path, out: Path, *, more: Sequence[str] = ()) -> list[str]:
    """Copy the small files of a folder (`COPIED`, and the patterns `more`) into `out`, byte for byte; their names."""
    return _copy(source, out, (*COPIED, *more))


def copy_licences(source: Path, out: Path) -> list[str]:
    """Copy what says how a model may be used."""
    return _copy(source, out, _LICENCES)


def _copy(source: Path, out: Path, patterns: Sequence[str]) -> list[str]:
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    copied = [file.name for file in files if any(fnmatch(file.name, pattern) for pattern in patterns)]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    return copied
