"""Offline inference: any number of conversations, in batches. Some may be invalid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.processing.messages import Message
from owl2.processing.prepared_prompt import PreparedPrompt

if TYPE_CHECKING:
    from owl2.engine.engine import Adapters, Engine, Prompt

Messages = Sequence[Message]
Item = TypeVar("Item")
Encoded = TypeVar("Encoded")
Result = TypeVar("Result")


def output_all(
    engine: "Engine", conversations: Iterable[Messages], batch_size: int, **options: Any
) -> Iterator[CompletionChunk | InputError]:
    """The answer to each conversation, in order, or the error that prevents it.

    Args:
        batch_size: Conversations per batch.
        options: As `Engine.batch` takes them.
    """
    answer = partial(engine.batch_outputs, **options)
    return map_batches(engine.encode, answer, conversations, batch_size)


def map_batches(
    encode: Callable[[Item], Encoded],
    compute: Callable[[list[Encoded]], Sequence[Result]],
    items: Iterable[Item],
    batch_size: int,
) -> Iterator[Result | InputError]:
    """What `compute` returns for each encoded item, in order, or the error that prevents it.

    Args:
        encode: See `encode_batches`.
        compute: See `compute_each`.
    """
    for batch in encode_batches(encode, items, batch_size):
        valid = [encoded for encoded in batch if not isinstance(encoded, InputError)]
        results = iter(compute_each(compute, valid))
        for encoded in batch:
            yield encoded if isinstance(encoded, InputError) else next(results)


def compute_each(
    compute: Callable[[list[Encoded]], Sequence[Result]], items: list[Encoded]
) -> list[Result | InputError]:
    """The result of each item, or its error.

    Args:
        compute: The results of several items. If it raises an `InputError`, such as that of logits
            that are not finite, it is called for each item alone.
    """
    if not items:
        return []
    try:
        return [*compute(items)]
    except InputError as error:
        if len(items) == 1:
            return [error]
    return [result for item in items for result in compute_each(compute, [item])]


def encode_all(
    engine: "Engine", prompts: Sequence["Prompt"], adapter: "Adapters"
) -> list[PreparedPrompt]:
    """The prompts of conversations, as `Engine.encode` makes them; errors name the conversation."""
    names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else adapter
    if len(names) != len(prompts):
        raise InputError(
            f"There are {len(names)} adapters for {len(prompts)} conversations.",
            ErrorCode.INVALID_VALUE,
        )
    encoded = []
    for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        with error_prefix(f"Conversation {index}: " if len(prompts) > 1 else ""):
            encoded.append(engine.encode(prompt, adapter=name))
    return encoded


def encode_batches(
    encode: Callable[[Item], Encoded], items: Iterable[Item], batch_size: int
) -> Iterator[list[Encoded | InputError]]:
    """Batches of what `encode` returns for items, or its `InputError`.

    Items are read lazily. Threads read the images of the next batch while one is used.
    """

    def encode_one(item: Item) -> Encoded | InputError:
        try:
            return encode(item)
        except InputError as error:
            return error

    remaining = iter(items)
    with ThreadPoolExecutor() as pool:

        def submit() -> list[Future[Encoded | InputError]]:
            return [pool.submit(encode_one, item) for item in islice(remaining, batch_size)]

        pending = submit()
        while pending:
            encoded = [future.result() for future in pending]
            pending = submit()
            yield encoded
