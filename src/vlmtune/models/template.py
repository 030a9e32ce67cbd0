"""A Jinja chat template, cut once into the pieces of a `ChatFormat`.

The template is rendered with sentinels in place of contents, cut at them, and the pieces are then checked: whole
conversations laid down from the pieces must equal what the template renders. A template that is not made of such pieces
(pictures that are numbered, turns that look back) is refused with the reason; nothing is guessed and no token is
searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from vlmtune.errors import WeightsError
from vlmtune.models.family import ChatFormat
from vlmtune.models.text import TextEncoder

# Plain words: no template rewrites, escapes or splits them.
_USER, _USER2, _ANSWER, _ANSWER2, _SYSTEM = "qzuserone", "qzusertwo", "qzanswerone", "qzanswertwo", "qzsystem"
_IMAGE = {"type": "image"}


class _NotPieces(Exception):
    """The template cannot be cut; the argument says why."""


class TemplateProbe:
    """Renders one template with contents as lists of parts, or as strings where the template wants strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, image_token: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token = image_token
        self._as_text = False
        plain = self.render(("user", [_USER]), ("assistant", [_ANSWER]))
        if _USER not in plain or _ANSWER not in plain:
            self._as_text = True

    def render(self, *turns: tuple[str, Sequence[Any]], prompt: bool = False) -> str:
        """`turns`: (role, parts), a part being text or `_IMAGE`."""
        messages = [{"role": role, "content": self._content(parts)} for role, parts in turns]
        rendered = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )
        return str(rendered)

    def _content(self, parts: Sequence[Any]) -> Any:
        if self._as_text and all(isinstance(part, str) for part in parts):
            return "".join(parts)
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]

    def cut(self, text: str, *sentinels: str) -> list[str]:
        """What stands before, between and after the sentinels, which must come once each, in this order."""
        pieces = []
        for sentinel in sentinels:
            before, found, text = text.partition(sentinel)
            if not found:
                raise _NotPieces("it drops or reorders a content")
            pieces.append(before)
        return [*pieces, text]


def probe(
    tokenizer: PreTrainedTokenizerBase, template: str, image_token: str, text: TextEncoder, *, place: str
) -> ChatFormat:
    """Cuts `template` into a `ChatFormat`.

    Raises:
        WeightsError: the template is not made of context-free pieces; the message says in what way.
    """
    try:
        render = TemplateProbe(tokenizer, template, image_token)
        chat = _cut(render, image_token, text, tokenizer)
        _compare(render, chat, image_token)
    except _NotPieces as reason:
        raise WeightsError(
            f"the chat template cannot be cut into pieces: {reason}",
            where=place,
            remedy="Put a simpler chat_template.jinja into the folder: turn after turn, nothing that looks back.",
        ) from reason
    return chat


def _cut(render: TemplateProbe, image_token: str, text: TextEncoder, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    two_turns = render.render(
        ("user", [_USER]), ("assistant", [_ANSWER]), ("user", [_USER2]), ("assistant", [_ANSWER2])
    )
    opening, bridge, again, bridge2, close = render.cut(two_turns, _USER, _ANSWER, _USER2, _ANSWER2)
    if bridge != bridge2:
        raise _NotPieces(f"the text before the second answer is {bridge2!r}, before the first {bridge!r}")
    _, prompt = render.cut(render.render(("user", [_USER]), prompt=True), _USER)
    if not bridge.startswith(prompt):
        raise _NotPieces(
            f"its generation prompt ends in {prompt!r}, but in training the answer stands after {bridge!r}"
        )
    answer_lead = bridge[len(prompt) :]
    stop, again, close = _stop(again, close, text, tokenizer)
    image, user_lead, images_first, joint = _picture(render, opening, image_token)
    if user_lead:
        if not (opening.endswith(user_lead) and again.endswith(user_lead)):
            raise _NotPieces("the first turn and the later ones begin in different ways")
        opening, again = opening[: -len(user_lead)], again[: -len(user_lead)]
    trims = _trims(render)
    return ChatFormat(
        opening=opening,
        prefix_ids=prefix_ids(tokenizer, opening),
        system_opening=_system(render, user_lead),
        user_lead=user_lead,
        bridge=prompt,
        answer_lead=answer_lead,
        stop=stop,
        again=again,
        close=close,
        image=image,
        images_first=images_first,
        text_joint=joint,
        strips=trims == "texts",
        strips_ends=trims == "ends",
        stop_ids=_stop_ids(stop, text),
    )


def _stop(again: str, close: str, text: TextEncoder, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What ends an answer: everything up to the first special token behind it, or the eos token if there is none."""
    where = text.first_special(close)
    if where is not None and again.startswith(close[: where[1]]):
        return close[: where[1]], again, close
    eos = str(tokenizer.eos_token or "")
    if not eos:
        raise _NotPieces("nothing marks the end of an answer, and the tokenizer has no eos token to add")
    # Templates like LLaVA-1.5's end an answer with a space only; a model trained on that would never stop.
    return eos, eos + again, eos + close


def _stop_ids(stop: str, text: TextEncoder) -> tuple[int, ...]:
    where = text.first_special(stop)
    found = text.special_id(stop[where[0] : where[1]]) if where else None
    return () if found is None else (found,)


def _picture(render: TemplateProbe, opening: str, image_token: str) -> tuple[tuple[str, str], str, bool, str]:
    """(before, after), text before a turn's first text, whether pictures come first, what joins two texts."""
    before, after, _ = render.cut(
        render.render(("user", [_IMAGE, _USER]), ("assistant", [_ANSWER])), image_token, _USER
    )
    if before.startswith(opening):
        before, user_lead = before[len(opening) :], ""
    elif opening.startswith(before):
        before, user_lead = "", opening[len(before) :]
    else:
        raise _NotPieces("a turn that begins with a picture begins in another way")
    mixed = render.render(("user", [_USER, _IMAGE, _USER2]), ("assistant", [_ANSWER]))
    images_first = mixed.index(image_token) < mixed.index(_USER)
    _, joint, _ = render.cut(render.render(("user", [_USER, _USER2]), ("assistant", [_ANSWER])), _USER, _USER2)
    return (before, after), user_lead, images_first, joint


def _system(render: TemplateProbe, user_lead: str) -> tuple[str, str] | None:
    text = render.render(("system", [_SYSTEM]), ("user", [_USER]), ("assistant", [_ANSWER]))
    if _SYSTEM not in text:
        return None
    before, between, _ = render.cut(text, _SYSTEM, _USER)
    if user_lead:
        between = between[: -len(user_lead)] if between.endswith(user_lead) else between
    return before, between


def _trims(render: TemplateProbe) -> Literal["", "texts", "ends"]:
    """Whether the template trims every text, or only the ends of a turn."""
    if f"  {_USER}  " in render.render(("user", [f"  {_USER}  "]), ("assistant", [_ANSWER])):
        return ""
    beside = render.render(("user", [f"  {_USER}  ", _IMAGE]), ("assistant", [_ANSWER]))
    return "ends" if f"{_USER}  " in beside else "texts"


def prefix_ids(tokenizer: PreTrainedTokenizerBase, opening: str) -> tuple[int, ...]:
    """Ids that the tokenizer puts before any text, unless the template writes the bos token itself.

    The same rule as transformers' `ProcessorMixin.apply_chat_template`.
    """
    bos = tokenizer.bos_token
    if bos is not None and opening.startswith(str(bos)):
        return ()
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return tuple(full[: full.index(bare[0])]) if bare and bare[0] in full else ()


def lay_text(chat: ChatFormat, turns: Sequence[tuple[str, Sequence[Any]]], image_token: str, *, prompt: bool) -> str:
    """A conversation as the template's text, from the pieces; the specification that `data.encode` follows."""
    text = chat.opening
    for number, (role, parts) in enumerate(turns):
        if role == "system" and chat.system_opening:
            text = chat.system_opening[0] + "".join(parts) + chat.system_opening[1]
        elif role == "user":
            text += (chat.again if number and turns[number - 1][0] == "assistant" else "") + _user_text(
                chat, parts, image_token
            )
        elif role == "assistant":
            text += chat.bridge + chat.answer_lead + "".join(parts)
    return text + (chat.bridge if prompt else chat.close)


def _user_text(chat: ChatFormat, parts: Sequence[Any], image_token: str) -> str:
    picture = chat.image[0] + image_token + chat.image[1]
    if chat.images_first:
        texts = [part for part in parts if isinstance(part, str)]
        pictures = picture * (len(parts) - len(texts))
        return pictures + (chat.user_lead if not pictures else "") + chat.text_joint.join(texts)
    lead = chat.user_lead if parts and isinstance(parts[0], str) else ""
    return lead + "".join(part if isinstance(part, str) else picture for part in parts)


def _compare(render: TemplateProbe, chat: ChatFormat, image_token: str) -> None:
    if chat.text_joint and not chat.images_first:
        raise _NotPieces(f"it puts {chat.text_joint!r} between two texts of one turn")
    users: list[Sequence[Any]] = [
        [_USER],
        [_IMAGE, _USER],
        [_USER, _IMAGE],
        [_IMAGE, _IMAGE, _USER],
        [_USER, _IMAGE, _USER2],
    ]
    for first in users:
        for second in users:
            turns = [("user", first), ("assistant", [_ANSWER]), ("user", second), ("assistant", [_ANSWER2])]
            lengths = [turns, turns[:2]] + ([[("system", [_SYSTEM]), *turns]] if chat.system_opening else [])
            for conversation in lengths:
                _same(render.render(*conversation), lay_text(chat, conversation, image_token, prompt=False), chat)
            opened = turns[:3]
            _same(render.render(*opened, prompt=True), lay_text(chat, opened, image_token, prompt=True), chat)


def _same(rendered: str, laid: str, chat: ChatFormat) -> None:
    # An eos that the template lacks was added to the pieces on purpose.
    if rendered not in (laid, laid.replace(chat.stop, "")):
        raise _NotPieces(f"it renders {rendered!r} where its pieces give {laid!r}")
