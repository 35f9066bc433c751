"""A semaphore that is fair to clients and to their requests."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager
from itertools import count
from typing import TypeVar

Result = TypeVar("Result")
Owner = tuple[Hashable, ...]  # a client, or a client and one of its requests


class FairSlots:
    """A number of slots, for which owners wait.

    A free slot is given to the client that has the fewest slots, and among several such clients to
    the one that released its last slot, or arrived, the longest time ago. The requests of a client
    are selected by the same rule.

    It runs in the event loop, without locks.

    Args:
        size: Number of slots.
        per_client: The maximum of one client. Default: `size`.
    """

    def __init__(self, size: int, per_client: int | None = None) -> None:
        self._free = size
        self._per_client = per_client or size
        self._waiting: dict[Owner, deque[asyncio.Future[None]]] = {}
        self._held: Counter[Owner] = Counter()  # slots of a client, and of a request
        self._users: Counter[Owner] = Counter()  # slots and waiting tasks
        self._turns: dict[Owner, int] = {}
        self._clock = count()

    async def acquire(self, owner: Owner) -> None:
        """Wait for a slot."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(waiter)
        for part in _parts(owner):
            self._users[part] += 1
            self._turns.setdefault(part, next(self._clock))
        self._assign()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._remove(owner, waiter)
                self._forget(owner)
            else:  # it has received a slot in the same step of the loop
                self.release(owner)
            raise

    def release(self, owner: Owner) -> None:
        """Free a slot of an owner."""
        self._free += 1
        for part in _parts(owner):
            self._held[part] -= 1
            self._turns[part] = next(self._clock)
        self._forget(owner)
        self._assign()

    @asynccontextmanager
    async def slot(self, owner: Owner) -> AsyncIterator[None]:
        """`acquire` and `release`."""
        await self.acquire(owner)
        try:
            yield
        finally:
            self.release(owner)

    def _assign(self) -> None:
        def rank(owner: Owner) -> list[tuple[int, int]]:
            return [(self._held[part], self._turns[part]) for part in _parts(owner)]

        while self._free:
            able = [one for one in self._waiting if self._held[one[:1]] < self._per_client]
            if not able:
                return
            owner = min(able, key=rank)
            waiter = self._waiting[owner][0]
            self._remove(owner, waiter)
            if not waiter.cancelled():
                self._free -= 1
                for part in _parts(owner):
                    self._held[part] += 1
                waiter.set_result(None)

    def _remove(self, owner: Owner, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiting.get(owner, deque())
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters:
            self._waiting.pop(owner, None)

    def _forget(self, owner: Owner) -> None:
        for part in _parts(owner):
            self._users[part] -= 1
            if not self._users[part]:
                del self._users[part], self._turns[part], self._held[part]


async def run_with_slots(
    slots: Sequence[FairSlots], owner: Owner, pool: Executor, function: Callable[[], Result]
) -> Result:
    """The result of `function` in a thread of `pool`, with a slot of each of `slots`.

    If the task is cancelled, the function does not end, and its slots remain occupied until then.
    """
    with ExitStack() as stack:
        for one in slots:
            await one.acquire(owner)
            stack.callback(one.release, owner)
        work = asyncio.get_running_loop().run_in_executor(pool, function)
        release = stack.pop_all().close

        def finish(work: asyncio.Future[Result]) -> None:
            release()
            if not work.cancelled():
                work.exception()  # otherwise asyncio would log it if the task is cancelled

        work.add_done_callback(finish)
    return await asyncio.shield(work)


def _parts(owner: Owner) -> list[Owner]:
    return [owner[: length + 1] for length in range(len(owner))]
