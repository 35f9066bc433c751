"""The thread of an engine core."""

import os
import threading
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Protocol


class RunsItems(Protocol):
    """An engine core."""

    def run(self, items: Sequence[Any]) -> None: ...


class EngineThread:
    """The thread of an engine core, and the queue of items that it takes.

    It does not reference the core, so that an idle thread does not keep the model in memory.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        # `put` of a SimpleQueue is reentrant: the garbage collector may run anywhere.
        self._queue: SimpleQueue[Sequence[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self.closed = False

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the thread's one, without its threads and locks."""
        return self._process != os.getpid()

    @property
    def has_items(self) -> bool:
        """Whether `take` would return any."""
        return not self._queue.empty()

    def put(self, items: Sequence[Any], core: "RunsItems") -> None:
        """Hand items to the thread; starts it if necessary."""
        if self.is_forked:
            self._start_over()
        if self.closed:
            raise RuntimeError("the engine is shut down: the process is exiting")
        self._queue.put(items)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=_serve,
                    args=(self, weakref.ref(core)),
                    name="owl2-engine",
                    daemon=True,
                )
                self._thread.start()

    def wait(self) -> Sequence[Any] | None:
        """The next items; None once the thread is to end."""
        # `take` may have removed the None that `close` puts.
        return None if self.closed else self._queue.get()

    def take(self) -> list[Any]:
        """All items that arrived since."""
        items: list[Any] = []
        while not self._queue.empty():
            items += self._queue.get() or []
        return items

    def close(self) -> None:
        """End the thread after its current step."""
        self.closed = True
        self._queue.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and not self.is_forked:
            thread.join()


def _serve(thread: EngineThread, reference: "weakref.ref[RunsItems]") -> None:
    while (items := thread.wait()) is not None:
        core = reference()
        if core is None:
            return
        core.run(items)
        del core, items  # while the thread waits, it must not keep the model in memory
