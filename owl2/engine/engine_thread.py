"""The thread that runs an engine core."""

import atexit
import os
import threading
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl2.engine.engine_core import EngineCore

_RUNNING: set["EngineThread"] = set()


@atexit.register
def _close_threads() -> None:
    """End all threads before the interpreter: one that is inside of torch then aborts the process.

    The finalizer of a core is not enough. If the thread holds the last reference to its core, the
    finalizer runs in the thread, which then frees the model.
    """
    for thread in list(_RUNNING):
        thread.close()


class EngineThread:
    """The thread of an engine core, and its queue of items: requests and jobs.

    It does not reference the core, so that an idle thread does not keep the model in memory.
    """

    def __init__(self, core: "EngineCore") -> None:
        # `put` of a SimpleQueue is reentrant: the garbage collector may run anywhere.
        self._queue: SimpleQueue[Sequence[Any]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.process = os.getpid()
        self.closed = False
        self._core = weakref.ref(core)
        weakref.finalize(core, self.close).atexit = False  # `_close_threads` does it

    def put(self, items: Sequence[Any]) -> None:
        """Hand items to the thread; starts it if necessary."""
        if self.closed:
            raise RuntimeError("the engine is shut down: the process is exiting")
        self._queue.put(items)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="owl2-engine", daemon=True)
                _RUNNING.add(self)
                self._thread.start()

    def take(self) -> list[Any]:
        """All items that arrived since."""
        items: list[Any] = []
        while not self._queue.empty():
            items += self._queue.get()
        return items

    def close(self) -> None:
        """End the thread after its current step."""
        self.closed = True
        self._queue.put([])  # wakes the thread
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        while not self.closed:
            items = self._queue.get()
            if (core := self._core()) is not None:
                core.run(items)
            del core, items  # while the thread waits, it must not keep the model in memory
        _RUNNING.discard(self)
