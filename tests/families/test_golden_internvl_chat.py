"""Ids, labels and prompts of InternVL's official code and of XTuner's: every record, with its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import golden
import numpy as np
import pytest
from conversations import (
    FREE,
    MARK,
    XTUNER_SYSTEM,
    Statement,
    Turns,
    answers_of,
    check_native,
    opened,
    prompt_of,
    read,
    renamed_pieces,
    sample,
    specials,
    with_counts,
)
from verdicts import Rule, decide, report

from vlmtune.data.collate import collate, prompt_batch
from vlmtune.data.encode import encode, encode_prompt
from vlmtune.data.sample import Encoded
from vlmtune.errors import DataError, WeightsError
from vlmtune.models.family import OpenedFolder
from vlmtune.models.internvl.chat import TEMPLATES, official_chat
from vlmtune.models.template import lay_text

pytestmark = pytest.mark.golden

_FOLDER = golden.root() / "internvl" / "conversation"
_CONVERSATIONS = _FOLDER / "conversations.json"
_PADDING = _FOLDER / "padding_truncation.json"
_CHAT = _FOLDER / "templates_and_chat.json"
_LANGUAGES = {"internlm2-chat": "internlm2", "Hermes-2": "qwen2", "phi3-chat": "phi3", "xtuner": "internlm2"}
_TRIMS = ("internlm2-chat", "xtuner")


@dataclass(frozen=True)
class Case:
    """One conversation under one renderer. renderer: ``template`` or ``template/tokenizer``, or ``xtuner``."""

    conversation: str
    renderer: str
    turns: tuple[tuple[str, str], ...]
    counts: tuple[int, ...]
    record: Any

    @property
    def template(self) -> str:
        return "internlm2-chat" if self.is_xtuner else self.renderer.partition("/")[0]

    @property
    def is_xtuner(self) -> bool:
        return self.renderer == "xtuner"

    @property
    def language(self) -> str:
        return self.renderer.partition("/")[2] or _LANGUAGES[self.renderer]

    @property
    def trims(self) -> bool:
        return self.renderer in _TRIMS

    @property
    def paired(self) -> Turns:
        """Without answers before the first question and questions behind the last answer."""
        roles = [role for role, _ in self.turns]
        if "human" not in roles or "gpt" not in roles:
            return self.turns
        first, last = roles.index("human"), len(roles) - roles[::-1].index("gpt")
        return tuple(t for i, t in enumerate(self.turns) if (i >= first or t[0] == "system") and i < last)

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.paired]

    def of(self, role: str) -> list[str]:
        return [text for other, text in self.paired if other == role]

    @property
    def folder(self) -> OpenedFolder:
        return with_counts(
            _opened(self.template, self.language, "xtuner" if self.is_xtuner else "official"), self.counts
        )

    @property
    def statement(self) -> Statement:
        return _statement(self.template, self.language, self.is_xtuner)


@cache
def _place() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def _opened(template: str, language: str, style: str = "official") -> OpenedFolder:
    return opened(language, template, Path(_place().name) / f"{template}-{language}", style=style)


@cache
def _statement(template: str, language: str, is_xtuner: bool = False) -> Statement:
    record = read(_CHAT)["templates"][template]
    if is_xtuner:
        record = {**record, "system_message": XTUNER_SYSTEM}
    trims = is_xtuner or template in _TRIMS
    tokenizer = _opened(template, language).tokenizer
    return Statement(record, tokenizer, _before(template, language), trims, gathers=is_xtuner)  # type: ignore[arg-type]


def _before(template: str, language: str) -> tuple[int, ...]:
    """The ids in front of the first special token of the template, as recorded."""
    for case in _cases():
        if (case.template, case.language) == (template, language) and "input_ids" in case.record:
            ids = case.record["input_ids"]
            opening = read(_CHAT)["templates"][template]["system_template"]
            special = _opened(template, language).tokenizer.added_tokens_decoder
            first = next(number for number, token in special.items() if opening.startswith(token.content))
            return tuple(ids[: ids.index(first)])
    raise AssertionError(f"no record of {template} with {language}")


@cache
def _cases() -> tuple[Case, ...]:
    if not _CONVERSATIONS.exists():
        return ()
    return tuple(
        Case(
            name,
            renderer,
            tuple((turn["from"], turn["value"]) for turn in found["conversations"]),
            tuple(found["num_image_token_list"] or ()),
            record,
        )
        for name, found in read(_CONVERSATIONS).items()
        for renderer, record in found.items()
        if isinstance(record, dict) and ("input_ids" in record or "error" in record)
    )


def _is_unmatched(case: Case) -> bool:
    return sum(text.count(MARK) for text in case.of("human")) != len(case.counts)


def _repeats(case: Case) -> bool:
    roles = [role for role, _ in case.paired]
    return any(one == other for one, other in pairwise(roles))


def _leads(case: Case) -> int:
    """Answers before the first question."""
    roles = [role for role, _ in case.turns]
    return roles.index("human") if "human" in roles and "system" not in roles else 0


def _writes_special_tokens(case: Case) -> bool:
    tokenizer = case.folder.tokenizer
    special = specials(tokenizer).keys() - set(FREE)  # type: ignore[arg-type]
    special |= renamed_pieces(case.folder.folder.path, tokenizer)  # type: ignore[arg-type]
    return any(token in text for token in special for text in case.texts)


def _joins_across(case: Case) -> bool:
    """Whether some token would hold the last characters of a prompt and the first of an answer."""
    if case.trims or case.language == "phi3":  # trimmed, or swallowed by the token that opens the answer
        return False

    def cut(text: str) -> list[int]:
        return list(case.folder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    lead = read(_CHAT)["templates"][case.template]["roles"][1]
    end = lead[len(lead.rstrip()) :]
    return any(cut(end + text) != cut(end) + cut(text) for text in case.of("gpt"))


def _is_marked_answer(case: Case) -> bool:
    """An answer says `<image>` before the last picture has its place."""
    marks = [role for role, text in case.paired for _ in range(text.count(MARK))]
    return "gpt" in marks[: len(case.counts)]


def _rule(name: str, verdict: Any, why: str) -> Callable[[Callable[[Case], bool]], Rule[Case]]:
    return lambda holds: Rule(name, verdict, why, holds)


_RULES: Sequence[Rule[Case]] = (
    _rule("no answer", "refused", "nothing can be learnt; the official code trains nothing, or the question")(
        lambda case: not case.of("gpt")
    ),
    _rule("empty answer", "refused", "the official labels are empty or a lone end mark")(
        lambda case: any(not text.strip() for text in case.of("gpt"))
    ),
    _rule("turns of one role in a row", "refused", "the official code raises, XTuner glues the words together")(
        _repeats
    ),
    _rule("marks ≠ pictures", "refused", "official features and places do not match, or the mark stays as text")(
        _is_unmatched
    ),
    _rule("system turn", "mended", "both raise; ours puts its text in the place of the default")(
        lambda case: case.turns[0][0] == "system"
    ),
    _rule("last turn human", "mended", "official code trains the question or nothing; ours leaves it out")(
        lambda case: case.turns[-1][0] == "human" and not case.is_xtuner
    ),
    _rule("several answers first", "mended", "the official code raises; ours leaves them out, as XTuner does")(
        lambda case: _leads(case) > 1 and not case.is_xtuner
    ),
    _rule(
        "special token in a text", "mended", "official ids hold it as special, labels may be lost; ours are plain text"
    )(_writes_special_tokens),
    _rule("empty question", "mended", "the official code leaves out the end mark of such a turn")(
        lambda case: not case.is_xtuner and any(not (text.strip() if case.trims else text) for text in case.of("human"))
    ),
    _rule("Hermes-2 with a bos, several answers", "mended", "an official count is one off, all labels are lost")(
        lambda case: case.template == "Hermes-2" and bool(case.statement.before) and len(case.of("gpt")) > 1
    ),
    _rule("white space joins an answer to its prompt", "mended", "no prompt ends in such a token; ours begins anew")(
        _joins_across
    ),
    _rule("pictures in several turns", "mended", "XTuner repeats all pictures in each of them; ours shows each once")(
        lambda case: case.is_xtuner and sum(MARK in text for text in case.of("human")) > 1
    ),
    _rule("a mark in an answer", "mended", "the official code puts a picture there; ours leaves it as text")(
        lambda case: not case.is_xtuner and _is_marked_answer(case)
    ),
)


def _ids(cases: Sequence[Case]) -> list[str]:
    return [golden.name(_CONVERSATIONS, case.conversation, case.renderer) for case in cases]


def _row(case: Case) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in case.turns]}


@pytest.mark.parametrize("case", _cases(), ids=_ids(_cases()))
def test_conversations(case: Case) -> None:
    rule = decide(case, _RULES)
    if rule.verdict == "refused":
        with pytest.raises(DataError) as refused:
            encode(sample(_row(case), len(case.counts)), case.folder)
        assert refused.value.where == "record"
        return
    row = sample(_row(case), len(case.counts))
    ours = encode(row, case.folder)
    ids, labels = case.statement.ids(case.paired, case.counts)
    if rule.verdict == "equal":
        assert "input_ids" in case.record, f"raises {case.record.get('error')}, and no rule says why"
        assert ours.input_ids.tolist() == case.record["input_ids"]
        assert ours.labels.tolist() == case.record["labels"]
    assert (ours.input_ids.tolist(), ours.labels.tolist()) == (ids, labels), rule.name
    for end in answers_of(row.messages):
        prompt = encode_prompt(prompt_of(row, end), _counted(case, row, end)).input_ids
        assert ours.input_ids[: len(prompt)].tolist() == prompt.tolist(), "training and prompts differ"
        assert (ours.labels[: len(prompt)][-1:] == -100).all() and ours.labels[len(prompt)] != -100


def _counted(case: Case, row: Any, end: int) -> OpenedFolder:
    shown = len(replace(row, messages=row.messages[:end]).images)
    return with_counts(case.folder, case.counts[:shown])


def test_verdicts() -> None:
    cases = _cases()
    if not cases:
        pytest.skip(f"no conversations are recorded in {_FOLDER}")
    golden.tokenizer_folder("tokenizer")
    report(cases, _RULES)


def _padding() -> list[tuple[str, str]]:
    if not _PADDING.exists():
        return []
    return [(name, key) for name, found in read(_PADDING).items() for key in found if isinstance(found[key], dict)]


@pytest.mark.parametrize(("name", "renderer"), _padding(), ids=[golden.name(_PADDING, *one) for one in _padding()])
def test_padding_and_truncation(name: str, renderer: str) -> None:
    """A row that fits is padded as recorded, its padding neither seen nor trained; a longer one is never cut."""
    found = read(_PADDING)[name]
    record, most = found[renderer], found["max_length"]
    case = next(one for one in _cases() if (one.conversation, one.renderer) == (found["case"], renderer))
    assert decide(case, _RULES).verdict == "equal", "the record of this conversation is none to compare with"
    ours = encode(sample(_row(case), len(case.counts)), case.folder)
    if ours.num_tokens > most:
        # `data.too_long` refuses or drops such a row by this number (tests/unit/data/plan/test_bad_rows.py).
        cut = len(record["input_ids"])
        assert cut == most and record["input_ids"] == ours.input_ids[:cut].tolist(), "the official code cuts the row"
        return
    long = Encoded(
        input_ids=np.zeros(most, np.int32), labels=np.full(most, -100, np.int32), spans=(), media=(), origin="long"
    )
    if found["group_by_length"]:
        assert record["input_ids"] == ours.input_ids.tolist() and record["labels"] == ours.labels.tolist()
        return
    batch = collate([[replace(ours, media=())], [long]], case.folder, stand_in=False)
    assert batch.inputs["input_ids"][0].tolist() == record["input_ids"]
    mask = batch.inputs["attention_mask"][0]
    if record["attention_mask"] == "all ones":
        assert mask.all()
    else:
        assert mask.tolist() == record["attention_mask"]
    labels = np.asarray(record["labels"])
    assert batch.targets.tolist() == labels[labels != -100].tolist()
    assert (
        batch.inputs["logits_to_keep"][0].nonzero().flatten().tolist() == (np.flatnonzero(labels != -100) - 1).tolist()
    )


def _templates() -> list[str]:
    return list(read(_CHAT)["templates"]) if _CHAT.exists() else []


@pytest.mark.parametrize("name", _templates(), ids=[golden.name(_CHAT, "templates", name) for name in _templates()])
def test_templates(name: str) -> None:
    record = read(_CHAT)["templates"][name]
    folder = _opened(name if name in _LANGUAGES else "internlm2-chat", _LANGUAGES.get(name, "internlm2"))
    config = {**folder.folder.config, "template": name}
    if name not in TEMPLATES:
        with pytest.raises(WeightsError, match="not known"):
            official_chat(replace(folder.folder, config=config), folder.tokenizer)  # type: ignore[arg-type]
        return
    chat = official_chat(replace(folder.folder, config=config), folder.tokenizer)  # type: ignore[arg-type]
    turns = [("user", ["Q1"]), ("assistant", ["A1"]), ("user", ["Q2"])]
    assert lay_text(chat, turns, MARK, prompt=True) == record["rendered_q1_a1_q2"]


def _prompts() -> list[str]:
    return list(read(_CHAT)["chat_prompts"]) if _CHAT.exists() else []


@pytest.mark.parametrize("name", _prompts(), ids=[golden.name(_CHAT, "chat_prompts", name) for name in _prompts()])
def test_chat_prompts(name: str) -> None:
    record = read(_CHAT)["chat_prompts"][name]
    folder = _opened(record["template"], _LANGUAGES[record["template"]])
    assert record["eos_token_id"] in folder.chat.stop_ids
    num = record["num_image_token"]
    if "questions" in record:
        prompts = [
            _prompt(folder, [], question, [patches * num])
            for question, patches in zip(record["questions"], record["patches"], strict=True)
        ]
        batch = prompt_batch([replace(prompt, media=()) for prompt in prompts], folder)
        assert batch["input_ids"].tolist() == record["input_ids"]
        assert batch["attention_mask"].tolist() == record["attention_mask"]
        return
    counts = [patches * num for patches in record["patches"] or ()]
    history = record["history"] or []
    texts = [*(question for question, _ in history), record["question"]]
    if history and sum(text.count(MARK) for text in texts) != len(counts):
        # The official code feeds pictures that have no place.
        with pytest.raises(DataError, match="<image> mark"):
            _prompt(folder, history, record["question"], counts)
        return
    ours = _prompt(folder, history, record["question"], counts)
    if folder.chat.strips_ends and any(text != text.strip() for text in (*texts, *(one for _, one in history))):
        # Trained rows are trimmed, official prompts of the same model are not; ours are the trained ones.
        turns = [turn for pair in history for turn in zip(("human", "gpt"), pair, strict=True)]
        stated = _statement(record["template"], _LANGUAGES[record["template"]])
        ids, _ = stated.ids([*turns, ("human", record["question"])], counts, prompt=True)
        assert ours.input_ids.tolist() == ids
        return
    assert ours.input_ids.tolist() == record["input_ids"]


@pytest.mark.parametrize("template", _templates(), ids=[golden.name(_CHAT, "native", name) for name in _templates()])
def test_native_folders(template: str, tmp_path: Path) -> None:
    """Exported tokenizers with their Jinja template, in plain transformers and opened again."""
    if template not in TEMPLATES:
        pytest.skip(f"{template} is refused, see test_templates")
    check_native(_opened(template, _LANGUAGES.get(template, "internlm2")), tmp_path)


def _prompt(folder: OpenedFolder, history: Sequence[Sequence[str]], question: str, counts: Sequence[int]) -> Encoded:
    """Without history and mark, the pictures stand in front of the question, each on its line."""
    if not history and MARK not in question:
        row: dict[str, Any] = {"question": question, "answer": "x"}
    else:
        pairs = [(("human", q), ("gpt", a)) for q, a in (*history, (question, "x"))]
        row = {"conversations": [{"from": role, "value": text} for pair in pairs for role, text in pair]}
    whole = sample(row, len(counts))
    return encode_prompt(prompt_of(whole, len(whole.messages) - 1), with_counts(folder, counts))
