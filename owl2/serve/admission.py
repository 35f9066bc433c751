"""Requests at the engine: so many at a time, the others wait; from its threads to the event loop.

::

    event loop:  Desk.visit, .answer ──► Answer ◄── pieces ── a thread that waits for the engine
                                           └── close: the client left, time is over ──► its rows

The engine computes together what is asked at the same time; the threads here only wait for it.
Everything else happens in the event loop's thread, so that nothing of it is locked.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from owl2.engine.engine import Engine
from owl2.engine.output import Completion, CompletionChunk
from owl2.errors import InputError
from owl2.processing.chat_template import Message
from owl2.serve import errors
from owl2.serve.limits import Limits
from owl2.serve.metrics import Metrics


@dataclass
class Visit:
    """When a request came, and when it must be over; both in the loop's time.

    Attributes:
        waits: it has had no place yet.
    """

    arrival: float
    deadline: float
    waits: bool = True


class _Begun(NamedTuple):
    """What a thread says first: the prompt was read, and has so many tokens."""

    prompt_tokens: int


class Desk:
    """Who is answered, who waits, who is sent away.

    Attributes:
        closing: whether new requests are refused, as the server is about to end.
        inside: requests that are not finished, those that wait too.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.closing = False
        self.inside = 0
        self._waiting = 0  # from their arrival: many may come before the first asks for a place
        self._taken = 0
        self._stopped = False
        self._places = asyncio.Semaphore(limits.running)
        self._pool = ThreadPoolExecutor(limits.running, thread_name_prefix="owl2-request")
        self._clocks: set[asyncio.Timeout] = set()

    @contextmanager
    def visit(self) -> Iterator[Visit]:
        """From a request's arrival to its end.

        Raises:
            ApiError: no more are taken.
        """
        if self.closing:
            raise errors.closing()
        if self._taken + self._waiting >= self.limits.running + self.limits.queue:
            raise errors.too_busy(self._waiting)
        arrival = asyncio.get_running_loop().time()
        visit = Visit(arrival, arrival + self.limits.seconds)
        self.inside += 1
        self._waiting += 1
        try:
            yield visit
        finally:
            self.inside -= 1
            self._wait_no_more(visit)

    @asynccontextmanager
    async def in_time(self, visit: Visit) -> AsyncIterator[None]:
        """What is in it ends when the visit must, or when the server stops waiting for it.

        Raises:
            ApiError: which of the two it was.
        """
        try:
            async with asyncio.timeout_at(0.0 if self._stopped else visit.deadline) as clock:
                self._clocks.add(clock)
                try:
                    yield
                finally:
                    self._clocks.discard(clock)
        except TimeoutError as error:
            if not clock.expired():
                raise
            seconds = self.limits.seconds
            raise (errors.closing() if self._stopped else errors.too_slow(seconds)) from error

    def stop(self) -> None:
        """Give up all that is not finished; who asked for it is told so."""
        self._stopped = True
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(0.0)

    async def answer(
        self,
        visit: Visit,
        messages: Callable[[], Awaitable[Sequence[Message]]],
        answers: int,
        options: dict[str, Any],
    ) -> "Answer":
        """Wait for a place, then for the messages, and begin.

        The place is free again when the engine has finished or the `Answer` is closed: a client
        that reads slowly does not hold it.
        """
        with self.metrics.waiting.track_inprogress():
            await self._places.acquire()
        self._taken += 1
        self._wait_no_more(visit)
        self.metrics.running.inc()
        try:
            answer = Answer(self.metrics, visit.arrival, answers)
            given = await messages()
            self._pool.submit(answer.work, self.engine, given, options, self._leave)
        except BaseException:
            self._leave()
            raise
        return answer

    def _wait_no_more(self, visit: Visit) -> None:
        self._waiting -= visit.waits
        visit.waits = False

    def _leave(self) -> None:
        self._taken -= 1
        self.metrics.running.dec()
        self._places.release()


class Answer:
    """What the engine makes of one request: `begun`, `next` until None, and `close` in any case."""

    def __init__(self, metrics: Metrics, arrival: float, answers: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[_Begun | CompletionChunk | Exception | None] = asyncio.Queue()
        self._made = [0] * answers
        self._unfinished = answers
        self._closing = threading.Lock()
        self._closed = False
        self._completion: Completion | None = None

    def work(
        self,
        engine: Engine,
        messages: Sequence[Message],
        options: dict[str, Any],
        leave: Callable[[], None],
    ) -> None:
        """In a thread of its own: wait for the engine and hand on what comes; then `leave`."""
        end: Exception | None = None
        try:
            with engine.complete(messages, n=len(self._made), **options) as completion:
                with self._closing:
                    self._completion = completion
                    closed = self._closed
                if not closed:
                    self._in_loop(self._arrived.put_nowait, _Begun(completion.num_prompt_tokens))
                    for piece in completion:
                        self._in_loop(self._arrived.put_nowait, piece)
        except Exception as error:  # whatever it is, it is raised where one waits for the answer
            end = error
        self._in_loop(leave)
        self._in_loop(self._arrived.put_nowait, end)

    def _in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # it is closed: the server had to end before
            self._loop.call_soon_threadsafe(call, *arguments)

    async def begun(self) -> int:
        """Wait until the prompt is read; its tokens.

        Raises:
            InputError: what `Engine.complete` finds wrong with it.
        """
        match await self._arrived.get():
            case _Begun(tokens):
                self._metrics.prompt_tokens.inc(tokens)
                return tokens
            case Exception() as error:
                self._fail(error)
                raise error
            case other:
                raise AssertionError(f"{other!r} before the beginning")

    async def next(self) -> CompletionChunk | None:
        """The next piece; None after the last."""
        item = await self._arrived.get()
        if isinstance(item, Exception):
            self._fail(item)
            raise item
        if item is None:
            self._metrics.whole.observe(self._loop.time() - self._arrival)
            return None
        assert isinstance(item, CompletionChunk)
        if not any(self._made):
            self._metrics.first_token.observe(self._loop.time() - self._arrival)
        self._metrics.generated_tokens.inc(item.num_tokens - self._made[item.index])
        self._made[item.index] = item.num_tokens
        if item.finish_reason:
            self._unfinished -= 1
            self._metrics.ended.labels(item.finish_reason).inc()
        return item

    def _fail(self, error: Exception) -> None:
        self.close("refused" if isinstance(error, InputError) else "failed")

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("cut" if kind is errors.ApiError else "gone")

    def close(self, reason: str = "gone") -> None:
        """Nobody wants the rest, if there is any: free its rows.

        Args:
            reason: for the metrics, as in `Metrics.ended`.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._metrics.ended.labels(reason).inc(self._unfinished)
        if self._completion is not None:
            self._completion.close()
