"""The engine core: one thread runs the model for all requests.

::

    any thread ──Request──► queue ──► the engine's thread, step by step:
        waiting prompts ──RunningBatch.add──► first tokens ──► callbacks
        running requests ──RunningBatch.step──► one token each ──► callbacks

Requests join and leave between steps, so a short request does not wait for a long one. Answers do
not depend on the other requests, up to rounding in the dtype.

This thread runs all computations of torch. Each thread that computes has its own OpenMP threads. If
they outnumber the cores, they sleep after every operation, and prompts take a third longer.
"""

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import psutil
import torch

from owl2.engine.prefix_cache import PromptState
from owl2.engine.running_batch import EngineStats, PrefillOutput, RunningBatch
from owl2.engine.sampling import SamplingParams
from owl2.engine.scheduler import (
    MAX_PREFILL_TOKENS_BUSY,
    MAX_PREFILL_TOKENS_IDLE,
    Request,
    select_prefills,
)
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.runtime import release_openmp_threads

# Fractions of the free memory: for cached prefixes, image embeddings, and running requests.
PREFIX_FRACTION, FEATURE_FRACTION, BATCH_FRACTION = 0.1, 0.01, 0.5


class _Job(NamedTuple):
    """A prompt whose prefill is passed to a function instead of being answered."""

    prompt: PromptState
    function: Callable[[PrefillOutput], Any]
    result: Future


class _LogitsJob(NamedTuple):
    """A prompt of which only the logits of the next token are computed."""

    prompt: PromptState
    result: Future


Item = Request | _Job | _LogitsJob


class EngineCore:
    """Generates answers to prompts of token ids; for any number of threads.

    Args:
        model: On its device, in evaluation mode.
        max_num_seqs: Maximum number of running requests.
        enable_prefix_caching: Cache image embeddings, and keys and values of prompts and answers,
            across requests. The caches are cleared when weights change in a way that autograd
            tracks; after other changes, call `clear_cache`.
        prefix_cache_bytes: Default: a tenth of the free memory.
        image_cache_bytes: Default: a hundredth of the free memory.
        min_prefix_tokens: The shortest prefix that is cached.

    Attributes:
        on_step: Called in the engine's thread before each decode step, with the number of running
            requests. Default: None.
    """

    on_step: Callable[[int], object] | None = None

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        *,
        max_num_seqs: int = 16,
        enable_prefix_caching: bool = True,
        prefix_cache_bytes: int | None = None,
        image_cache_bytes: int | None = None,
        min_prefix_tokens: int | None = None,
    ) -> None:
        if model.device.type == "cuda":
            free = torch.cuda.mem_get_info(model.device)[0]
        else:
            free = psutil.virtual_memory().available
        if prefix_cache_bytes is None:
            prefix_cache_bytes = int(free * PREFIX_FRACTION)
        if image_cache_bytes is None:
            image_cache_bytes = int(free * FEATURE_FRACTION)
        if not enable_prefix_caching:
            prefix_cache_bytes = image_cache_bytes = 0
        self.model = model
        self.max_num_seqs = max_num_seqs
        self._max_batch_bytes = int(free * BATCH_FRACTION)
        self._batch = RunningBatch(model, prefix_cache_bytes, image_cache_bytes)
        if min_prefix_tokens is not None:
            self._batch.prefixes.min_tokens = min_prefix_tokens
        self._waiting: list[Request] = []
        self._jobs: list[_Job] = []
        self._logits_jobs: list[_LogitsJob] = []
        self._must_clear = False
        self._thread = _EngineThread(self)

    # ------------------------------------------------------------ for any thread

    def prepare(
        self,
        ids: Sequence[int],
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
    ) -> PreparedPrompt:
        """A prompt of token ids with its images (N, 3, H, W), see `PreparedPrompt`.

        Raises:
            InputError: Ids or images that do not fit the model.
        """
        config = self.model.config
        size = (3, config.image_size, config.image_size)
        if pixel_values is not None and tuple(pixel_values.shape[1:]) != size:
            raise InputError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}; the model needs "
                f"(N, 3, {config.image_size}, {config.image_size}).",
                ErrorCode.SHAPE_MISMATCH,
            )
        prompt = PreparedPrompt.from_ids(
            ids, pixel_values, config.image_token_id, config.num_image_tokens, image_grids
        )
        prompt.check_ids(config)
        return prompt

    def state(self, prompt: PreparedPrompt) -> PromptState:
        """A prompt before its prefill."""
        return PromptState(prompt, self.model.config.ntk_alpha(len(prompt.ids)))

    def submit(self, items: Sequence[Item]) -> None:
        """Queue requests; their callbacks report the results.

        Raises:
            RuntimeError: The process is exiting.
        """
        release_openmp_threads()  # those of the thread that loaded the model, for example
        if self._thread.process != os.getpid():  # a fork has neither the thread nor its requests
            self._reset()
            self._thread = _EngineThread(self)
        self._thread.put(items)

    def generate(
        self,
        prompts: Sequence[PreparedPrompt],
        params: SamplingParams,
        max_tokens: Sequence[int],
        end_ids: Collection[int],
    ) -> list[list[int]]:
        """The answer to each prompt, up to a token of `end_ids` (included) or its `max_tokens`.

        Prompt i is sampled with the seed `params.seed` + i, as it would be alone with that seed.

        Raises:
            InputError: Logits that are not finite.
        """
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        requests = [
            Request(self.state(prompt), params, limit, end_ids, self.model.device, index)
            for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        for request in requests:
            request.on_end = ended.put
        try:
            self.submit(requests)
            for _ in requests:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            for request in requests:
                request.aborted = True
        return [request.token_ids for request in requests]

    def run_prefilled(
        self, prompt: PreparedPrompt, function: Callable[[PrefillOutput], Any]
    ) -> Any:
        """What `function` returns for a prompt's prefill, in the engine's thread.

        Other requests wait meanwhile. The function must not modify its argument.
        """
        job = _Job(self.state(prompt), function, Future())
        self.submit([job])
        return job.result.result()

    def next_token_logits(self, prompts: Sequence[PromptState]) -> list[torch.Tensor]:
        """The logits (V,) after the last token of each prompt, in float32.

        Prompts of several callers are computed together.
        """
        jobs = [_LogitsJob(prompt, Future()) for prompt in prompts]
        self.submit(jobs)
        return [job.result.result() for job in jobs]

    def clear_cache(self) -> None:
        """Clear the caches before the next prompt."""
        self._must_clear = True

    def stats(self) -> EngineStats:
        """Counts of requests and of what was computed."""
        batch = self._batch
        return replace(
            batch.stats,
            num_running=len(batch.requests),
            num_waiting=len(self._waiting),
            prefix_cache_keys=batch.prefixes.cached_keys,
            prefix_cache_bytes=batch.prefixes.bytes,
            image_cache_bytes=batch.images.bytes,
        )

    # ------------------------------------------------------------ for the engine's thread

    def run(self, items: Sequence[Item]) -> None:
        """Process items, and those that arrive meanwhile, until nothing is left.

        Errors such as a lack of memory end all requests, but not the thread.
        """
        with _neutral_modes(self.model.device):
            while not self._thread.closed:
                self._jobs += [item for item in items if isinstance(item, _Job)]
                self._logits_jobs += [item for item in items if isinstance(item, _LogitsJob)]
                self._waiting += [item for item in items if isinstance(item, Request)]
                try:
                    self._step()
                except Exception as error:  # the callers receive it
                    self._fail(error)
                items = self._thread.take()
                jobs = self._jobs or self._logits_jobs
                if not (items or jobs or self._waiting or self._batch.requests):
                    return

    def _step(self) -> None:
        """Prefill some requests, and decode one token for all."""
        batch = self._batch
        self._waiting = [request for request in self._waiting if not request.aborted]
        batch.remove_finished()
        has_jobs = bool(self._jobs or self._logits_jobs)
        if has_jobs or (self._waiting and len(batch.requests) < self.max_num_seqs):
            if self._must_clear:
                self._must_clear = False
                batch.clear()
            batch.clear_if_weights_changed()
            while self._jobs:
                job = self._jobs.pop(0)
                try:
                    job.result.set_result(job.function(batch.prefill_alone(job.prompt)))
                except Exception as error:  # the caller of `run_prefilled` receives it
                    job.result.set_exception(error)
            self._compute_logits()
            selected = select_prefills(
                self._waiting[: self.max_num_seqs],
                batch.prefixes,
                is_packed=batch.runner.uses_cpu_kernels,
                is_busy=bool(batch.requests),
                fits=lambda requests: self._fits([*batch.requests, *requests]),
            )
            if selected:
                batch.add(selected)
                self._waiting = [one for one in self._waiting if one not in selected]
        if batch.requests:
            if self.on_step is not None:
                self.on_step(len(batch.requests))
            batch.step()

    def _compute_logits(self) -> None:
        """Compute the logits of some prompts in one batch."""
        limit = MAX_PREFILL_TOKENS_BUSY if self._batch.requests else MAX_PREFILL_TOKENS_IDLE
        jobs: list[_LogitsJob] = []
        width = 0
        while self._logits_jobs:
            width = max(width, self._logits_jobs[0].prompt.num_tokens)
            if jobs and (len(jobs) + 1) * width > limit:
                break
            jobs.append(self._logits_jobs.pop(0))
        if not jobs:
            return
        try:
            logits = self._batch.next_token_logits([job.prompt for job in jobs])
            for job, row in zip(jobs, logits, strict=True):
                job.result.set_result(row)
        except Exception as error:  # the callers receive it
            for job in jobs:
                job.result.set_exception(error)

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Whether there are rows and memory for these requests; one always fits."""
        if len(requests) <= 1:
            return True
        longest = max(request.prompt.num_tokens + request.max_tokens for request in requests)
        position_bytes = self._batch.runner.cache.position_bytes
        size = 2 * len(requests) * longest * position_bytes  # 2: the cache grows by doubling
        return len(requests) <= self.max_num_seqs and size <= self._max_batch_bytes

    def _reset(self) -> tuple[list[Request], list[_Job | _LogitsJob]]:
        """Remove everything; returns what was removed."""
        requests = [*self._batch.reset(), *self._waiting]
        jobs: list[_Job | _LogitsJob] = [*self._jobs, *self._logits_jobs]
        self._waiting, self._jobs, self._logits_jobs = [], [], []
        return requests, jobs

    def _fail(self, error: Exception) -> None:
        """End everything."""
        requests, jobs = self._reset()
        for request in requests:
            request.end(error)
        for job in jobs:
            job.result.set_exception(error)


class _EngineThread:
    """The thread of an engine core, and its queue of items.

    It does not reference the core, so that an idle thread does not keep the model in memory.
    """

    def __init__(self, core: EngineCore) -> None:
        # `put` of a SimpleQueue is reentrant: the garbage collector may run anywhere.
        self._queue: SimpleQueue[Sequence[Item]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.process = os.getpid()
        self.closed = False
        self._core = weakref.ref(core)
        # At the interpreter's exit, the thread must not be inside of torch.
        weakref.finalize(core, self.close)

    def put(self, items: Sequence[Item]) -> None:
        """Hand items to the thread; starts it if necessary."""
        if self.closed:
            raise RuntimeError("the engine is shut down: the process is exiting")
        self._queue.put(items)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="owl2-engine", daemon=True)
                self._thread.start()

    def take(self) -> list[Item]:
        """All items that arrived since."""
        items: list[Item] = []
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


@contextmanager
def _neutral_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and the current CUDA device is the model's."""
    with (
        torch.inference_mode(False),  # outside of no_grad, as it enables gradients
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield
