"""A chat format as a Jinja chat template, so that plain transformers prompts a native folder as it was trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from vlmtune.models.family import ChatFormat

# Contents are strings, or lists of {"type": "text"} and {"type": "image"}. The processor replaces IMAGE by the marks of
# a picture and its ids.
_TEMPLATE = """\
{%- macro words(content, first, last) -%}
{%- if TRIMS and first and last -%}{{ content | trim }}
{%- elif TRIMS and first -%}{{ content.lstrip() }}
{%- elif TRIMS and last -%}{{ content.rstrip() }}
{%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- macro said(content) -%}
{%- if content is string -%}{{ words(content, true, true) }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ IMAGE }}
{%- elif part['type'] == 'video' -%}{{ VIDEO }}
{%- else -%}{{ words(part['text'], loop.first, loop.last) }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro asked(content) -%}
{%- if BLOCK and content is not string -%}
{%- set shown = content | selectattr('type', 'equalto', 'image') | list -%}
{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') | trim -%}
{%- for part in shown -%}{{ IMAGE }}{{ BLOCK }}{%- endfor -%}
{{ text }}
{%- else -%}{{ said(content) }}{%- endif -%}
{%- endmacro -%}
{%- set after = namespace(role='') -%}
{{- PREFIX -}}
{%- if not HOLDS or not messages or messages[0]['role'] != 'system' -%}{{ OPENING }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if HOLDS -%}
{%- if message['content'] is string -%}{%- set told = message['content'] -%}
{%- else -%}{%- set told = message['content'] | map(attribute='text') | join('') -%}{%- endif -%}
{%- if told or not BARES -%}{{ SYSTEM_BEFORE }}{{ told }}{{ SYSTEM_AFTER }}{%- else -%}{{ BARE }}{%- endif -%}
{%- endif -%}
{%- elif message['role'] == 'user' -%}
{%- if after.role == 'assistant' -%}{{ AGAIN }}{%- endif -%}
{{ asked(message['content']) }}
{%- else -%}{{ BRIDGE }}{{ LEAD }}{{ said(message['content']) }}{%- endif -%}
{%- set after.role = message['role'] -%}
{%- endfor -%}
{%- if after.role == 'assistant' -%}{{ CLOSE }}{%- elif add_generation_prompt -%}{{ BRIDGE }}{%- endif -%}
"""


def jinja(chat: ChatFormat, tokenizer: PreTrainedTokenizerBase, image_token: str, video_token: str) -> str:
    """The template whose rendering, tokenised without further special tokens, gives the ids of `data.encode`.

    `chat.block` (one block for all pictures of a turn) comes out as one block for each picture, on a line of its own:
    processors know no other form.
    """
    system = chat.system_opening or ("", "")
    values = {
        "TRIMS": "true" if chat.strips_ends else "false",
        "HOLDS": "true" if chat.system_opening else "false",
        "BARES": "true" if chat.bare_opening is not None else "false",
        "BARE": _quoted(chat.bare_opening or ""),
        "IMAGE": _quoted(image_token),
        "VIDEO": _quoted(video_token),
        "BLOCK": _quoted(chat.block[2] if chat.block else ""),
        "PREFIX": _quoted("".join(tokenizer.convert_ids_to_tokens(list(chat.prefix_ids))).replace("\u2581", " ")),
        "OPENING": _quoted(chat.opening),
        "SYSTEM_BEFORE": _quoted(system[0]),
        "SYSTEM_AFTER": _quoted(system[1]),
        "AGAIN": _quoted(chat.again),
        "BRIDGE": _quoted(chat.bridge),
        "LEAD": _quoted(chat.answer_lead),
        "CLOSE": _quoted(chat.close),
    }
    template = _TEMPLATE
    for name in sorted(values, key=len, reverse=True):
        template = template.replace(name, values[name])
    return template


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
