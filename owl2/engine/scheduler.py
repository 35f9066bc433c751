"""Who runs a model takes what waits, turn by turn: a thread that else sleeps, or the main thread.

A turn: prompts that are alike are computed together and join the rows, then all rows get a token.
Only who holds the worker's lock touches the rows and what is kept, so nothing else is locked.

The main thread leads while nobody else does and its own requests last. It could as well wait for
the other one; but each thread that computes has a pool of OpenMP's, and as soon as there are more
of their threads than cores, they go to sleep after each operation: prompts take a third longer.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from owl2.engine.model_runner import FastDecoder
from owl2.engine.prefill import Begun, Read, Reader
from owl2.engine.running_batch import Request, Rows

# Positions that one forward computes: while nobody waits for a next token, and while some do.
ALONE, BETWEEN_STEPS = 4096, 512


@dataclass(eq=False)
class Job:
    """A prompt that is not to be answered: `use` makes something else of it.

    Attributes:
        done: gets the exception that ended it, or None when the result is there.
    """

    prompt: Begun
    use: Callable[[Read], Any]
    done: SimpleQueue
    result: Any = None


class Inbox:
    """What was sent and is not taken yet, and the thread that waits for it.

    It does not know the worker, so that an idle thread keeps no model in memory.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Make it empty and new."""
        # Its lock can be taken twice by one thread: the garbage collector may close a stream, or
        # drop the worker, in the middle of anything.
        self._changed = threading.Condition()
        self._items: list[Request | Job] = []
        self._roused = False
        self._thread: threading.Thread | None = None
        self.closed = False

    def add(self, items: Sequence[Request | Job]) -> None:
        """Hand in requests or jobs, for who leads."""
        with self._changed:
            self._items += items

    def put(self, items: Sequence[Request | Job], worker: "Worker") -> None:
        """The same for the thread, which is started if there is none; of no items: wake it.

        Raises:
            RuntimeError: it is closed.
        """
        with self._changed:
            if self.closed:
                raise RuntimeError("the runner is closed: the process ends")
            self._items += items
            self._roused = True
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=_serve, args=(self, weakref.ref(worker)), name="owl2-runner", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def take(self) -> list[Request | Job]:
        """All that was handed in since."""
        with self._changed:
            items, self._items = self._items, []
        return items

    def wait(self) -> bool:
        """Sleep until there is something to do; False: until there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._roused or self.closed)
            self._roused = False
            return not self.closed

    def close(self) -> None:
        """End the thread, after the turn that it is in."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()


def _serve(inbox: Inbox, reference: "weakref.ref[Worker]") -> None:
    while inbox.wait():
        worker = reference()
        if worker is None:
            return
        # What is no Exception ends the turns of who leads; here all are told of it already.
        with suppress(BaseException), worker.lock:
            worker.work()
        del worker  # or sleeping would keep it alive


class Worker:
    """What a thread does that leads.

    Args:
        max_batch: requests in rows at a time.
        rows_bytes: that their keys and values may take; one request is taken in any case.

    Attributes:
        lock: who leads holds it.
        forget: whether to drop what is kept before the next prompt; set from any thread.
    """

    def __init__(self, reader: Reader, inbox: Inbox, max_batch: int, rows_bytes: int) -> None:
        self.reader = reader
        self.inbox = inbox
        self.max_batch = max_batch
        self.rows_bytes = rows_bytes
        self.lock = threading.Lock()
        self.forget = False
        self._process = os.getpid()
        self._main_leads = True
        self._rows: Rows | None = None
        self._waiting: list[Request] = []
        self._jobs: list[Job] = []

    def lead(
        self, own: Sequence[Request | Job], until: Callable[[], bool], new: bool = True
    ) -> None:
        """Do `own`, and what others hand in meanwhile, in this thread if it is the main one and
        nobody leads; else leave it to the other thread.

        Args:
            new: they were not handed in before.
        """
        self._renew_after_fork()
        items = own if new else []
        is_main = threading.current_thread() is threading.main_thread() and self._main_leads
        if self.inbox.closed or not (is_main and self.lock.acquire(blocking=False)):
            self.inbox.put(items, self)
            return
        others = False
        try:
            self.inbox.add(items)
            self.work(until)
        finally:
            try:
                active = self._rows.active if self._rows is not None else []
                others = any(one not in own for one in (*active, *self._waiting))
            finally:
                self.lock.release()
        if others:
            self.inbox.put([], self)

    def _renew_after_fork(self) -> None:
        """A fork has neither its parent's threads, OpenMP's among them, nor who holds its locks."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._main_leads = False  # another thread gets threads of OpenMP's anew
            self.lock = threading.Lock()
            self.inbox.renew()
            self._rows, self._waiting, self._jobs = None, [], []

    def work(self, until: Callable[[], bool] = lambda: False) -> None:
        """Turns until nothing is left to do. What goes wrong with the machine is told to all who
        wait, and it goes on."""
        with _plain_modes(self.reader.model.device):
            while not (self.inbox.closed or until()):
                try:
                    if not self._turn():
                        return
                except Exception as error:  # whatever it is, it is raised where one waits
                    self._fail(error)
                except BaseException:  # of who leads: Ctrl-C above all
                    self._fail(RuntimeError("a step was interrupted; ask again"))
                    raise

    def _turn(self) -> bool:
        """Whether there is more to do."""
        items = self.inbox.take()
        self._jobs += [item for item in items if isinstance(item, Job)]
        self._waiting += [item for item in items if not isinstance(item, Job)]
        self._waiting = [request for request in self._waiting if not request.cancelled]
        rows = self._usable_rows()
        rows.drop_cancelled()
        if self._jobs or (self._waiting and len(rows.active) < self.max_batch):
            self._forget_if_wanted()
            while self._jobs:
                self._do(self._jobs.pop(0))
            if group := self._alike(rows):
                rows.join(group)
                self._waiting = [request for request in self._waiting if request not in group]
        if rows.active:
            rows.step()
        return bool(self._waiting or rows.active)

    def _alike(self, rows: Rows) -> list[Request]:
        """Requests of those that wait, the first among them, to be computed in one forward.

        Where rows are padded they have about as many tokens to compute. Of those whose prompts
        begin alike only one is taken: its keys and values serve the others in the next turn. Those
        that share one prompt come together, as long as there is room.
        """
        waiting = self._waiting[: self.max_batch]
        for request in waiting:
            self.reader.look_up(request.prompt)
        most = BETWEEN_STEPS if rows.active else ALONE
        padded = not rows.decoder.takes_prompts
        shortest = self.reader.prefixes.shortest
        group: list[Request] = []
        prompts: list[Begun] = []
        starts = set()
        longest = total = 0
        for request in waiting:
            prompt = request.prompt
            fits = self._fits([*rows.active, *group, request])
            if prompt in prompts and fits:
                group.append(request)
                continue
            near = not group or abs(prompt.rest - group[0].prompt.rest) <= max(8, prompt.rest // 8)
            start = prompt.key[: prompt.shared + shortest]
            repeats = self.reader.prefixes.limit and prompt.rest > shortest and start in starts
            if (padded and not near) or repeats:
                continue
            longest, total = max(longest, prompt.rest), total + prompt.rest
            size = (len(prompts) + 1) * longest if padded else total
            if (group and size > most) or not fits:
                break
            group.append(request)
            prompts.append(prompt)
            starts.add(start)
        return group

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Whether there are rows and memory for so many."""
        if len(requests) == 1:
            return True
        longest = max(request.longest for request in requests)
        # Twice: the cache grows by doubling.
        size = 2 * len(requests) * longest * self._usable_rows().decoder.cache.position_bytes
        return len(requests) <= self.max_batch and size <= self.rows_bytes

    def _do(self, job: Job) -> None:
        error: BaseException | None = None
        try:
            self.reader.look_up(job.prompt)
            job.result = job.use(self.reader.read_alone(job.prompt))
        except Exception as raised:  # it is raised where one waits for the result
            error = raised
        except BaseException:
            job.done.put(RuntimeError("a step was interrupted; ask again"))
            raise
        job.done.put(error)

    def _forget_if_wanted(self) -> None:
        if self.forget:
            self.forget = False
            self.reader.forget()
        self.reader.forget_if_changed()

    def _usable_rows(self) -> Rows:
        """The rows; anew if the model was put on another device or into another dtype."""
        model = self.reader.model
        rows = self._rows
        if rows is not None and not rows.active and rows.decoder.is_stale:
            self._rows = None
        if self._rows is None:
            self._rows = Rows(FastDecoder(model), self.reader)
        return self._rows

    def _fail(self, error: BaseException) -> None:
        """Tell all who wait, and let go of all memory: too little of it may have been the error."""
        active = self._rows.active if self._rows is not None else []
        for request in [*active, *self._waiting]:
            request.end(error)
        for job in self._jobs:
            job.done.put(error)
        self._rows, self._waiting, self._jobs = None, [], []
        self.reader.forget()


@contextmanager
def _plain_modes(device: torch.device) -> Iterator[None]:
    """No gradients; and what a caller has set for its thread does not reach the computation."""
    with (
        torch.inference_mode(False),  # outside of no_grad, as it turns gradients on
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield
