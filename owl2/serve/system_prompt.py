"""System prompts, for models whose format has no place for one.

Clients send them as a matter of course; the released model's format knows users and answers only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from owl2.errors import InputError
from owl2.processing.chat_template import Message
from owl2.processing.processor import Owl2Processor

PROBE: list[Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]


def takes_system_prompt(processor: Owl2Processor) -> bool:
    """Whether the chat template can write one."""
    try:
        processor.apply_chat_template(PROBE, add_generation_prompt=True)
    except InputError:
        return False
    return True


def into_first_turn(messages: Sequence[Message]) -> list[Message]:
    """The system prompt, if there is one, as the first words of the first user's turn.

    They stand on a line of their own, after images that begin the turn: the model has learned
    images before words. Contents are lists of parts.
    """
    count = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
    lead = [part for message in messages[:count] for part in message["content"]]
    rest = list(messages[count:])
    if not lead or any(part["type"] != "text" for part in lead) or not rest:
        return list(messages)  # there is none, or it is one that the engine will refuse
    parts: list[Mapping[str, Any]] = list(rest[0]["content"])
    place = next((i for i, part in enumerate(parts) if part["type"] == "text"), len(parts))
    parts.insert(place, {"type": "text", "text": "".join(part["text"] + "\n" for part in lead)})
    return [{**rest[0], "content": parts}, *rest[1:]]
