"""Texts, a template and messages that several of these tests use."""

TEXTS = [
    "USER: What colour is the circle? ASSISTANT: red",
    "USER: Is there a triangle in the picture?\n\nASSISTANT: yes, 12 of them",
    "Answer the question using a single word or phrase.",
]

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def ask(*parts: object, answer: str | None = None) -> list[dict]:
    """One round; strings are texts, anything else is a picture."""
    content: list[dict] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    messages: list[dict] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages
