"""Ids, labels and prompts of InternLM-XComposer2's official code: every record, with its verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import golden
import pytest
from conversations import (
    DIALOGUES,
    Counted,
    Pictures,
    Statement,
    answers_of,
    content_of,
    dialogue_sample,
    prompt_of,
    read,
    sample,
    specials,
    with_counts,
)
from transformers import AutoTokenizer, PretrainedConfig
from verdicts import Rule, decide, report

from vlmtune.config.schema import ChatStyle, MediaOptions
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.lay import lay
from vlmtune.data.sample import IGNORED, Encoded, Sample
from vlmtune.errors import DataError
from vlmtune.models.family import BoxFormat, Components, ModelFolder, OpenedFolder
from vlmtune.models.text import TextEncoder
from vlmtune.models.xcomposer2.chat import IMAGE_MARK, chat_format, open_tokenizer, write_tokenizer

pytestmark = pytest.mark.golden

_FILE = golden.root() / "xcomposer2" / "prompts.json"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_ROLES |= {"bot": "assistant", "system": "system"}
_MARKS = (IMAGE_MARK, "<image>", "<video>", "<bbox>", "<ref-object>")  # what a user turn of ours does not hold as text
_START, _END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"  # golden README and meta of the records


@dataclass(frozen=True)
class Case:
    """One conversation with one version of transformers. turns: (role as recorded, text)."""

    name: str
    version: str
    turns: tuple[tuple[str, str], ...]
    text: str
    num_images: int
    image_length: int
    max_length: int
    record: Any

    @property
    def style(self) -> ChatStyle | None:
        return _style(self.version)

    @property
    def paired(self) -> tuple[tuple[str, str], ...]:
        """Without answers before the first question and questions behind the last answer; our names of roles."""
        turns = tuple((_ROLES.get(role, role), text) for role, text in self.turns)
        roles = [role for role, _ in turns]
        if "user" not in roles or "assistant" not in roles:
            return turns
        first, last = roles.index("user"), len(roles) - roles[::-1].index("assistant")
        return tuple(turn for i, turn in enumerate(turns) if (i >= first or turn[0] == "system") and i < last)

    @property
    def roles(self) -> list[str]:
        return [role for role, _ in self.paired]

    def of(self, role: str) -> list[str]:
        return [text for other, text in self.paired if other == role]

    @property
    def folder(self) -> OpenedFolder:
        return with_counts(_opened(self.style), [self.image_length] * self.num_images)


def _style(version: str) -> ChatStyle | None:
    """The slow tokenizer strips what stands before `</s>` in versions before 4.34."""
    numbers = tuple(int(part) for part in version.split("_")[1:])
    return None if numbers < (4, 34) else "newline"


@cache
def _place() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def _folder() -> ModelFolder:
    """A folder's tokenizer as published: InternLM2's model, and no names but those of bos, eos, unk and pad."""
    model = golden.tokenizer_folder("tokenizer") / "tokenizer.model"
    if _FILE.exists():
        digest = read(_FILE)["meta"]["tokenizer_model_sha256"]
        assert hashlib.sha256(model.read_bytes()).hexdigest() == digest, "recorded with another tokenizer"
    place = Path(_place().name)
    (place / "tokenizer.model").write_bytes(model.read_bytes())
    (place / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",'
        ' "tokenizer_class": "InternLMXComposer2Tokenizer"}'
    )
    return ModelFolder(place, {})


@cache
def _tokenizer() -> Any:
    return open_tokenizer(_folder())


@cache
def _encoder() -> TextEncoder:
    return TextEncoder(_tokenizer())


@cache
def _opened(style: ChatStyle | None) -> OpenedFolder:
    """A folder without weights; every picture has so many ids as the record says, all of them 0."""
    return OpenedFolder(
        folder=_folder(),
        config=PretrainedConfig(),
        layout="official",
        layouts={},
        family=Pictures(),  # type: ignore[arg-type]
        tokenizer=_tokenizer(),
        spec=Counted((), 0),
        text=_encoder(),
        chat=chat_format(_tokenizer(), style),
        components=Components(vision=(), projector=(), language=()),
        why_not_packed=None,
        shared_length=None,
        media=MediaOptions(exif="ignore"),
        boxes=BoxFormat(),
    )


@cache
def _cases() -> tuple[Case, ...]:
    if not _FILE.exists():
        return ()
    cases = read(_FILE)["cases"]
    return tuple(
        Case(
            name,
            version,
            tuple((turn["from"], turn["value"]) for turn in cases[found.get("based_on", name)]["conversations"]),
            found["text"],
            found["n_images"],
            found["im_len"],
            found["max_length"],
            record,
        )
        for name, found in cases.items()
        for version, record in found.items()
        if version.startswith("tf_")
    )


# What is right, from the records alone.

Parts = list[tuple[str | int, bool, bool]]
"""Text or a number of picture ids, whether the template writes it, whether it is trained."""


def _said(text: str, counts: list[int], *, bos: str = "") -> Parts:
    """A question; bos: what stands before every text behind a picture that is not empty."""
    first, *others = text.split(IMAGE_MARK)
    parts: Parts = [(first, False, False)]
    for number, other in enumerate(others):
        parts.append((counts.pop(0), True, False))
        if other or number == len(others) - 1:
            parts += [(bos, True, False), (other, False, False)]
    return parts


def _stated(case: Case) -> tuple[list[int], list[int]]:
    """Only answers are trained, with their end and, behind the last, what leads to `</s>`; texts never write tokens."""
    counts = [case.image_length] * case.num_images
    parts: Parts = [("<s>", True, False)]
    for role, text in case.paired:
        if role == "system":
            parts += [(f"{_START}system\n", True, False), (text, False, False), (f"{_END}\n", True, False)]
        elif role == "user":
            parts += [(f"{_START}user\n", True, False), *_said(text.strip(), counts), (f"{_END}\n", True, False)]
        else:
            parts += [(f"{_START}assistant\n", True, False), ("", False, True), (text.strip(), False, True)]
            parts += [(_END, True, True), ("\n", True, False)]
    parts[-1] = ("\n</s>" if case.style else "</s>", True, True)
    return Statement({}, _tokenizer(), ()).tokens(parts)


# When it is not the record.


def _written(case: Case) -> list[str]:
    return [text for _, text in case.paired]


def _is_unmatched(case: Case) -> bool:
    texts = case.of("user")
    marks = sum(text.count(mark) for text in texts for mark in _MARKS)
    return marks != case.num_images or marks != sum(text.count(IMAGE_MARK) for text in texts)


def _repeats(case: Case) -> bool:
    return any(one == other for one, other in pairwise(case.roles)) or "system" in case.roles[1:]


def _writes_special_tokens(case: Case) -> bool:
    return any(token in text for token in specials(_tokenizer()) for text in _written(case))


def _joins_across(case: Case) -> bool:
    """Whether some token would hold the newline in front of an answer and the first of its characters."""

    def cut(text: str) -> list[int]:
        return list(_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids)

    lead = "assistant\n"
    return any(cut(lead + text.strip()) != cut(lead) + cut(text.strip()) for text in case.of("assistant"))


def _rule(name: str, verdict: Any, why: str) -> Callable[[Callable[[Case], bool]], Rule[Case]]:
    return lambda holds: Rule(name, verdict, why, holds)


_RULES: Sequence[Rule[Case]] = (
    _rule("unknown role", "refused", "officially an assistant's")(
        lambda case: any(role not in _ROLES for role, _ in case.turns)
    ),
    _rule("no answer", "refused", "nothing can be learnt")(lambda case: "assistant" not in case.roles),
    _rule("empty answer", "refused", "officially only its end is trained")(
        lambda case: any(not text.strip() for text in case.of("assistant"))
    ),
    _rule("turns of one role in a row", "refused", "officially labels are trained by pairs of end tokens")(_repeats),
    _rule("marks in questions ≠ pictures", "refused", "officially a picture goes behind the end, or a mark vanishes")(
        _is_unmatched
    ),
    _rule("longer than max_length", "refused", "officially cut, with labels or without; ours is said by data.too_long")(
        lambda case: case.record["length_before_cut"] > case.max_length
    ),
    _rule("system turn", "mended", "officially an answer, which shifts all labels; ours is a system turn as in chat")(
        lambda case: "system" in case.roles
    ),
    _rule("last turn user", "mended", "officially it ends in </s> like an answer; ours leaves it out")(
        lambda case: _ROLES[case.turns[-1][0]] == "user"
    ),
    _rule("answers first", "mended", "officially they shift all labels; ours leaves them out")(
        lambda case: len(case.paired) < len(case.turns)
    ),
    _rule("special token in a text", "mended", "officially special, which shifts labels; ours are plain text")(
        _writes_special_tokens
    ),
    _rule("an answer joins the newline before it", "mended", "no prompt ends in such a token; ours begins anew")(
        _joins_across
    ),
)


def _row(case: Case) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in case.turns]}


@pytest.mark.parametrize("case", _cases(), ids=[golden.name(_FILE, case.name, case.version) for case in _cases()])
def test_conversations(case: Case) -> None:
    rule = decide(case, _RULES)
    if rule.verdict == "refused" and rule.name != "longer than max_length":
        with pytest.raises(DataError) as refused:
            encode(sample(_row(case), case.num_images), case.folder)
        assert refused.value.where == "record"
        return
    row = sample(_row(case), case.num_images)
    ours = encode(row, case.folder)
    assert (ours.input_ids.tolist(), ours.labels.tolist()) == _stated(case), rule.name
    _check_record(case, ours, rule.verdict)
    if rule.verdict == "equal":
        assert _text(row, "newline") == case.text
    for end in answers_of(row.messages):
        asked = prompt_of(row, end)
        counted = with_counts(case.folder, [case.image_length] * len(asked.images))
        prompt = encode_prompt(asked, counted).input_ids
        assert ours.input_ids[: len(prompt)].tolist() == prompt.tolist(), "training and prompts differ"
        assert ours.labels[len(prompt) - 1] == IGNORED != ours.labels[len(prompt)]


def _check_record(case: Case, ours: Encoded, verdict: str) -> None:
    record = case.record
    mask = _image_mask(ours)
    if verdict == "refused":  # too long: `data.too_long` refuses or drops the row by this number; what fits is the same
        assert ours.num_tokens > case.max_length == len(record["input_ids"])
        assert _with_gaps(ours, mask)[: case.max_length] == record["input_ids"]
        return
    if verdict == "mended":
        return
    assert ours.num_tokens == record["length_before_cut"]
    if record["input_ids"] is None:
        assert ours.num_tokens == record["length"]
        trained = [[place, label] for place, label in enumerate(ours.labels.tolist()) if label != IGNORED]
        assert trained == record["targets_not_ignored"]
        return
    assert _with_gaps(ours, mask) == record["input_ids"]
    assert ours.labels.tolist() == record["targets"]
    assert mask == record["im_mask"]


def _image_mask(encoded: Encoded) -> list[int]:
    mask = [0] * encoded.num_tokens
    for span in encoded.spans:
        mask[span.start : span.start + span.length] = [1] * span.length
    return mask


def _with_gaps(encoded: Encoded, mask: Sequence[int]) -> list[int]:
    """Ids, with -100 where the records have no id."""
    return [-100 if seen else number for number, seen in zip(encoded.input_ids.tolist(), mask, strict=True)]


def _text(row: Sample, style: ChatStyle | None, *, prompt: bool = False) -> str:
    pieces = lay(row.messages, _opened(style).chat, prompt=prompt)
    return "".join(IMAGE_MARK if isinstance(piece, int) else piece.text for piece in pieces)


def test_verdicts() -> None:
    if not _cases():
        pytest.skip(f"no conversations are recorded in {_FILE.parent}")
    golden.tokenizer_folder("tokenizer")
    report(_cases(), _RULES)
    for style in (None, "newline"):
        assert any(case.style == style and decide(case, _RULES).verdict == "equal" for case in _cases())


def _tokenised() -> list[tuple[str, str]]:
    found = read(_FILE)["meta"]["tokenize_no_special"] if _FILE.exists() else {}
    return [(version, text) for version, texts in found.items() for text in texts]


@pytest.mark.parametrize(
    ("version", "text"),
    [pytest.param(*one, id=golden.name(_FILE, "tokenize", one[0], ascii(one[1]))) for one in _tokenised()],
)
def test_tokens(version: str, text: str) -> None:
    recorded = read(_FILE)["meta"]["tokenize_no_special"][version][text]
    assert _tokenizer()(text, add_special_tokens=False).input_ids == recorded
    meta = read(_FILE)["meta"]
    assert _opened(None).chat.stop_ids == (meta["end_token"], meta["eos"])
    assert _opened(None).chat.prefix_ids == (meta["bos"],) and _tokenizer().pad_token_id == meta["pad"]


def _chats() -> list[tuple[str, str]]:
    found = read(_FILE)["chat"] if _FILE.exists() else {}
    return [(version, name) for version, chats in found.items() for name in chats]


@pytest.mark.parametrize(
    ("version", "name"), [pytest.param(*one, id=golden.name(_FILE, "chat", *one)) for one in _chats()]
)
def test_chat_prompts(version: str, name: str) -> None:
    record = read(_FILE)["chat"][version][name]
    num_images, texts = record["n_images"], [text for pair in record["history"] for text in pair]
    turns = [("system", record["meta_instruction"]), *zip(("user", "assistant") * len(texts), texts, strict=False)]
    turns += [("user", record["query"]), ("assistant", "x")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    asked = [text for role, text in turns if role == "user"]
    if sum(text.count(IMAGE_MARK) for text in asked) != num_images:
        with pytest.raises(DataError, match="mark"):
            sample(row, num_images)
        return
    whole = sample(row, num_images)
    counted = with_counts(_opened("official"), [record.get("im_len", 0)] * num_images)
    ours = encode_prompt(prompt_of(whole, len(whole.messages) - 1), counted)
    if any(token in text for token in specials(_tokenizer()) for _, text in turns):
        stated, _ = _stated_prompt(turns[:-1], record.get("im_len", 0), num_images)
        assert ours.input_ids.tolist() == stated
        return
    ids = iter([number for part in record["parts"] for number in part["ids"]])
    mask = record.get("im_mask") or [0] * ours.num_tokens
    assert _with_gaps(ours, _image_mask(ours)) == [-100 if seen else next(ids) for seen in mask]
    assert next(ids, None) is None and _image_mask(ours) == mask


def _stated_prompt(turns: Sequence[tuple[str, str]], length: int, num_images: int) -> tuple[list[int], list[int]]:
    counts = [length] * num_images
    parts: Parts = [("<s>" if num_images else "<s><s>", True, False)]
    for role, text in turns:
        if role == "system" and not text:
            continue
        said = _said(text, counts, bos="<s>") if role == "user" else [(text, False, False)]
        parts += [(f"{_START}{role}\n", True, False), *said, (f"{_END}\n", True, False)]
    return Statement({}, _tokenizer(), ()).tokens([*parts, (f"{_START}assistant\n", True, False)])


@pytest.mark.parametrize("style", [None, "official"], ids=["xcomposer2/native/default", "xcomposer2/native/official"])
def test_native_folders(style: ChatStyle | None, tmp_path: Path) -> None:
    """Exported tokenizers with their Jinja template, in plain transformers and opened again."""
    folder = _opened(style)
    write_tokenizer(_tokenizer(), folder.chat, tmp_path)
    plain: Any = AutoTokenizer.from_pretrained(tmp_path)
    again = replace(folder, tokenizer=open_tokenizer(ModelFolder(tmp_path, {})))
    again = replace(again, text=TextEncoder(again.tokenizer))
    assert chat_format(again.tokenizer, style) == folder.chat  # type: ignore[arg-type]
    for system in ([], [("system", ["Be brief.\n"])], [("system", [""])]):
        for dialogue in ([*system, *turns] for turns in DIALOGUES):
            row = dialogue_sample(dialogue)
            prompt = dialogue[-1][0] == "user"
            encoder = encode_prompt if prompt else encode
            ours = encoder(row, with_counts(folder, [3] * len(row.images)))
            reopened = encoder(row, with_counts(again, [3] * len(row.images)))
            assert (reopened.input_ids == ours.input_ids).all() and (reopened.labels == ours.labels).all()
            rendered = plain.apply_chat_template(
                [{"role": role, "content": content_of(parts, not row.images)} for role, parts in dialogue],
                tokenize=False,
                add_generation_prompt=prompt,
            )
            parts = [plain(part, add_special_tokens=False).input_ids for part in rendered.split(IMAGE_MARK)]
            ids = [number for i, part in enumerate(parts) for number in ([-100] * 3 if i else []) + part]
            assert ids == _with_gaps(ours, _image_mask(ours)), rendered
