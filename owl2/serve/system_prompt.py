"""System prompts for chat templates without a system role.

Many clients send system prompts, but the format of the released model only has users and answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from owl2.errors import InputError
from owl2.processing.chat_template import Message
from owl2.processing.processor import Owl2Processor

PROBE: list[Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]


def supports_system_prompt(processor: Owl2Processor) -> bool:
    """Whether the chat template accepts the role `system`."""
    try:
        processor.apply_chat_template(PROBE, add_generation_prompt=True)
    except InputError:
        return False
    return True


def merge_system_prompt(messages: Sequence[Message]) -> list[Message]:
    """The messages with leading system prompts moved into the first user message.

    Each prompt becomes a line before the first text of the message. It follows leading images,
    because the model was trained with images before the text. Contents are lists of parts.
    """
    count = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
    prompts = [part for message in messages[:count] for part in message["content"]]
    rest = list(messages[count:])
    if not prompts or any(part["type"] != "text" for part in prompts) or not rest:
        return list(messages)  # nothing to merge, or the engine rejects it
    parts: list[Mapping[str, Any]] = list(rest[0]["content"])
    index = next((i for i, part in enumerate(parts) if part["type"] == "text"), len(parts))
    parts.insert(index, {"type": "text", "text": "".join(f"{part['text']}\n" for part in prompts)})
    return [{**rest[0], "content": parts}, *rest[1:]]
