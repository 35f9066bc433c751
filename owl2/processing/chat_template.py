"""Parsed messages to text, with the spans of the answers.

::

    ParsedMessages ──render──► text with `<|image|>` and `<|video|>`, answer spans

The format is a Jinja template that is saved with the checkpoint, so that formats of other language
models need no code. The template marks answers with `{% generation %}`. Ids and labels come from
this one text.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

from owl2.errors import ErrorCode, InputError
from owl2.processing.message_parts import (
    IMAGE_TOKEN,
    MEDIA,
    TOKENS,
    content_to_text,
    insert_image_newlines,
    split_leading_images,
    text_to_parts,
)
from owl2.processing.messages import ParsedMessages

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Arguments of transformers' renderer, and of `order_images`; others are variables of the template.
RENDER_OPTIONS = {"add_generation_prompt", "continue_final_message", "tools", "documents"}
RENDER_OPTIONS |= {"interleave_images"}

# transformers caches compiled templates, and each has one list of the answers being rendered.
_render_lock = threading.Lock()

Spans = list[tuple[int, int]]


def render(
    conversation: ParsedMessages,
    template: str,
    special_tokens: Mapping[str, str],
    image_newline: bool = False,
    **options: Any,
) -> tuple[str, Spans]:
    """The conversation as text, with `<|image|>` for images and `<|video|>` for videos.

    For the template a video is an image.

    System messages are moved into the first user message if the template does not support them.

    Args:
        image_newline: See `insert_image_newlines`.
        options: `RENDER_OPTIONS`, `return_assistant_tokens_mask`, and variables of the template.

    Returns:
        The text, and with `return_assistant_tokens_mask` the start and end of each answer in it.

    Raises:
        InputError: The template raises an exception, an option does not fit the last message, or
            answers are requested from a template without `{% generation %}` blocks.
    """
    last = "user" if conversation.is_open else "assistant"
    for option, needed in (
        ("add_generation_prompt", "user"),
        ("continue_final_message", "assistant"),
    ):
        if options.get(option) and last != needed:
            raise InputError(
                f"{option} requires that the last message has the role {needed!r}.",
                ErrorCode.INVALID_ROLE,
            )
    if options.get("return_assistant_tokens_mask") and not _GENERATION_BLOCK.search(template):
        raise InputError(
            "The chat template does not mark the answers. In chat_template.jinja, put "
            "{% generation %} before and {% endgeneration %} after the assistant's text and its "
            "end token.",
            ErrorCode.NO_LABELS,
        )
    turns: list[dict[str, Any]] = list(conversation.turns)
    special_tokens = {"image_token": IMAGE_TOKEN, **special_tokens}
    tokens = tuple(special_tokens.items())
    if turns[0]["role"] == "system" and not _supports_system(template, tokens):
        turns = merge_system(turns)
    if image_newline:
        turns = insert_image_newlines(turns)
    kinds = [kind for turn in turns for kind in MEDIA.findall(content_to_text(turn["content"]))]
    turns = [{**turn, "content": [_as_image(part) for part in turn["content"]]} for turn in turns]
    has_images = any(part["type"] == "image" for turn in turns for part in turn["content"])
    if not _understands_parts(template, tokens, has_images):
        turns = [{**turn, "content": content_to_text(turn["content"])} for turn in turns]
    try:
        text, spans = _render(turns, template, {**special_tokens, **options})
        unused = iter(kinds)  # both placeholders have the same length, so that `spans` are valid
        return MEDIA.sub(lambda found: TOKENS[next(unused, found[1])], text), spans
    except Exception as error:  # a template can raise any exception: `{{ 1/0 }}`
        raise InputError(
            f"The chat template cannot render these messages: {error}.", ErrorCode.UNSUPPORTED
        ) from error


def _as_image(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "video" else part


def expand_placeholders(text: str, spans: Spans, replacements: Sequence[str]) -> tuple[str, Spans]:
    """Replace each `<|image|>` and `<|video|>` of a text, by the crops or the frames.

    Args:
        spans: Start and end of the answers in `text`, which contain no placeholder.
    """
    unused, shifts = iter(replacements), [(0, 0)]

    def replace(found: re.Match[str]) -> str:
        replacement = next(unused)
        shifts.append((found.end(), shifts[-1][1] + len(replacement) - len(found[0])))
        return replacement

    expanded = MEDIA.sub(replace, text)
    moved = []
    for start, end in spans:
        shift = next(shift for place, shift in reversed(shifts) if place <= start)
        moved.append((start + shift, end + shift))
    return expanded, moved


def select_template(templates: Any, template: str | None = None) -> str:
    """The template of a processor with one or several templates.

    Args:
        templates: A template, or a dict of templates by name.
        template: A template to use instead, or a name in `templates`; default: the only one, or
            "default".
    """
    if isinstance(templates, dict):
        template = templates.get(template or "default", template)
    elif template is None:
        template = templates
    if not isinstance(template, str):
        raise InputError(
            f"The chat template must be a string, not {template!r}.", ErrorCode.INVALID_TYPE
        )
    return template


def template_variables(template: str) -> set[str]:
    """The variables of a template for callers: without messages and `RENDER_OPTIONS`.

    Raises:
        InputError: The template is invalid.
    """
    try:
        names: Any = _get_template_variables(template)
    except TemplateError as error:
        raise InputError(
            f"The chat template cannot render messages: {error}.", ErrorCode.UNSUPPORTED
        ) from error
    return set(names) - RENDER_OPTIONS - {"messages"}


def _render(
    turns: list[dict[str, Any]], template: str, variables: dict[str, Any]
) -> tuple[str, Spans]:
    # It is annotated with `str` but returns lists.
    with _render_lock:
        rendered: Any = render_jinja_template([turns], chat_template=template, **variables)
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def merge_system(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns without system messages, whose texts become lines of the first user message.

    They follow the leading images, because the model was trained with images before the text.
    """
    count = next(i for i, turn in enumerate(turns) if turn["role"] != "system")
    lines = "".join(f"{content_to_text(turn['content'])}\n" for turn in turns[:count])
    images, text = split_leading_images(turns[count])
    parts = text_to_parts(images + lines + text)
    return [{**turns[count], "content": parts}, *turns[count + 1 :]]


@lru_cache(maxsize=16)
def _supports_system(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template accepts the role `system`."""
    messages = [{"role": "system", "content": "probe"}, {"role": "user", "content": "user"}]
    try:
        text, _ = _render(messages, template, dict(special_tokens))
    except Exception:  # as in `render`
        return False
    return "probe" in text


@lru_cache(maxsize=32)
def _understands_parts(
    template: str, special_tokens: tuple[tuple[str, str], ...], has_images: bool
) -> bool:
    """Whether a template supports lists of parts, as those of vision models do.

    Determined by rendering a message: templates of text models fail or print the list.
    """
    parts = [{"type": "image"}] * has_images + [{"type": "text", "text": "probe"}]
    try:
        text, _ = _render([{"role": "user", "content": parts}], template, dict(special_tokens))
    except Exception:  # as in `render`, which raises if strings fail as well
        return False
    images = text.count(IMAGE_TOKEN)
    return images == has_images and text.count("probe") == 1 and "'type'" not in text
