"""The chat formats of official InternVL folders: config.json names one as `template`, the table here holds it.

Texts and separators are those that OpenGVLab's `conversation.py` publishes; the formats of InternVL 1.5 and 2 are
compared with records of the official code (tests/families/test_golden_internvl_chat.py). XTuner's form is that of its
InternVL 1.5 data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from vlmtune.config.schema import ChatStyle
from vlmtune.errors import ConfigError, WeightsError
from vlmtune.models.family import ChatFormat, FrameFormat, ModelFolder
from vlmtune.models.internvl.tokenizer import END_TOKEN, START_TOKEN, lone_space
from vlmtune.models.template import prefix_ids

_INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_XTUNER = "You are an AI assistant whose name is InternLM (书生·浦语)."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roles:
    """system, user, assistant: what opens each turn. message: the default system text. end: what ends a turn.

    strips: the official training code trims turns.
    """

    system: str
    message: str
    user: str
    assistant: str
    end: str
    strips: bool = False


_HERMES = _Roles(
    system="<|im_start|>system\n",
    message=_INTERNVL,
    user="<|im_start|>user\n",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
)
_TEMPLATES: Mapping[str, _Roles] = {
    "internlm2-chat": replace(_HERMES, strips=True),
    "Hermes-2": _HERMES,
    "phi3-chat": _Roles(
        system="<|system|>\n", message=_INTERNVL, user="<|user|>\n", assistant="<|assistant|>\n", end="<|end|>"
    ),
    "internvl2_5": replace(_HERMES, message=_INTERNVL_2_5, end="<|im_end|>\n"),
}
_ZH = "internvl_zh"
TEMPLATES = (*_TEMPLATES, _ZH)
_XTUNER_KNOWS = "internlm2-chat"


def official_chat(
    folder: ModelFolder, tokenizer: PreTrainedTokenizerFast, *, style: ChatStyle = "official"
) -> ChatFormat:
    """The chat format of an official folder.

    Args:
        style: xtuner: as XTuner's InternVL data set lays rows down: another system text, and all pictures of a turn in
            one block in front of its text.
    Raises:
        WeightsError: a template that is not known, or whose tokens the tokenizer lacks.
        ConfigError: XTuner's form of a template that XTuner has none for; a form of another family.
    """
    name, where = folder.config.get("template"), str(folder.path)
    if name not in TEMPLATES:
        raise WeightsError(
            f"config.json names the chat template {name!r}, which is not known",
            where=where,
            expected=f"`template` as one of {', '.join(TEMPLATES)}",
            remedy="Set `template` in config.json to the one that the model was trained with.",
        )
    if style == "newline":
        raise ConfigError(
            "is newline, which InternLM-XComposer2 has and InternVL has not",
            where="model.chat",
            expected="official or xtuner",
        )
    if style == "xtuner" and name != _XTUNER_KNOWS:
        raise ConfigError(
            f"is xtuner, but this model's chat template is {name}",
            where="model.chat",
            expected=f"xtuner for models with the template {_XTUNER_KNOWS}, or official",
        )
    chat = _zh() if name == _ZH else _from_roles(_TEMPLATES[str(name)])
    if style == "xtuner":
        chat = _xtuner(_TEMPLATES[_XTUNER_KNOWS])
    return _with_ids(chat, tokenizer, str(name), where)


def _from_roles(roles: _Roles) -> ChatFormat:
    return ChatFormat(
        opening=roles.system + roles.message + roles.end + roles.user,
        system_opening=(roles.system, roles.end + roles.user),
        bridge=roles.end + roles.assistant,
        stop=roles.end.rstrip(),
        again=roles.end + roles.user,
        close=roles.end,
        image=(START_TOKEN, END_TOKEN),
        strips_ends=roles.strips,
        fold_newlines=False,
        frames=_frames(END_TOKEN),
    )


def _frames(close: str) -> FrameFormat:
    """As InternVLProcessor of transformers writes the frames of a video (`replace_video_token`)."""
    return FrameFormat(before="Frame{number}: " + START_TOKEN, joint=END_TOKEN + "\n", close=close)


def _zh() -> ChatFormat:
    """The form of InternVL 1.1: no system text, roles as words."""
    return ChatFormat(
        opening=" <human>: ",
        bridge=" <bot>:",
        answer_lead=" ",
        stop="</s>",
        again="</s><human>: ",
        close="</s>",
        image=(START_TOKEN, END_TOKEN),
        fold_newlines=False,
    )


def _xtuner(roles: _Roles) -> ChatFormat:
    return replace(
        _from_roles(replace(roles, message=_XTUNER, strips=True)),
        image=("", ""),
        images_first=True,
        block=(START_TOKEN, END_TOKEN, "\n"),
        frames=None,
    )


def _with_ids(chat: ChatFormat, tokenizer: PreTrainedTokenizerFast, name: str, where: str) -> ChatFormat:
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    laid = "".join((chat.opening, *(chat.system_opening or ()), chat.bridge, chat.stop))
    wanted = [mark for mark in ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")]
    missing = [mark for mark in (*wanted, chat.stop) if mark in laid and mark not in special]
    if missing:
        raise WeightsError(
            f"the tokenizer has no special token {missing[0]}, which the chat template {name} writes",
            where=where,
            expected="the tokenizer files of the model's own repository",
            remedy="Look whether `template` in config.json belongs to this language model.",
        )
    first = next((mark for mark in special if chat.opening.startswith(mark)), None)
    lone = lone_space(tokenizer, first) if first else ()
    ends = (special[chat.stop], tokenizer.eos_token_id)
    return replace(
        chat,
        prefix_ids=(*prefix_ids(tokenizer, chat.opening), *lone),
        stop_ids=tuple(dict.fromkeys(number for number in ends if number is not None)),
    )


def native_chat(probed: ChatFormat) -> ChatFormat:
    """A format that was probed from the Jinja template of a native folder, where the processor writes the marks of a
    picture: with the marks, and with the newline beside a picture left to the text unless the template writes it."""
    before, after = probed.image
    return replace(
        probed,
        image=(before + START_TOKEN, END_TOKEN + after),
        fold_newlines="\n" in after,
        frames=_frames(END_TOKEN + after),
    )
