"""Offline inference: any number of conversations, in batches. Some may be invalid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message
from owl2.processing.prepared_prompt import PreparedPrompt

if TYPE_CHECKING:
    from owl2.engine.engine import Adapters, Engine, Prompt

Messages = Sequence[Message]
Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def output_all(
    engine: "Engine", conversations: Iterable[Messages], batch_size: int, **options: Any
) -> Iterator[CompletionChunk | InputError]:
    """The answer to each conversation, in order, or the error that prevents it.

    Args:
        conversations: They are read lazily, while earlier ones are answered.
        batch_size: Conversations per batch.
        options: As `Engine.batch` takes them.
    """

    def answer(prompts: list[PreparedPrompt]) -> list[CompletionChunk | InputError]:
        try:
            return [*engine.batch_outputs(prompts, **options)]
        except InputError as error:  # such as logits that are not finite
            if len(prompts) == 1:
                return [error]
        return [output for prompt in prompts for output in answer([prompt])]

    for prompts in encode_batches(engine.encode, conversations, batch_size):
        valid = [prompt for prompt in prompts if isinstance(prompt, PreparedPrompt)]
        answers = iter(answer(valid))
        for prompt in prompts:
            yield next(answers) if isinstance(prompt, PreparedPrompt) else prompt


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
        try:
            encoded.append(engine.encode(prompt, adapter=name))
        except InputError as error:
            where = f"Conversation {index}: " if len(prompts) > 1 else ""
            raise InputError(f"{where}{error}", error.code) from error
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
