"""Offline inference: any number of conversations, in batches. Some may be invalid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from owl2.engine.output import CompletionChunk
from owl2.engine.sampler import non_finite_error
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import Message
from owl2.processing.prepared_prompt import PreparedPrompt

if TYPE_CHECKING:
    from owl2.engine.engine import Adapters, Engine, Prompt

Messages = Sequence[Message]
Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


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


def next_token_logits(
    engine: "Engine", prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
) -> torch.Tensor:
    """The logits of W tokens after each of B prompts: (B, W) in float32 on the CPU.

    Nothing is generated. Prompts of several threads are computed together, and the tokens that they
    share at their start only once.

    Raises:
        InputError: A prompt does not fit the model, or logits are not finite.
    """
    for prompt in prompts:
        engine.encode(prompt)
    if engine.core is not None:
        rows = engine.core.next_token_logits(list(map(engine.core.state, prompts)))
    else:
        rows = [engine.run_prefilled(prompt, lambda output: output.logits[0]) for prompt in prompts]
    logits = torch.stack(rows)[:, list(token_ids)].float().cpu()
    if not logits.isfinite().all():
        raise non_finite_error(engine.model.dtype, "the next token")
    return logits
