"""Admission control: running, queued and rejected requests.

::

    admit (max_queued) ──► images ──► slot (max_num_seqs) ──► prompt ──► Engine ──► ResponseStream

The engine batches all running requests. The images of the next ones are prepared meanwhile. Clients
take turns (`FairSlots`), so that one with many requests does not delay the others.

The controller runs in the event loop, without locks.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from owl2.engine.engine import Engine, Prompt
from owl2.engine.output import Abort, CompletionChunk, join_chunks
from owl2.errors import InputError
from owl2.serve import errors
from owl2.serve.config import ServerLimits
from owl2.serve.fair_slots import FairSlots
from owl2.serve.metrics import Metrics

# The client of the request that the current task handles: its API key or its address.
current_client: ContextVar[str] = ContextVar("current_client", default="")

Result = TypeVar("Result")
Prepared = TypeVar("Prepared")


class ClientStopped(Exception):
    """The client disconnected, or a visitor of the web page stopped the answer."""


class AdmissionController:
    """Decides which requests run, wait or are rejected.

    Attributes:
        preparing: Slots of requests whose images are prepared, held until the engine has a slot.
            One client has at most half of them, because it may use slow URLs.
        slots: Of the engine; a running request has one.
        shutting_down: New requests are rejected.
    """

    def __init__(self, engine: Engine, limits: ServerLimits, metrics: Metrics) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.preparing = FairSlots(limits.max_num_seqs, max(1, limits.max_num_seqs // 2))
        self.slots = FairSlots(limits.max_num_seqs)
        self.shutting_down = False
        self._streams: set[ResponseStream] = set()

    @property
    def in_flight(self) -> int:
        """Number of admitted requests that are not finished."""
        return len(self._streams)

    @contextmanager
    def admit(self, num_answers: int = 1) -> Iterator["ResponseStream"]:
        """A request of `current_client` from its arrival to its end.

        If the queue is full, the newest waiting request of the client with the most waiting
        requests is rejected. This can be the new request.

        Raises:
            ApiError: 429 or 503: the queue is full, or the server is shutting down.
        """
        if self.shutting_down:
            raise errors.shutting_down()
        # A request whose answers are complete may still be sent to a slow client.
        unanswered = [stream for stream in self._streams if not stream.closed]
        if len(unanswered) >= self.limits.max_num_seqs + self.limits.max_queued:
            waiting = [stream for stream in unanswered if stream.is_waiting]
            counts = Counter(stream.client for stream in waiting)
            client, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
            if counts[current_client.get()] + 1 >= most:
                raise errors.too_busy("the queue is full")
            newest = max(
                (stream for stream in waiting if stream.client == client),
                key=lambda stream: stream.arrival,
            )
            newest.expire(errors.too_busy("the queue is full"))
        stream = ResponseStream(self, num_answers)
        self._streams.add(stream)
        reason = "cancelled"
        try:
            yield stream
        except Exception as error:
            reason = abort_reason(error)
            raise
        finally:
            self._streams.discard(stream)
            stream.close(reason)

    def abort_all(self) -> None:
        """End all unfinished requests; their clients receive an error."""
        for stream in self._streams:
            stream.expire(errors.shutting_down())


class InflightBytes:
    """The bytes of unfinished requests by client: their bodies, and the images that they fetch.

    Args:
        limit: Of all clients. A client has at most half of it, or one body or image.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def count(self) -> Iterator[Callable[[int], None]]:
        """A function that adds bytes of one body or image of `current_client`, until the end.

        It raises an `ApiError` with status 429 beyond the limit.
        """
        client, own = current_client.get(), 0

        def add(num_bytes: int) -> None:
            nonlocal own
            own += num_bytes
            self._bytes[client] += num_bytes
            is_above_share = self._bytes[client] > max(self._limit // 2, own)
            if is_above_share or self._bytes.total() > self._limit:
                raise errors.too_busy("the data of unfinished requests has reached its limit")

        try:
            yield add
        finally:
            self._bytes[client] -= own
            if not self._bytes[client]:
                del self._bytes[client]


class ResponseStream:
    """The answers to an admitted request: `start`, then `next` until None.

    The engine's thread posts its outputs into the event loop, where everything else runs.

    Attributes:
        client: As `current_client`.
        arrival, deadline: In seconds of the event loop's clock.
        closed: The answers are complete or aborted.
        prompt_tokens: Tokens of the prompts, including images; known after `start`.
    """

    def __init__(self, admission: AdmissionController, num_answers: int) -> None:
        self._admission = admission
        self._metrics = admission.metrics
        self._loop = asyncio.get_running_loop()
        self.client = current_client.get()
        self.arrival = self._loop.time()
        self.deadline = self.arrival + admission.limits.request_timeout
        self.closed = False
        self.prompt_tokens = 0
        self._timeout: asyncio.Timeout | None = None
        self._expiry: errors.ApiError | None = None
        self._has_slot = False
        self._outputs: asyncio.Queue[CompletionChunk | BaseException | None] = asyncio.Queue()
        self._tokens = [0] * num_answers
        self._unfinished = num_answers
        self._aborts: list[Abort] = []

    @property
    def is_waiting(self) -> bool:
        """Whether the request has no slot of the engine, and waits for one."""
        return not (self._has_slot or self.closed or self._expiry)

    async def start(
        self,
        prompts: Callable[[], Awaitable[Sequence[Prompt]]],
        options: dict[str, Any],
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Prepare the prompts, wait for a slot, and submit them to the engine.

        The slot is free again when the engine has finished or the stream is closed, so that a
        client that reads slowly does not occupy one.

        Args:
            prompts: Returns P prompts; n answers to prompt i have the indices from n * i.
            options: Keyword arguments of `Engine.sampling_params`.
            template_kwargs: Keyword arguments of `Engine.encode`.

        Raises:
            ApiError: 503, at the deadline.
            InputError: The engine cannot answer the messages, or an option is invalid.
        """
        engine = self._admission.engine
        async with self._time_limit():
            prepared = await self._wait_for_slot(prompts)
            encode = partial(engine.encode, **template_kwargs or {})
            # A grammar may take a second to compile.
            params, encoded = await asyncio.to_thread(
                lambda: (engine.sampling_params(**options), [*map(encode, prepared)])
            )
            num_answers = len(self._tokens) // len(encoded)
            for index, prompt in enumerate(encoded):
                post = partial(self._post, index * num_answers)
                self._aborts.append(engine.submit(prompt, params, post))
        self.prompt_tokens = sum(len(prompt.ids) for prompt in encoded)
        self._metrics.prompt_tokens.inc(self.prompt_tokens)

    async def compute(
        self, prepare: Callable[[], Awaitable[Prepared]], function: Callable[[Prepared], Result]
    ) -> Result:
        """What `function` returns in a thread for the prepared input, once there is a slot.

        Raises:
            ApiError: 503, at the deadline.
        """
        async with self._time_limit():
            return await asyncio.to_thread(function, await self._wait_for_slot(prepare))

    def finish(self, num_tokens: int) -> None:
        """Count a computed request with prompts of this many tokens as complete."""
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.request_seconds.observe(self._loop.time() - self.arrival)
        self.close("stop")

    async def _wait_for_slot(self, prepare: Callable[[], Awaitable[Prepared]]) -> Prepared:
        admission, owner = self._admission, (self.client,)
        with self._metrics.waiting.track_inprogress():
            async with admission.preparing.slot(owner):
                prepared = await prepare()
                await admission.slots.acquire(owner)
        self._has_slot = True
        self._metrics.running.inc()
        return prepared

    def _post(self, first_index: int, output: CompletionChunk | BaseException) -> None:
        """Called in the engine's thread."""
        if first_index and isinstance(output, CompletionChunk):
            output = replace(output, index=first_index + output.index)
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._add, output)

    def _add(self, output: CompletionChunk | BaseException) -> None:
        if self.closed:
            return
        self._outputs.put_nowait(output)
        if isinstance(output, BaseException):
            self.close(abort_reason(output))
            return
        elapsed = self._loop.time() - self.arrival
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
        async with self._time_limit():
            output = await self._outputs.get()
        if isinstance(output, BaseException):
            raise output
        return output

    async def outputs(self) -> list[CompletionChunk]:
        """The complete answers, by index. Raises as `next`."""
        chunks = []
        while (chunk := await self.next()) is not None:
            chunks.append(chunk)
        return join_chunks(chunks)

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(self._tokens)

    def expire(self, error: errors.ApiError) -> None:
        """Move the deadline to the past. The request receives `error`."""
        self._expiry = error
        self.deadline = 0.0
        if self._timeout is not None:
            with suppress(RuntimeError):  # it has expired already
                self._timeout.reschedule(0.0)

    @asynccontextmanager
    async def _time_limit(self) -> AsyncIterator[None]:
        """Cancel the enclosed code at the deadline and raise `ApiError` with status 503."""
        try:
            async with asyncio.timeout_at(self.deadline) as timeout:
                self._timeout = timeout
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            if self._expiry is not None:
                raise self._expiry from error
            raise errors.ApiError(
                503,
                "The request was aborted because it did not finish within "
                f"{self._admission.limits.request_timeout:g} seconds. Request fewer tokens, or "
                "retry when the server is less busy.",
                code="timeout",
            ) from error

    def close(self, reason: str = "cancelled") -> None:
        """End unfinished answers and free the slot; may be repeated.

        Args:
            reason: The label of `Metrics.answers` for unfinished answers.
        """
        if self.closed:
            return
        self.closed = True
        self._outputs.put_nowait(None)
        self._metrics.answers.labels(reason).inc(self._unfinished)
        for abort in self._aborts:
            abort()
        if self._has_slot:
            self._metrics.running.dec()
            self._admission.slots.release((self.client,))


def abort_reason(error: BaseException) -> str:
    """The label of `Metrics.answers` for the answers that an error ends."""
    if isinstance(error, ClientStopped):
        return "cancelled"
    if isinstance(error, errors.ApiError):
        return "timeout" if error.status >= 500 else "rejected"
    return "rejected" if isinstance(error, InputError) else "failed"


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
