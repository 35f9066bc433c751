"""Requests whose answers one thread follows token by token, as they are made.

::

    who leads ──Event: number, token, score──► queue ──► the thread that iterates
    drop; from any thread close ──► the rows are free before the next step
"""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from owl2.engine.running_batch import Event, Request
from owl2.engine.scheduler import Worker


class Following(Iterator[Event]):
    """The events of several requests; ends when all answers are whole, or it is closed.

    Nothing is computed before the first event is asked for.

    Args:
        requests: number i has the number i.
        queue: their listener.

    Raises:
        InputError: while iterating: logits that are not finite.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], queue: SimpleQueue) -> None:
        self._worker = worker
        self._requests = requests
        self._queue = queue
        self._new = True
        # How many tokens came of those that are not over.
        self._made = dict.fromkeys(range(len(requests)), 0)
        self._closed = False

    def __next__(self) -> Event:
        while self._made and not self._closed:
            if self._queue.empty():
                new, self._new = self._new, False
                self._worker.lead(self._requests, lambda: not self._queue.empty(), new)
            item: Event | BaseException | None = self._queue.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            if item is not None and item.number in self._made:
                self._count(item)
                return item
        raise StopIteration

    def _count(self, event: Event) -> None:
        request = self._requests[event.number]
        self._made[event.number] += 1
        if self._made[event.number] == request.limit or event.token in request.ends:
            del self._made[event.number]

    def drop(self, number: int) -> None:
        """The thread that iterates wants no more of a request: its row becomes free."""
        self._requests[number].cancelled = True
        self._made.pop(number, None)

    def close(self) -> None:
        """Nobody wants more of any; a thread that waits for an event is woken. From any thread."""
        self._closed = True
        for request in self._requests:
            request.cancelled = True
        self._queue.put(None)
