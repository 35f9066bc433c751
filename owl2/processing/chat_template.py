"""Messages → one text, and which of its characters are to be learned.

::

    messages ──parse_messages──► ParsedMessages (turns, images) ──render──► text, answers' spans

The format is a Jinja template, saved with the checkpoint: another language model's format is data.
What an answer is, the template says with `{% generation %}`; ids and labels come from this one
text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from owl2.errors import ErrorCode, InputError

IMAGE_TOKEN = "<|image|>"

# SPEC 1.5. Rounds are joined with nothing; the space before an answer is the answer's, as it is
# part of its first token. Contents may be strings or lists of parts, for other tools that use this
# file.
DEFAULT_CHAT_TEMPLATE = """\
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {{- part['text'] if part['type'] == 'text' else '<|image|>' -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + body(message['content']) -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ASSISTANT:' -}}
    {%- generation -%}
      {{- ' ' + body(message['content']) + eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- raise_exception('the format of mPLUG-Owl2 has no ' + message['role'] + ' prompt; \
put that text at the start of the first user turn') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ' ASSISTANT:' -}}
{%- endif -%}
"""

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
_ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class ParsedMessages:
    """Checked messages. Parts are `{"type": "text", "text": str}` and `{"type": "image"}`.

    `images`: what the image parts hold, in order of appearance, as `load_image` takes it (not yet
    opened); a bare `{"type": "image"}` has none.
    """

    turns: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]

    @property
    def is_open(self) -> bool:
        """Whether the last turn waits for an answer."""
        return bool(self.turns[-1]["role"] == "user")


# ------------------------------------------------------------------ messages → ParsedMessages


def parse_messages(messages: Sequence[Message]) -> ParsedMessages:
    """transformers' message format → `ParsedMessages`.

    Roles alternate from `user` on (a template may allow `system` before it). A content is a string
    or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image" | "url" | "path"
    | "base64": ...}` or OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`. `<|image|>` in
    a text marks an image too.

    Raises `InputError` that names the message: unknown or misplaced role, an empty turn, a part of
    another kind, an image in an answer.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"Messages must be a list of {{'role': ..., 'content': ...}}, not {_article(messages)}."
        )
    if not messages:
        raise InputError("The list of messages is empty: give at least one user turn.")
    turns: list[dict[str, Any]] = []
    images: list[Any] = []
    expected = "user"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(
                f"{where} must be a dict with 'role' and 'content', not {message!r:.100}."
            )
        role = message["role"]
        _check_role(role, expected, index, where)
        parts = _read_content(message["content"], role, where, images)
        turns.append({"role": role, "content": parts})
        expected = "assistant" if role == "user" else "user"
    if turns[-1]["role"] == "system":
        raise InputError(
            "The messages hold a system prompt only: add a user turn.", ErrorCode.INVALID_ROLE
        )
    return ParsedMessages(tuple(turns), tuple(images))


def validate_prompt(messages: Sequence[Message]) -> ParsedMessages:
    """Parse messages that must end with a user message that contains text.

    Raises:
        InputError: As `parse_messages`; also if the last message is an answer, or has no text.
    """
    parsed = parse_messages(messages)
    message = parsed.turns[-1]
    if message["role"] != "user":
        raise InputError(
            "The last message is an answer; the conversation must end with a user message.",
            ErrorCode.INVALID_ROLE,
        )
    if not content_to_text(message["content"]).replace(IMAGE_TOKEN, "").strip():
        raise InputError(
            "The question is empty: the last user message has no text.", ErrorCode.EMPTY_MESSAGE
        )
    return parsed


def user_message(text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """The user message of a question and its images, as `Engine.chat` takes it.

    Images replace the `<|image|>` placeholders of the text, or precede the text if it has none.

    Raises:
        InputError: The numbers of placeholders and images differ.
    """
    texts = text.split(IMAGE_TOKEN)
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    elif len(texts) - 1 != len(images):
        raise InputError(
            f"The question has {len(texts) - 1} {IMAGE_TOKEN} placeholder(s) for {len(images)} "
            "image(s): each placeholder takes one image.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    parts: list[dict[str, Any]] = []
    for index, segment in enumerate(texts):
        if index:
            parts.append({"type": "image", "image": images[index - 1]})
        if segment:
            parts.append({"type": "text", "text": segment})
    return {"role": "user", "content": parts}


def content_to_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """The parts of a message joined with nothing between, images as `<|image|>`."""
    return "".join(part["text"] if part["type"] == "text" else IMAGE_TOKEN for part in parts)


def has_lone_surrogate(text: str) -> bool:
    """Whether a surrogate stands alone in it, as where JSON was cut in the middle of an emoji.

    Python takes it for text; tokenizers and files do not.
    """
    return re.search("[\ud800-\udfff]", text) is not None


def _check_role(role: Any, expected: str, index: int, where: str) -> None:
    if role not in _ROLES:
        raise InputError(
            f"{where} has the role {role!r}; roles are {', '.join(_ROLES)}.", ErrorCode.INVALID_ROLE
        )
    if role == "system" and index == 0:
        return
    if role != expected:
        raise InputError(
            f"{where} has the role {role!r} where {expected!r} is due: turns alternate, "
            "the user begins.",
            ErrorCode.INVALID_ROLE,
        )


def _read_content(content: Any, role: str, where: str, images: list[Any]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        parts = [
            _read_part(part, f"{where}, part {number}", images)
            for number, part in enumerate(content)
        ]
    else:
        raise InputError(
            f"The content of {where} must be a text or a list of parts, not {_article(content)}.",
            ErrorCode.INVALID_TYPE,
        )
    text = content_to_text(parts)
    if role != "user" and IMAGE_TOKEN in text:
        raise InputError(
            f"{where} is the {role}'s and holds an image; only user turns can.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    if has_lone_surrogate(text):
        raise InputError(
            f"{where} ({role}) holds half of a character (such as \\ud83d without its other half), "
            "which is no text: remove it."
        )
    if not text.strip():
        raise InputError(
            f"{where} ({role}) is empty: every turn needs a text or an image.",
            ErrorCode.EMPTY_MESSAGE,
        )
    return parts


def _read_part(part: Any, where: str, images: list[Any]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise InputError(f"{where} must be a dict with a 'type', not {_article(part)}.")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(
                f"{where} is of type 'text' and must hold a string under 'text'.",
                ErrorCode.INVALID_TYPE,
            )
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        hint = " Give a video as its frames, each an image." if kind == "video" else ""
        raise InputError(f"{where} is of type {kind!r}; types are 'text' and 'image'.{hint}")
    given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{where} gives its image more than once, as {' and '.join(given)}.")
    if given:
        images.append(_image_source(given[0], part[given[0]], where))
    return {"type": "image"}


def _image_source(key: str, value: Any, where: str) -> Any:
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "image":
        return value
    if key == "path" and isinstance(value, (str, Path)):
        return Path(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, not {_article(value)}.")
    if key == "base64" and not value.startswith("data:"):
        return f"data:;base64,{value}"
    return value


def _article(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# ------------------------------------------------------------------ ParsedMessages → text


def render(
    conversation: ParsedMessages,
    template: str,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The conversation as one text, images as `<|image|>`.

    `variables`: others of the template. Raises `InputError` with what the template objects to, or
    if the prompt is to be opened after an answer, or an answer to be continued that is not there.
    """
    if conversation.is_open and continue_final_message:
        raise InputError("continue_final_message needs an assistant turn at the end to continue.")
    if not conversation.is_open and add_generation_prompt:
        raise InputError(
            "The last message is an answer: end with a user turn to open the next one."
        )
    text, _ = _render(
        conversation,
        template,
        special_tokens,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **variables,
    )
    return text


def render_with_answers(
    conversation: ParsedMessages, template: str, special_tokens: Mapping[str, str]
) -> tuple[str, Spans]:
    """`render` of a closed conversation, and the (start, end) of what the template marks as
    generated.

    Raises `InputError` for a template without `{% generation %}` blocks: it would leave nothing to
    learn.
    """
    if not _GENERATION_BLOCK.search(template):
        raise InputError(
            "The chat template does not mark what the model is to learn. In chat_template.jinja, "
            "put {% generation %} before and {% endgeneration %} after the assistant's text and "
            "its end token."
        )
    return _render(conversation, template, special_tokens, return_assistant_tokens_mask=True)


def has_variable(template: str, name: str) -> bool:
    """Whether `name` occurs in the template's code, so that its value can change something."""
    return any(re.search(rf"\b{re.escape(name)}\b", code) for code in _CODE.findall(template))


def _render(
    conversation: ParsedMessages,
    template: str,
    special_tokens: Mapping[str, str],
    **options: Any,
) -> tuple[str, Spans]:
    turns: list[dict[str, Any]] = list(conversation.turns)
    if not _understands_parts(template, tuple(special_tokens.items())):
        turns = [{**turn, "content": content_to_text(turn["content"])} for turn in turns]
    variables: dict[str, Any] = {**special_tokens, **options}
    try:
        return _render_turns(turns, template, variables)
    except Exception as error:  # a template is foreign code: `{{ 1/0 }}` is a ZeroDivisionError
        raise InputError(f"The chat template cannot write these messages: {error}.") from error


def _render_turns(
    turns: list[dict[str, Any]], template: str, variables: dict[str, Any]
) -> tuple[str, Spans]:
    # transformers compiles a template once and keeps it; its annotation says `str`, it gives lists.
    rendered: Any = render_jinja_template([turns], chat_template=template, **variables)
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0]] if spans else []


@lru_cache(maxsize=16)
def _understands_parts(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template writes a list of parts (as vision models' do) or wants plain strings.

    Found by trying, as nothing in a template says so: a text model's fails or prints the list.
    """
    parts = [{"type": "image"}, {"type": "text", "text": "probe"}]
    try:
        text, _ = _render_turns(
            [{"role": "user", "content": parts}], template, dict(special_tokens)
        )
    except Exception:  # foreign code, as in `_render`, which says so if plain strings fail too
        return False
    return text.count(IMAGE_TOKEN) == 1 and text.count("probe") == 1 and "'type'" not in text
