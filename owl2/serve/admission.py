"""Admission control: running, queued and rejected requests.

::

    admit ──► slot (max_num_seqs, max_queued) ──► images, prompt ──► Engine ──► ResponseStream

The engine batches all running requests. The controller runs in the event loop, without locks.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from owl2.engine.engine import Engine
from owl2.engine.output import Completion, Piece
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
        self.pool = ThreadPoolExecutor(limits.max_num_seqs, thread_name_prefix="owl2-request")
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
            self._unstarted -= not stream.has_slot
            stream.close(reason)

    async def acquire_slot(self, stream: "ResponseStream") -> None:
        """Wait for a slot in the engine; `release_slot` returns it."""
        with self.metrics.waiting.track_inprogress():
            await self._slots.acquire()
        stream.has_slot = True
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

    Attributes:
        deadline: In seconds of the event loop's clock.
        has_slot: The request has left the queue.
        prompt_tokens: Tokens of the prompt, including images; known after `start`.
    """

    def __init__(self, admission: AdmissionController, num_answers: int) -> None:
        self._admission = admission
        self._metrics = admission.metrics
        self._loop = asyncio.get_running_loop()
        self._arrival = self._loop.time()
        self.deadline = self._arrival + admission.limits.request_timeout
        self.has_slot = False
        self.prompt_tokens = 0
        self._outputs: asyncio.Queue[int | Piece | Exception | None] = asyncio.Queue()
        self._tokens = [0] * num_answers
        self._unfinished = num_answers
        self._lock = threading.Lock()
        self._closed = False
        self._completion: Completion | None = None

    async def start(
        self, messages: Callable[[], Awaitable[Sequence[Message]]], options: dict[str, Any]
    ) -> None:
        """Wait for a slot, then for the messages, and start the engine.

        The slot is free again when the engine has finished or the stream is closed, so that a
        client that reads slowly does not occupy one.

        Args:
            options: Keyword arguments of `Engine.complete`.

        Raises:
            ApiError: 503, at the deadline.
            InputError: From `Engine.complete`.
        """
        async with self._admission.time_limit(self.deadline):
            await self._admission.acquire_slot(self)
            try:
                given = await messages()
                self._admission.pool.submit(self._run, given, options)
            except BaseException:
                self._admission.release_slot()
                raise
            item = await self._outputs.get()
            if isinstance(item, Exception):
                self._fail(item)
                raise item
            assert isinstance(item, int)
            self.prompt_tokens = item
            self._metrics.prompt_tokens.inc(item)

    def _run(self, messages: Sequence[Message], options: dict[str, Any]) -> None:
        """In a thread: pass the outputs of the engine to the event loop."""
        end: Exception | None = None
        try:
            with self._admission.engine.complete(messages, **options) as completion:
                with self._lock:
                    self._completion = completion
                    closed = self._closed
                if not closed:
                    self._in_loop(self._outputs.put_nowait, completion.prompt_tokens)
                    for piece in completion:
                        self._in_loop(self._outputs.put_nowait, piece)
        except Exception as error:  # raised again by `start` or `next`
            end = error
        self._in_loop(self._admission.release_slot)
        self._in_loop(self._outputs.put_nowait, end)

    def _in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(call, *arguments)

    async def next(self) -> Piece | None:
        """The next piece of an answer; None after the last.

        Raises:
            ApiError: 503, at the deadline.
            InputError: From the engine.
        """
        async with self._admission.time_limit(self.deadline):
            item = await self._outputs.get()
        if isinstance(item, Exception):
            self._fail(item)
            raise item
        if item is None:
            self._metrics.request_seconds.observe(self._loop.time() - self._arrival)
            return None
        assert isinstance(item, Piece)
        if not any(self._tokens):
            self._metrics.time_to_first_token.observe(self._loop.time() - self._arrival)
        self._metrics.generated_tokens.inc(item.tokens - self._tokens[item.index])
        self._tokens[item.index] = item.tokens
        if item.finish_reason:
            self._unfinished -= 1
            self._metrics.answers.labels(item.finish_reason).inc()
        return item

    def _fail(self, error: Exception) -> None:
        self.close("rejected" if isinstance(error, InputError) else "failed")

    def close(self, reason: str = "cancelled") -> None:
        """End unfinished answers and free their resources.

        Args:
            reason: The label of `Metrics.answers`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._metrics.answers.labels(reason).inc(self._unfinished)
        if self._completion is not None:
            self._completion.close()


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
