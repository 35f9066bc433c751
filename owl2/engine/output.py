"""Tokens to answers: text chunks, finish reasons and log-probabilities.

::

    token, log-probabilities ──OutputProcessor──► CompletionChunk ──Completion──► the caller
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event
from typing import Any, Literal

from owl2.engine.detokenizer import IncrementalDetokenizer
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
    """The new part of one of several answers, or from `Completion.outputs` a complete answer.

    Attributes:
        index: Which answer.
        text: Final text; empty only in the last chunk of an answer.
        logprobs: If requested, for the tokens that begin in this text; in the last chunk also for
            the end token. Tokens after a stop string are excluded.
        num_tokens: Tokens of this answer so far, with the end token.
        finish_reason: In the last chunk of an answer: `stop` for an end token, a stop string or a
            complete grammar, `length` for the maximum number of tokens.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    num_tokens: int
    finish_reason: FinishReason | None


def join_chunks(chunks: Iterable[CompletionChunk]) -> list[CompletionChunk]:
    """Complete answers, by index."""
    answers: dict[int, list[CompletionChunk]] = {}
    for chunk in chunks:
        answers.setdefault(chunk.index, []).append(chunk)
    outputs = []
    for _, parts in sorted(answers.items()):
        text = "".join(part.text for part in parts)
        logprobs = tuple(own for part in parts for own in part.logprobs)
        outputs.append(replace(parts[-1], text=text, logprobs=logprobs))
    return outputs


OnOutput = Callable[[CompletionChunk | BaseException], object]
Abort = Callable[[], None]


class OutputProcessor:
    """Makes the chunks of one answer.

    Args:
        request: Its `on_token` is `process`.
        token_text: See `detokenizer.token_texts`.
        on_output: Gets the chunks. The last one may follow a stop string; it aborts the request.
    """

    def __init__(
        self,
        request: Request,
        detokenizer: IncrementalDetokenizer,
        token_text: Callable[[int], tuple[str, bytes]],
        on_output: OnOutput,
    ) -> None:
        self._request = request
        self._detokenizer = detokenizer
        self._token_text = token_text
        self._on_output = on_output
        # Not released yet, with the positions in the text where their tokens begin.
        self._pending: list[tuple[int, TokenLogprob]] = []

    def process(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Pass on the chunk that the next token completes, if any."""
        request, detokenizer = self._request, self._detokenizer
        begin = len(detokenizer.text)
        text = "" if request.has_end_token else detokenizer.add(token)
        if logprobs is not None:
            own, *top = [self._token_logprob(*pair) for pair in logprobs]
            self._pending.append((begin, replace(own, top=tuple(top))))
        reason: FinishReason | None = None
        end: int | None = detokenizer.num_released
        if request.is_finished or detokenizer.stop_position is not None:
            text += detokenizer.finish()
            end = detokenizer.stop_position
            reason = "length" if end is None and not request.is_stopped else "stop"
        if request.aborted or not (text or reason):
            return
        if reason is not None:
            request.aborted = True
        # Of tokens that begin before `end`; of all if it is None.
        released = [own for start, own in self._pending if end is None or start < end]
        self._pending = self._pending[len(released) :]
        count = len(request.token_ids)
        self._on_output(CompletionChunk(request.index, text, tuple(released), count, reason))

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        text, data = self._token_text(token)
        return TokenLogprob(token, text, list(data), logprob)


class Completion(AbstractContextManager["Completion"], Iterator[CompletionChunk]):
    """The chunks of one or several answers, in the order in which they are generated.

    The first `next` submits the request. One thread iterates; any thread may `close`. The context
    manager closes it.

    Attributes:
        num_prompt_tokens: Tokens of the prompts, K + 1 for each image.

    Raises:
        InputError: While iterating: logits that are not finite.
    """

    def __init__(
        self, num_prompt_tokens: int, num_answers: int, submit: Callable[[OnOutput], Abort]
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._num_unfinished = num_answers
        self._submit = submit
        self._outputs: SimpleQueue[CompletionChunk | BaseException | None] = SimpleQueue()
        self._abort: Abort | None = None
        self._closed = Event()

    def __next__(self) -> CompletionChunk:
        """The next chunk; StopIteration after the last one, and after `close`."""
        if self._closed.is_set() or not self._num_unfinished:
            raise StopIteration
        try:
            if self._abort is None:
                self._abort = self._submit(self._outputs.put)
                if self._closed.is_set():  # by another thread meanwhile
                    self._abort()
            item = self._outputs.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if item is None or self._closed.is_set():
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._num_unfinished -= item.finish_reason is not None
        return item

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Abort the request. A thread that waits for a chunk gets no more."""
        self._closed.set()
        if self._abort is not None:
            self._abort()
        self._outputs.put(None)

    def outputs(self) -> list[CompletionChunk]:
        """All complete answers, by index.

        Raises:
            CancelledError: The completion was closed before.
        """
        chunks = list(self)
        if self._closed.is_set():
            raise CancelledError("the completion was closed before its answers were complete")
        return join_chunks(chunks)
