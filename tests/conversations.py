"""Recorded conversations of InternVL's official code: our rows of them, and a plain statement of what is right.

`Statement` is written down from the recorded templates alone (strings, separators, ids before the first token) and the
plain rule of the format: special tokens are the template's, what stands between two of them is tokenised as one text,
an answer begins where a prompt ends. It shares the tokenizer with the code under test, nothing else.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import official
import PIL.Image
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from vlmtune.config.schema import MediaOptions, Read
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.rows.adapters import to_sample
from vlmtune.data.sample import Image, MediaPlan, MediaRef, Message, Sample, Size, Text
from vlmtune.models.family import BoxFormat, ChatFormat, Components, OpenedFolder
from vlmtune.models.internvl.chat import native_chat, official_chat
from vlmtune.models.internvl.tokenizer import context_token_id, open_tokenizer, write_native
from vlmtune.models.template import probe
from vlmtune.models.text import TextEncoder

MARK = "<image>"
FREE = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
XTUNER_SYSTEM = "You are an AI assistant whose name is InternLM (书生·浦语)."  # golden README, "Differences", 1

Turns = Sequence[tuple[str, str]]
"""(role, text), the role being system, human or gpt."""


@dataclass(frozen=True)
class Counted:
    """Picture settings of `Family`: so many ids for each picture of the row."""

    counts: tuple[int, ...]
    context: int


class Pictures:
    """The part of a family that `data.encode` asks, with the recorded numbers of ids."""

    name = "counted"

    def plan(self, sizes: Sequence[Size], spec: Counted, frames: Sequence[int | None] = ()) -> tuple[MediaPlan, ...]:
        counts = zip(sizes, spec.counts, strict=True)
        return tuple(MediaPlan(size=size, num_tokens=n, num_tiles=1, layout=(n,)) for size, n in counts)

    def span_ids(self, plan: MediaPlan, spec: Counted) -> tuple[np.ndarray, np.ndarray]:
        return np.full(plan.num_tokens, spec.context, np.int32), np.ones(plan.num_tokens, bool)

    def pixels(self, picture: PIL.Image.Image, plan: MediaPlan, spec: Counted) -> dict[str, Any]:
        return {}

    def collate_pixels(self, pixels: Sequence[dict[str, Any]], spec: Counted) -> dict[str, Any]:
        return {}

    def position_inputs(self, rows: object, pixels: object, spec: Counted) -> dict[str, Any]:
        return {}

    def prompt_inputs(self, prompts: object, spec: Counted) -> dict[str, Any]:
        return {}


def opened(
    language: str, template: str, place: Path, *, style: str = "official", chat: ChatFormat | None = None
) -> OpenedFolder:
    """An official folder without weights, its pictures counted by `Pictures`."""
    folder = official.folder(language, template, place)
    tokenizer = open_tokenizer(folder)
    spec = Counted((), context_token_id(tokenizer, where=str(place)))
    return OpenedFolder(
        folder=folder,
        config=PretrainedConfig(),
        layout="official",
        layouts={},
        family=Pictures(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        spec=spec,
        text=TextEncoder(tokenizer),
        chat=chat or official_chat(folder, tokenizer, style=style),  # type: ignore[arg-type]
        components=Components(vision=(), projector=(), language=()),
        why_not_packed=None,
        shared_length=None,
        media=MediaOptions(exif="ignore"),
        boxes=BoxFormat(),
    )


def check_native(folder: OpenedFolder, out: Path) -> None:
    """A native folder's tokenizer files: plain transformers' prompts have our ids, so has the folder opened again."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = folder.tokenizer
    write_native(tokenizer, folder.chat, out)
    plain = AutoTokenizer.from_pretrained(out)
    text = TextEncoder(plain)
    probed = native_chat(probe(plain, plain.chat_template, plain.context_image_token, text, place=str(out)))
    again = replace(folder, tokenizer=plain, text=text, chat=probed)
    num = 3
    shown = plain.start_image_token + plain.context_image_token * num + plain.end_image_token  # InternVLProcessor
    for system in ((), (("system", ["Be brief.\n"]),))[: 2 if folder.chat.system_opening else 1]:
        for turns in DIALOGUES:
            dialogue = [*system, *turns]
            ours = dialogue_sample(dialogue)
            counted = with_counts(folder, [num] * len(ours.images))
            prompt = dialogue[-1][0] == "user"
            encoded = encode_prompt(ours, counted) if prompt else encode(ours, counted)
            for as_text in (False, True):
                if as_text and ours.images:
                    continue
                rendered = plain.apply_chat_template(
                    [{"role": role, "content": content_of(parts, as_text)} for role, parts in dialogue],
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
                ids = plain(rendered.replace(plain.context_image_token, shown), add_special_tokens=False).input_ids
                assert ids == encoded.input_ids.tolist(), rendered
            reopened = with_counts(again, counted.spec.counts)
            found = encode_prompt(ours, reopened) if prompt else encode(ours, reopened)
            assert found.input_ids.tolist() == encoded.input_ids.tolist(), dialogue
            assert found.labels.tolist() == encoded.labels.tolist(), dialogue


_IMAGE = None
DIALOGUES: list[list[tuple[str, list[str | None]]]] = [
    [("user", [" What? "])],
    [("user", [_IMAGE, "\nWhat is it?"]), ("assistant", ["A cat."])],
    [("user", ["A: ", _IMAGE, "\nB: ", _IMAGE, " same?\n"]), ("assistant", ["No."]), ("user", ["Why?"])],
    [("user", ["One"]), ("assistant", ["two"]), ("user", ["  three"]), ("assistant", ["four"])],
]


def dialogue_sample(dialogue: Sequence[tuple[str, Sequence[str | None]]]) -> Sample:
    parts = [(role, tuple(Image(_PICTURE) if part is None else Text(part) for part in said)) for role, said in dialogue]
    return Sample(messages=tuple(Message(role, said) for role, said in parts), origin="dialogue")  # type: ignore[arg-type]


def content_of(parts: Sequence[str | None], as_text: bool) -> Any:
    if as_text:
        return "".join(part or "" for part in parts)
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def with_counts(folder: OpenedFolder, counts: Sequence[int]) -> OpenedFolder:
    return replace(folder, spec=replace(folder.spec, counts=tuple(counts)))


def _png() -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (1, 1)).save(stream, "png")
    return stream.getvalue()


_PICTURE = MediaRef(path="picture", inline=_png())


def sample(row: dict[str, Any], num_pictures: int) -> Sample:
    """A row through the adapters, lone turns left out."""
    if num_pictures:
        row = {**row, "image": [f"{i}.png" for i in range(num_pictures)]}
    return to_sample(row, origin="record", locate=lambda name: _PICTURE, options=Read(lone_turns="drop"))


def prompt_of(whole: Sample, end: int) -> Sample:
    return replace(whole, messages=whole.messages[:end])


def answers_of(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


@dataclass(frozen=True)
class Statement:
    """What is right for one template and tokenizer.

    before: ids in front of the first special token. trims: turns are trimmed. gathers: XTuner's one block of pictures.
    """

    template: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    before: tuple[int, ...]
    trims: bool = False
    gathers: bool = False

    def ids(self, turns: Turns, counts: Sequence[int], *, prompt: bool = False) -> tuple[list[int], list[int]]:
        """Ids and labels of a clean conversation."""
        system, sep, (user, assistant) = self.template["system_message"], self.template["sep"], self.template["roles"]
        if turns[0][0] == "system":
            system, turns = turns[0][1], turns[1:]
        left = list(counts)
        parts: list[
            tuple[str | int, bool, bool]
        ] = []  # text or number of picture ids, written by the template, trained
        parts.append((self.template["system_template"].format(system_message=system) + sep, True, False))
        for role, text in turns:
            text = text.strip() if self.trims else text
            if role == "human":
                parts += [(user, True, False), *self._question(text, left), (sep, True, False)]
            else:
                parts += [(assistant, True, False), ("", False, True), (text, False, True), (sep, True, True)]
        if prompt:
            parts.append((assistant, True, False))
        return self.tokens(parts)

    def _question(self, text: str, left: list[int]) -> list[tuple[str | int, bool, bool]]:
        if self.gathers and MARK in text:
            num = text.count(MARK)
            text = text.replace(MARK, "").strip()
            total, left[:num] = sum(left[:num]), []
            block: list[tuple[str | int, bool, bool]] = [("<img>", True, False), (total, True, False)]
            return [*block, ("</img>", True, False), (f"\n{text}" if text else "", False, False)]
        first, *others = text.split(MARK)
        parts: list[tuple[str | int, bool, bool]] = [(first, False, False)]
        for other in others:
            parts += [
                ("<img>", True, False),
                (left.pop(0), True, False),
                ("</img>", True, False),
                (other, False, False),
            ]
        return parts

    def tokens(self, parts: Sequence[tuple[str | int, bool, bool]]) -> tuple[list[int], list[int]]:
        """Ids and labels. parts: text or a number of picture ids, whether the template writes it, whether trained."""
        tokens = specials(self.tokenizer)
        pattern = re.compile("(" + "|".join(re.escape(text) for text in sorted(tokens, key=len, reverse=True)) + ")")
        plain = _plain(self.tokenizer)
        ids, labels = list(self.before), [-100] * len(self.before)
        run, run_trained, eats = "", False, False

        def close() -> None:
            nonlocal run
            new = plain.encode(run, add_special_tokens=False).ids
            ids.extend(new)
            labels.extend(new if run_trained else [-100] * len(new))
            run = ""

        context = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        for part, template, trained in parts:
            if isinstance(part, int):
                close()
                ids += [context] * part
                labels += [-100] * part
                continue
            for piece in pattern.split(part) if template else [part]:
                if template and piece in tokens:
                    close()
                    ids.append(tokens[piece][0])
                    labels.append(tokens[piece][0] if trained else -100)
                    eats = tokens[piece][1].rstrip
                    continue
                if eats and not run:
                    piece = piece.lstrip()
                if trained != run_trained:
                    close()
                    run_trained = trained
                run += piece
                eats = eats and not run
        close()
        return ids, labels


@cache
def specials(tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[int, AddedToken]]:
    """Text -> id and token."""
    return {token.content: (n, token) for n, token in tokenizer.added_tokens_decoder.items() if token.special}


@cache
def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """SentencePiece's space in front of a text is never wanted here: `Statement.before` holds it."""
    description = tokenizer.backend_tokenizer.to_str()
    plain = Tokenizer.from_str(description.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
    plain.encode_special_tokens = True
    return plain


@cache
def renamed_pieces(folder: Path, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Old names of the SentencePiece pieces whose place the folder gives to an added token."""
    file = folder / "tokenizer.model"
    if not file.exists():
        return set()
    model = import_protobuf().ModelProto()
    model.ParseFromString(file.read_bytes())
    added = tokenizer.added_tokens_decoder
    return {p.piece for n, p in enumerate(model.pieces) if n in added and added[n].content != p.piece}


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found
