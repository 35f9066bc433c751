"""The engine core: one thread runs the model for all requests.

::

    any thread ──Request──► queue ──► the engine's thread, step by step:
        waiting prompts ──Prefiller──► rows of the running batch
        running requests ──ModelRunner.decode──► one token each ──► callbacks

Requests join and leave between steps, so that none waits for the end of another. An answer does not
depend on the other requests, up to rounding in the dtype.

All of torch's work happens in this thread. Each thread that computes has its own OpenMP threads,
and where they outnumber the cores, they sleep after every operation: prompts take a third longer.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from owl2.engine.engine_thread import EngineThread
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prefill import Prefiller, PrefillOutput
from owl2.engine.prefix_cache import PromptState, free_memory
from owl2.engine.running_batch import RunningBatch
from owl2.engine.sampling import SamplingParams
from owl2.engine.scheduler import Request, select_prefills
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.runtime import release_openmp_threads

# Fractions of the free memory: for cached prefixes, image embeddings, and running requests.
PREFIX_FRACTION, FEATURE_FRACTION, BATCH_FRACTION = 0.1, 0.01, 0.5


@dataclass(frozen=True)
class EngineStats:
    """What an engine does, and what it has computed since it was created.

    Attributes:
        num_running, num_waiting: Requests.
        num_prefills: Prompts that were computed; answers to the same prompt share one.
        num_prefill_tokens: Tokens of these prompts that no cached prefix had.
        num_encoded_images: Images that passed through the vision encoder.
        num_decode_steps: Steps of one token for each running request.
        prefix_cache_keys: The token sequences in the prefix cache.
        prefix_cache_bytes, image_cache_bytes: Sizes of the caches.
    """

    num_running: int
    num_waiting: int
    num_prefills: int
    num_prefill_tokens: int
    num_encoded_images: int
    num_decode_steps: int
    prefix_cache_keys: list[tuple[int | bytes, ...]]
    prefix_cache_bytes: int
    image_cache_bytes: int


class _Job(NamedTuple):
    """A prompt whose prefill is passed to a function instead of being answered."""

    prompt: PromptState
    function: Callable[[PrefillOutput], Any]
    result: Future


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
    """

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
        free = free_memory(model.device)
        if prefix_cache_bytes is None:
            prefix_cache_bytes = int(free * PREFIX_FRACTION)
        if image_cache_bytes is None:
            image_cache_bytes = int(free * FEATURE_FRACTION)
        if not enable_prefix_caching:
            prefix_cache_bytes = image_cache_bytes = 0
        self.model = model
        self.max_num_seqs = max_num_seqs
        self._max_batch_bytes = int(free * BATCH_FRACTION)
        self._prefiller = Prefiller(model, prefix_cache_bytes, image_cache_bytes)
        if min_prefix_tokens is not None:
            self._prefiller.prefixes.min_tokens = min_prefix_tokens
        self._num_decode_steps = 0
        self._must_clear = False
        self._reset()
        self._thread = EngineThread()
        # At the interpreter's exit, the thread must not be inside of torch.
        weakref.finalize(self, self._thread.close)

    def _reset(self) -> None:
        self._batch: RunningBatch | None = None
        self._waiting: list[Request] = []
        self._jobs: list[_Job] = []

    # ------------------------------------------------------------ for any thread

    def prepare(
        self, ids: Sequence[int], pixel_values: torch.Tensor | None = None
    ) -> PreparedPrompt:
        """A prompt of token ids with its images (N, 3, H, W).

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
        return PreparedPrompt.from_ids(
            ids, pixel_values, config.image_token_id, config.num_image_tokens
        )

    def submit(self, items: "Sequence[Request | _Job]") -> None:
        """Queue requests; their callbacks report the results.

        Raises:
            RuntimeError: The process is exiting.
        """
        release_openmp_threads()  # those of the thread that loaded the model, for example
        if self._thread.is_forked:
            self._reset()
        self._thread.put(items, self)

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
        device = self.model.device
        requests = [
            Request(PromptState(prompt), params, limit, end_ids, device, i, on_end=ended.put)
            for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        try:
            self.submit(requests)
            for _ in requests:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            for request in requests:
                request.aborted = True
        return [request.token_ids for request in requests]

    def stream(
        self,
        prompt: PreparedPrompt,
        params: SamplingParams,
        max_tokens: int,
        end_ids: Collection[int],
    ) -> Iterator[int]:
        """The token ids of one answer as they are generated. Closing the iterator ends it."""
        events: SimpleQueue[int | BaseException | None] = SimpleQueue()
        request = Request(
            PromptState(prompt),
            params,
            max_tokens,
            end_ids,
            self.model.device,
            on_token=lambda token, _: events.put(token),
            on_end=events.put,
        )
        try:
            self.submit([request])
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            request.aborted = True

    def run_prefilled(
        self, prompt: PreparedPrompt, function: Callable[[PrefillOutput], Any]
    ) -> Any:
        """What `function` returns for a prompt's prefill, in the engine's thread.

        Other requests wait meanwhile. The function must not modify its argument.
        """
        job = _Job(PromptState(prompt), function, Future())
        self.submit([job])
        return job.result.result()

    def clear_cache(self) -> None:
        """Clear the caches before the next prompt."""
        self._must_clear = True

    def stats(self) -> EngineStats:
        """Counts of requests and of what was computed."""
        prefiller = self._prefiller
        return EngineStats(
            num_running=len(self._batch.requests) if self._batch is not None else 0,
            num_waiting=len(self._waiting),
            num_prefills=prefiller.num_prompts,
            num_prefill_tokens=prefiller.num_tokens,
            num_encoded_images=prefiller.num_images,
            num_decode_steps=self._num_decode_steps,
            prefix_cache_keys=prefiller.prefixes.cached_keys,
            prefix_cache_bytes=prefiller.prefixes.bytes,
            image_cache_bytes=prefiller.features.bytes,
        )

    # ------------------------------------------------------------ for the engine's thread

    def run(self, items: Sequence[Request | _Job]) -> None:
        """Process items, and those that arrive meanwhile, until nothing is left.

        Errors such as a lack of memory end all requests, but not the thread.
        """
        with _neutral_modes(self.model.device):
            while not self._thread.closed:
                self._jobs += [item for item in items if isinstance(item, _Job)]
                self._waiting += [item for item in items if isinstance(item, Request)]
                try:
                    if not self._step():
                        return
                except Exception as error:  # the callers receive it
                    self._fail(error)
                items = self._thread.take()

    def _step(self) -> bool:
        """Prefill some requests, and decode one token for all; False if nothing is left."""
        self._waiting = [request for request in self._waiting if not request.aborted]
        batch = self._current_batch()
        batch.remove_aborted()
        if self._jobs or (self._waiting and len(batch.requests) < self.max_num_seqs):
            self._clear_cache_if_needed()
            while self._jobs:
                self._run_job(self._jobs.pop(0))
            selected = select_prefills(
                self._waiting[: self.max_num_seqs],
                self._prefiller.prefixes,
                is_packed=batch.runner.uses_cpu_kernels,
                is_busy=bool(batch.requests),
                fits=lambda requests: self._fits([*batch.requests, *requests]),
            )
            if selected:
                batch.add(selected)
                self._waiting = [one for one in self._waiting if one not in selected]
        if batch.requests:
            self._num_decode_steps += 1
            batch.step()
        return bool(self._waiting or batch.requests or self._thread.has_items)

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Whether there are rows and memory for these requests; one always fits."""
        if len(requests) <= 1:
            return True
        longest = max(request.max_length for request in requests)
        position_bytes = self._current_batch().runner.cache.position_bytes
        size = 2 * len(requests) * longest * position_bytes  # 2: the cache grows by doubling
        return len(requests) <= self.max_num_seqs and size <= self._max_batch_bytes

    def _run_job(self, job: _Job) -> None:
        try:
            job.result.set_result(job.function(self._prefiller.prefill_alone(job.prompt)))
        except Exception as error:  # the caller of `run_prefilled` receives it
            job.result.set_exception(error)

    def _clear_cache_if_needed(self) -> None:
        if self._must_clear:
            self._must_clear = False
            self._prefiller.clear()
        self._prefiller.clear_if_weights_changed()

    def _current_batch(self) -> RunningBatch:
        """The batch; a new one if the model was moved or cast since the last request."""
        batch = self._batch
        if batch is None or (batch.runner.is_stale and not batch.requests):
            batch = self._batch = RunningBatch(ModelRunner(self.model), self._prefiller)
        return batch

    def _fail(self, error: Exception) -> None:
        """End everything, and free all memory: a lack of it may have caused the error."""
        running = self._batch.requests if self._batch is not None else []
        requests, jobs = [*running, *self._waiting], self._jobs
        self._reset()
        self._prefiller.clear()
        for request in requests:
            request.end(error)
        for job in jobs:
            job.result.set_exception(error)


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
