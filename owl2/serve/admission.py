"""Admission control: running, queued and rejected requests.

::

    admit ──► slot (max_num_seqs, max_queued) ──► images, prompt ──► Engine ──► ResponseStream

The engine batches all running requests. The controller runs in the event loop, without locks.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from owl2.engine.engine import Engine
from owl2.engine.output import CompletionChunk, RequestHandle
from owl2.errors import InputError
from owl2.processing.chat_template import Message
from owl2.serve import errors
from owl2.serve.config import ServerLimits
from owl2.serve.metrics import Metrics

# Of the longest token strings; only runs of one character have more characters per token.
MAX_CHARACTERS_PER_TOKEN = 64

Result = TypeVar("Result")


class ClientStopped(Exception):
    """The client disconnected, or a visitor of the web page stopped the answer."""


class AdmissionController:
    """Decides which requests run, wait or are rejected.

    Attributes:
        shutting_down: New requests are rejected.
        in_flight: Number of admitted requests that are not finished.
    """

    def __init__(self, engine: Engine, limits: ServerLimits, metrics: Metrics) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.shutting_down = False
        self.in_flight = 0
        self._unstarted = 0  # admitted requests without a slot, counted from their arrival
        self._running = 0
        self._aborted = False
        self._slots = asyncio.Semaphore(limits.max_num_seqs)
        self._timeouts: set[asyncio.Timeout] = set()

    @contextmanager
    def admit(self, num_answers: int = 1) -> Iterator["ResponseStream"]:
        """A request from its arrival to its end.

        Raises:
            ApiError: 429 or 503: the queue is full, or the server is shutting down.
        """
        if self.shutting_down:
            raise errors.shutting_down()
        if self._running + self._unstarted >= self.limits.max_num_seqs + self.limits.max_queued:
            raise errors.too_busy(f"{self._unstarted} requests are waiting")
        stream = ResponseStream(self, num_answers)
        self.in_flight += 1
        self._unstarted += 1
        reason = "cancelled"
        try:
            yield stream
        except (errors.ApiError, InputError) as error:
            is_timeout = isinstance(error, errors.ApiError) and error.status >= 500
            reason = "timeout" if is_timeout else "rejected"
            raise
        finally:
            self.in_flight -= 1
            self._unstarted -= not stream.has_waited
            stream.close(reason)

    async def acquire_slot(self) -> None:
        """Wait for a slot in the engine; `release_slot` returns it."""
        with self.metrics.waiting.track_inprogress():
            await self._slots.acquire()
        self._unstarted -= 1
        self._running += 1
        self.metrics.running.inc()

    def release_slot(self) -> None:
        """Return a slot."""
        self._running -= 1
        self.metrics.running.dec()
        self._slots.release()

    @asynccontextmanager
    async def time_limit(self, deadline: float) -> AsyncIterator[None]:
        """Cancel the enclosed code at a time of the event loop's clock, or by `abort_all`.

        Raises:
            ApiError: 503, with the reason.
        """
        try:
            async with asyncio.timeout_at(0.0 if self._aborted else deadline) as timeout:
                self._timeouts.add(timeout)
                try:
                    yield
                finally:
                    self._timeouts.discard(timeout)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            if self._aborted:
                raise errors.shutting_down() from error
            raise errors.timed_out(self.limits.request_timeout) from error

    def abort_all(self) -> None:
        """End all unfinished requests; their clients receive an error."""
        self._aborted = True
        for timeout in self._timeouts:
            if not timeout.expired():
                timeout.reschedule(0.0)


class ResponseStream:
    """The answers to an admitted request: `start`, then `next` until None.

    The engine's thread posts its outputs into the event loop, where everything else runs.

    Attributes:
        deadline: In seconds of the event loop's clock.
        has_waited: The request has left the queue.
        prompt_tokens: Tokens of the prompt, including images; known after `start`.
    """

    def __init__(self, admission: AdmissionController, num_answers: int) -> None:
        self._admission = admission
        self._metrics = admission.metrics
        self._loop = asyncio.get_running_loop()
        self._arrival = self._loop.time()
        self.deadline = self._arrival + admission.limits.request_timeout
        self.has_waited = False
        self.prompt_tokens = 0
        self._has_slot = False
        self._outputs: asyncio.Queue[CompletionChunk | BaseException | None] = asyncio.Queue()
        self._tokens = [0] * num_answers
        self._unfinished = num_answers
        self._closed = False
        self._handle: RequestHandle | None = None

    async def start(
        self, messages: Callable[[], Awaitable[Sequence[Message]]], options: dict[str, Any]
    ) -> None:
        """Wait for a slot, then for the messages, and submit the prompt to the engine.

        The slot is free again when the engine has finished or the stream is closed, so that a
        client that reads slowly does not occupy one.

        Args:
            options: Keyword arguments of `Engine.sampling_params`.

        Raises:
            ApiError: 503, at the deadline.
            InputError: The engine cannot answer the messages, or an option is invalid.
        """
        engine = self._admission.engine
        async with self._admission.time_limit(self.deadline):
            await self._admission.acquire_slot()
            self.has_waited = self._has_slot = True
            params = engine.sampling_params(**options)
            prompt = await asyncio.to_thread(engine.encode, await messages())
            self._handle = engine.submit(prompt, params, self._post)
        self.prompt_tokens = self._handle.num_prompt_tokens
        self._metrics.prompt_tokens.inc(self.prompt_tokens)

    def _post(self, output: CompletionChunk | BaseException) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._add, output)

    def _add(self, output: CompletionChunk | BaseException) -> None:
        if self._closed:
            return
        self._outputs.put_nowait(output)
        if isinstance(output, BaseException):
            self.close("rejected" if isinstance(output, InputError) else "failed")
            return
        elapsed = self._loop.time() - self._arrival
        if not any(self._tokens):
            self._metrics.time_to_first_token.observe(elapsed)
        self._metrics.generated_tokens.inc(output.num_tokens - self._tokens[output.index])
        self._tokens[output.index] = output.num_tokens
        if output.finish_reason:
            self._metrics.answers.labels(output.finish_reason).inc()
            self._unfinished -= 1
        if not self._unfinished:
            self._metrics.request_seconds.observe(elapsed)
            self.close()

    async def next(self) -> CompletionChunk | None:
        """The next chunk of an answer; None after the last one, and after `close`.

        Raises:
            ApiError: 503, at the deadline.
            InputError: From the engine.
        """
        async with self._admission.time_limit(self.deadline):
            output = await self._outputs.get()
        if isinstance(output, BaseException):
            raise output
        return output

    def close(self, reason: str = "cancelled") -> None:
        """End unfinished answers and free the slot; may be repeated.

        Args:
            reason: The label of `Metrics.answers` for unfinished answers.
        """
        if self._closed:
            return
        self._closed = True
        self._outputs.put_nowait(None)
        self._metrics.answers.labels(reason).inc(self._unfinished)
        if self._handle is not None:
            self._handle.abort()
        if self._has_slot:
            self._admission.release_slot()


def check_text_length(characters: int, context: int) -> None:
    """Reject a text that cannot fit, because it takes seconds to tokenize megabytes.

    Args:
        characters: Of all messages.
        context: Of the model, in tokens.

    Raises:
        ApiError: 400.
    """
    if characters > context * MAX_CHARACTERS_PER_TOKEN:
        raise errors.ApiError(
            400,
            f"The messages have {characters:,} characters, which do not fit into the model's "
            f"context of {context:,} tokens. Shorten the conversation.",
            code="context_length_exceeded",
            param="messages",
        )


async def run_unless(stop: Coroutine[Any, Any, Any], work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if `stop` finishes first.

    Raises:
        ClientStopped: `stop` finished first.
    """
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop)
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientStopped
        return task.result()
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
