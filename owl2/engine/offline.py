"""Offline inference: any number of conversations in batches, of which some may be invalid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from owl2.engine.output import CompletionChunk
from owl2.errors import InputError
from owl2.processing.messages import Message
from owl2.processing.prepared_prompt import PreparedPrompt

if TYPE_CHECKING:
    from owl2.engine.engine import Engine

Messages = Sequence[Message]
Encoded = PreparedPrompt | InputError


def answer_all(
    engine: "Engine", conversations: Iterable[Messages], batch_size: int, **options: Any
) -> Iterator[str | InputError]:
    """The answer to each conversation, in order, or the error that prevents it.

    Args:
        batch_size: Conversations per batch.
        options: As `Engine.batch` takes them.
    """
    for output in output_all(engine, conversations, batch_size, **options):
        yield output if isinstance(output, InputError) else output.text


def output_all(
    engine: "Engine", conversations: Iterable[Messages], batch_size: int, **options: Any
) -> Iterator[CompletionChunk | InputError]:
    """`answer_all` with the token counts and finish reasons of the answers."""

    def answer(prompts: list[PreparedPrompt]) -> list[CompletionChunk | InputError]:
        try:
            return [*engine.batch_outputs(prompts, **options)]
        except InputError as error:  # such as logits that are not finite
            if len(prompts) == 1:
                return [error]
        return [output for prompt in prompts for output in answer([prompt])]

    for prompts in encode_batches(engine.encode, conversations, batch_size):
        answers = iter(answer([one for one in prompts if isinstance(one, PreparedPrompt)]))
        for prompt in prompts:
            yield next(answers) if isinstance(prompt, PreparedPrompt) else prompt


def encode_batches(
    encode: Callable[[Messages], PreparedPrompt], conversations: Iterable[Messages], batch_size: int
) -> Iterator[list[Encoded]]:
    """Batches of prompts, each the result of `encode` or its `InputError`.

    Conversations are read lazily. Threads read the images of the next batch while one is used.
    """

    def encode_one(messages: Messages) -> Encoded:
        try:
            return encode(messages)
        except InputError as error:
            return error

    remaining = iter(conversations)
    with ThreadPoolExecutor() as pool:

        def submit() -> list[Future[Encoded]]:
            return [pool.submit(encode_one, messages) for messages in islice(remaining, batch_size)]

        pending = submit()
        while pending:
            prompts = [future.result() for future in pending]
            pending = submit()
            yield prompts
