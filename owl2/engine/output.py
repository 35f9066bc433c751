"""Tokens to answers: text chunks, finish reasons and log-probabilities.

::

    token, log-probabilities ──OutputProcessor──► CompletionChunk ──Completion──► the caller
"""

from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event
from typing import Any, Literal, NamedTuple

from owl2.engine.detokenizer import IncrementalDetokenizer
from owl2.engine.sampler import Logprobs
from owl2.engine.scheduler import Request

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability (natural logarithm, float32).

    Attributes:
        text: What the token adds to the answer: the texts of its tokens, joined, are its text. Of
            the tokens of one character, the last one has the text. The text of an end token is its
            name.
        bytes: UTF-8. The bytes of an answer's tokens, joined, are its text. Empty for end tokens.
        top: The most probable tokens in its place, in descending order, without a `top` themselves.
            Their bytes that are not a complete character are written as `\\xe4` in the text.
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
        logprobs: If requested, for the tokens of this text; in the last chunk also for the end
            token. Tokens after a stop string are excluded.
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
        self._pending: list[_TokenSpan] = []  # not released yet

    def process(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Pass on the chunk that the next token completes, if any."""
        request, detokenizer = self._request, self._detokenizer
        begin = len(detokenizer.text)
        text = "" if request.has_end_token else detokenizer.add(token)
        if logprobs is not None:
            own, *top = [self._token_logprob(*pair) for pair in logprobs]
            own = replace(own, top=tuple(top))
            self._pending.append(_TokenSpan(begin, len(detokenizer.text), own))
        reason: FinishReason | None = None
        if request.is_finished or detokenizer.stop_position is not None:
            text += detokenizer.finish()
            is_stopped = request.is_stopped or detokenizer.stop_position is not None
            reason = "stop" if is_stopped else "length"
        if request.aborted or not (text or reason):
            return
        if reason is not None:
            request.aborted = True
        released = tuple(self._release_logprobs(is_last=reason is not None))
        count = len(request.token_ids)
        self._on_output(CompletionChunk(request.index, text, released, count, reason))

    def _release_logprobs(self, is_last: bool) -> Iterator[TokenLogprob]:
        """The tokens whose text was released; in the last chunk all, except after a stop string.

        Tokens that are parts of one text, such as the bytes of a character, are released together.
        """
        detokenizer, group, index = self._detokenizer, list[_TokenSpan](), 0
        for index, token in enumerate(self._pending, 1):
            group.append(token)
            end = token.end
            if is_last and index == len(self._pending):
                end = len(detokenizer.text)  # incomplete characters are complete now
            elif token.end == token.start:
                continue
            stop = detokenizer.stop_position
            if stop is not None and group[0].start >= stop:
                break
            if not is_last and end > detokenizer.num_released:
                break
            yield from self._with_texts(group, end)
            group = []
        self._pending = [] if is_last else [*group, *self._pending[index:]]

    def _with_texts(self, group: Sequence["_TokenSpan"], end: int) -> list[TokenLogprob]:
        """The tokens of the text from the first one's start to `end`, with their parts of it."""
        text, start = self._detokenizer.text, group[0].start
        begin = self._detokenizer.begin
        part = text[max(start, begin) : min(end, self._detokenizer.num_released)]
        texts: list[tuple[str, bytes]]
        if b"".join(bytes(token.logprob.bytes) for token in group) == part.encode():
            decoder = getincrementaldecoder("utf-8")()
            data = [bytes(token.logprob.bytes) for token in group]
            texts = [(decoder.decode(piece), piece) for piece in data]
        else:  # spaces around the answer, an invalid character, or a special token
            texts = [("", b"")] * len(group)
            last = max((i for i, token in enumerate(group) if token.logprob.bytes), default=-1)
            texts[last] = part, part.encode()
        return [
            _with_text(token.logprob, *own, is_first=start <= begin)
            for token, own in zip(group, texts, strict=True)
        ]

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        text, data = self._token_text(token)
        return TokenLogprob(token, text, list(data), logprob)


class _TokenSpan(NamedTuple):
    """A token and where its text is in the text of the answer."""

    start: int
    end: int
    logprob: TokenLogprob


def _with_text(token: TokenLogprob, text: str, data: bytes, is_first: bool) -> TokenLogprob:
    """A token with its part of the answer, and its alternatives in the same form.

    Args:
        is_first: The answer begins with it, without the space that the token may have.
    """
    if not (data or token.bytes):  # an end token keeps its name
        return token
    own = replace(token, text=text, bytes=list(data))

    def as_own(other: TokenLogprob) -> TokenLogprob:
        if other.id == token.id:
            return replace(other, text=text, bytes=list(data))
        stripped = bytes(other.bytes).lstrip() if is_first else b""
        return replace(other, text=other.text.lstrip(), bytes=list(stripped)) if stripped else other

    return replace(own, top=tuple(map(as_own, token.top)))


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
