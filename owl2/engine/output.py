"""Tokens to answers: text chunks, finish reasons and log-probabilities.

::

    token, log-probabilities ──OutputProcessor──► CompletionChunk ──Completion──► the caller
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

from owl2.engine.detokenizer import IncrementalDetokenizer, TokenTexts
from owl2.engine.sampling import Logprobs
from owl2.engine.scheduler import Request

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability (natural logarithm, float32).

    Attributes:
        text: The token's text; bytes that are not a complete character are written as `\\xe4`.
        bytes: UTF-8. The bytes of an answer's tokens, joined, are its text with the white space
            around it. Empty for special tokens, whose text is their name.
        top: The most probable tokens in its place, in descending order, without a `top` themselves.
    """

    id: int
    text: str
    bytes: list[int]
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class CompletionChunk:
    """The new part of one of several answers.

    Attributes:
        index: Which answer.
        text: Final text; empty only in the last chunk of an answer.
        logprobs: If requested, for the tokens that begin in this text; in the last chunk also for
            the end token. Tokens after a stop string are excluded.
        num_tokens: Tokens of this answer so far, with the end token.
        finish_reason: In the last chunk of an answer: `stop` for an end token or a stop string,
            `length` for the maximum number of tokens.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    num_tokens: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class CompletionOutput:
    """One complete answer; the fields are those of `CompletionChunk`."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...]


OnOutput = Callable[[CompletionChunk | BaseException], object]


class OutputProcessor:
    """Makes the chunks of one answer.

    Args:
        index: The answer's index.
        max_tokens: The maximum number of tokens.
        end_ids: Tokens that end the answer.
    """

    def __init__(
        self,
        index: int,
        max_tokens: int,
        end_ids: Collection[int],
        detokenizer: IncrementalDetokenizer,
        token_texts: TokenTexts,
    ) -> None:
        self._index = index
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._detokenizer = detokenizer
        self._token_texts = token_texts
        self._num_tokens = 0
        # Not released yet, with the positions in the text where their tokens begin.
        self._pending: list[tuple[int, TokenLogprob]] = []

    def process(self, token: int, logprobs: Logprobs | None = None) -> CompletionChunk | None:
        """The chunk that the next token completes, if any."""
        detokenizer = self._detokenizer
        self._num_tokens += 1
        begin = detokenizer.num_final
        is_end = token in self._end_ids
        text = "" if is_end else detokenizer.add(token)
        if logprobs is not None:
            top = tuple(self._token_logprob(*alternative) for alternative in logprobs.top)
            self._pending.append((begin, self._token_logprob(token, logprobs.logprob, top)))
        is_stopped = is_end or detokenizer.stop_position is not None
        if not is_stopped and self._num_tokens < self._max_tokens:
            return self._chunk(text, detokenizer.num_released, None) if text else None
        text += detokenizer.finish()
        is_stopped = is_end or detokenizer.stop_position is not None
        return self._chunk(text, detokenizer.stop_position, "stop" if is_stopped else "length")

    def _chunk(
        self, text: str, end: int | None, finish_reason: FinishReason | None
    ) -> CompletionChunk:
        """With the log-probabilities of tokens that begin before `end`; None: of all."""
        released = [own for begin, own in self._pending if end is None or begin < end]
        self._pending = self._pending[len(released) :]
        return CompletionChunk(self._index, text, tuple(released), self._num_tokens, finish_reason)

    def _token_logprob(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        text, data = self._token_texts.find(token)
        return TokenLogprob(token, text, list(data), logprob, top)


class RequestHandle:
    """A submitted request.

    Attributes:
        num_prompt_tokens: Tokens of the prompt, K + 1 for each image.
    """

    def __init__(self, num_prompt_tokens: int, requests: Sequence[Request]) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._requests = requests

    def abort(self) -> None:
        """End the request before the engine's next step. From any thread; may be repeated."""
        for request in self._requests:
            request.aborted = True


class Completion(Iterator[CompletionChunk]):
    """The chunks of one or several answers, in the order in which they are generated.

    The request is submitted when the first chunk is asked for. One thread iterates; any thread may
    `close`. The context manager closes it.

    Attributes:
        num_prompt_tokens: Tokens of the prompts, K + 1 for each image.

    Raises:
        InputError: While iterating: logits that are not finite.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        num_answers: int,
        submit: Callable[[OnOutput], RequestHandle],
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._num_unfinished = num_answers
        self._submit = submit
        self._outputs: SimpleQueue[CompletionChunk | BaseException | None] = SimpleQueue()
        self._handle: RequestHandle | None = None
        self._closed = False

    def __next__(self) -> CompletionChunk:
        """The next chunk; StopIteration after the last one, and after `close`."""
        if self._closed or not self._num_unfinished:
            raise StopIteration
        try:
            if self._handle is None:
                self._handle = self._submit(self._outputs.put)
                self._abort_if_closed()  # by another thread meanwhile
            item = self._outputs.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if item is None or self._closed:
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._num_unfinished -= item.finish_reason is not None
        return item

    def __enter__(self) -> "Completion":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Abort the request. A thread that waits for a chunk gets no more."""
        self._closed = True
        self._abort_if_closed()
        self._outputs.put(None)

    def _abort_if_closed(self) -> None:
        if self._closed and self._handle is not None:
            self._handle.abort()

    def outputs(self) -> list[CompletionOutput]:
        """All complete answers, by index.

        Raises:
            CancelledError: The completion was closed before.
        """
        chunks: dict[int, list[CompletionChunk]] = {}
        for chunk in self:
            chunks.setdefault(chunk.index, []).append(chunk)
        if self._closed:
            raise CancelledError("the completion was closed before its answers were complete")
        return [_join(chunks[index]) for index in sorted(chunks)]


def _join(chunks: Sequence[CompletionChunk]) -> CompletionOutput:
    last = chunks[-1]
    assert last.finish_reason is not None
    text = "".join(chunk.text for chunk in chunks)
    logprobs = tuple(own for chunk in chunks for own in chunk.logprobs)
    return CompletionOutput(text, last.finish_reason, last.num_tokens, logprobs)
