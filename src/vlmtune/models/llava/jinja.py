"""The Vicuna prompt of LLaVA and XTuner as a chat template for transformers, in exports of folders that have none."""

TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
        {%- endif -%}
        {{- eos_token + '\\n' -}}
    {%- else -%}
        {{- bos_token + 'USER: ' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'image' -%}
                {{- '<image>' + ('\\n' if loop.last else ' ') -}}
            {%- endfor -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
        {%- endif -%}
        {{- ' ASSISTANT:' -}}
    {%- endif -%}
{%- endfor -%}
"""
