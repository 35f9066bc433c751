"""Texts, a template, messages and images for several tests."""

import io

import numpy as np
from PIL import Image

from owl2.processing.processor import Owl2Processor

TEXTS = [
    "USER: What colour is the circle? ASSISTANT: red",
    "USER: Is there a triangle in the image?\n\nASSISTANT: yes, 12 of them",
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
    """One round; strings are texts, anything else is an image."""
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


def equal_processors(one: Owl2Processor, other: Owl2Processor, image: object) -> None:
    """Asserts that both give the same samples and prompts."""
    messages = [*ask(image, "What  is it?", answer="A bus."), *ask("Sure?", answer="Yes")]
    for first, second in (
        (one.for_training(messages), other.for_training(messages)),
        (one(text=["a", "b  c d"], padding=True), other(text=["a", "b  c d"], padding=True)),
    ):
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)
    assert one.chat_template == other.chat_template
    assert one.to_dict() == other.to_dict()


def gradient(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    red = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    image = Image.fromarray(np.stack([red, red[::-1], 255 - red], -1).astype(np.uint8))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
