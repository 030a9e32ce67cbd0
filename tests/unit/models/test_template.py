"""Cutting chat templates: the pieces, and the refusals."""

from __future__ import annotations

import pytest
from tiny import IM_TEMPLATE, make_tokenizer

from vlmtune.errors import WeightsError
from vlmtune.models.family import ChatFormat
from vlmtune.models.template import probe
from vlmtune.models.text import TextEncoder

IMAGE = "<image>"
CHATML = IM_TEMPLATE.replace("IMAGE", IMAGE)


def cut(template: str, *, eos: str = "<|im_end|>") -> ChatFormat:
    tokenizer = make_tokenizer(["<pad>", "<|im_start|>", "<|im_end|>", IMAGE], eos=eos, extra={})
    return probe(tokenizer, template, IMAGE, TextEncoder(tokenizer), place="somewhere")


def test_chatml() -> None:
    chat = cut(CHATML)
    assert chat.opening == "<|im_start|>user\n"
    assert chat.bridge == "<|im_end|>\n<|im_start|>assistant\n"
    assert (chat.stop, chat.close) == ("<|im_end|>", "<|im_end|>\n")
    assert chat.system_opening == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")
    assert not chat.strips and not chat.images_first


def test_a_default_system_prompt_belongs_to_the_opening() -> None:
    default = (
        "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif -%}"
    )
    chat = cut(default + CHATML)
    assert chat.opening == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert chat.system_opening == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")


def test_a_template_that_drops_the_system_turn() -> None:
    keep = "{%- for message in messages -%}{%- if message['role'] != 'system' -%}"
    chat = cut(
        CHATML.replace("{%- for message in messages -%}", keep, 1).replace(
            "{%- endfor -%}\n{%- if add", "{%- endif -%}{%- endfor -%}\n{%- if add"
        )
    )
    assert chat.system_opening is None


def test_trimmed_contents() -> None:
    assert cut(CHATML.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")).strips


def test_trimmed_ends() -> None:
    ends = "{{ part['text'].lstrip() if loop.first else part['text'] }}"
    form = cut(CHATML.replace("{{ part['text'] }}", ends))
    assert form.strips_ends and not form.strips


def test_contents_as_strings() -> None:
    only_strings = """{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'user' and m['content'] is not string -%}
{%- for part in m['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- elif m['content'] is string -%}{{ m['content'] }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
    assert cut(only_strings).bridge == "<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_without_an_end_gets_the_eos_token() -> None:
    endless = """{%- for m in messages -%}{{ m['role'].upper() + ': ' }}
{%- for part in m['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{{ ' ' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
    chat = cut(endless)
    assert chat.stop == "<|im_end|>"
    assert chat.again == "<|im_end|> USER: " and chat.close == "<|im_end|> "
    assert (chat.bridge, chat.answer_lead) == (" ASSISTANT:", " ")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (CHATML.replace("'<image>'", "'Picture ' ~ loop.index ~ ': <image>'"), "pieces give"),
        (CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>' }}{%- endif"), "generation prompt"),
        (CHATML.replace("{{ part['text'] }}", "{{ part['text'][:3] }}"), "drops"),
    ],
    ids=["numbered pictures", "another generation prompt", "shortened contents"],
)
def test_refusals_say_why(broken: str, reason: str) -> None:
    with pytest.raises(WeightsError, match=reason) as caught:
        cut(broken)
    assert str(caught.value).startswith("somewhere: the chat template cannot be cut into pieces: ")
    assert caught.value.exit_code == 4
