"""Batches in which one prompt may fail without the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from owl2.errors import InputError

if TYPE_CHECKING:
    from owl2.engine.engine import Engine


def batch_or_errors(
    engine: "Engine", conversations: Sequence[list[dict[str, Any]]], **options: Any
) -> list[str | InputError]:
    """The answer to each conversation, or the error that prevents one.

    `Engine.batch` raises before it runs the model if one conversation is invalid, such as one with
    an image that cannot be read. The batch is then split in halves until each error is found.

    Args:
        options: As `Engine.batch` takes them.
    """
    try:
        return [*engine.batch(conversations, **options)]
    except InputError as error:
        if len(conversations) == 1:
            return [error]
    half = len(conversations) // 2
    first = batch_or_errors(engine, conversations[:half], **options)
    return first + batch_or_errors(engine, conversations[half:], **options)
