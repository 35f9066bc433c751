"""The engine core: one thread runs the model for all requests.

::

    any thread ──Request──► queue ──► the engine's thread, step by step:
        waiting requests ──Scheduler.schedule──► chunks of prompts
        chunks, running requests ──RunningBatch.step──► one token each ──► callbacks

Requests join and leave between steps, and a step computes a limited number of tokens of prompts. So
no request waits for the prompt or the answer of another. Answers do not depend on the other
requests, up to rounding in the dtype.

This thread runs all computations of torch. Each thread that computes has its own OpenMP threads. If
they outnumber the cores, they sleep after every operation, and prompts take a third longer. The
operations of a small model are shorter than waiting for other threads, so that one thread computes.
"""

import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from owl2.engine.engine_thread import EngineThread
from owl2.engine.lora import LoraManager
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.engine.running_batch import EngineStats, PrefillOutput, RunningBatch
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.scheduler import Request, Scheduler
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.runtime import free_memory, release_openmp_threads, use_one_openmp_thread

# Fractions of the free memory: for cached prefixes, image embeddings, and running requests.
PREFIX_FRACTION, FEATURE_FRACTION, BATCH_FRACTION = 0.1, 0.01, 0.5
# Tokens of a step (docs/speed.md). A GPU needs more of them for its full speed. For a small model
# they take less time than the other work of a step.
MAX_NUM_BATCHED_TOKENS, MAX_NUM_BATCHED_TOKENS_CPU = 2048, 256
MAX_LOGITS_TOKENS_IDLE = 4096  # of `next_token_logits` in a step without other work
# Elements of the largest weight of a model that one thread computes.
MAX_SMALL_WEIGHT = 2**18


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
        max_num_batched_tokens: Tokens of a step: those of running requests, and with the rest of
            this budget prompts. Fewer tokens shorten the time between the tokens of an answer
            while other prompts are computed, and make prompts slower. Default: 256 on a CPU, 2048
            on a GPU.
        adapters: Of the model, which prompts name; default: none.

    Raises:
        InputError: `max_num_batched_tokens` is less than 1.

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
        max_num_batched_tokens: int | None = None,
        adapters: LoraManager | None = None,
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
        self._batch = RunningBatch(model, prefix_cache_bytes, image_cache_bytes, adapters)
        if min_prefix_tokens is not None:
            self._batch.prefixes.min_tokens = min_prefix_tokens
        weights = chain(model.parameters(), model.buffers())  # quantized ones are buffers
        self._is_small = all(weight.numel() <= MAX_SMALL_WEIGHT for weight in weights)
        if max_num_batched_tokens is None:
            on_cpu = model.device.type == "cpu" and not self._is_small
            max_num_batched_tokens = (
                MAX_NUM_BATCHED_TOKENS_CPU if on_cpu else MAX_NUM_BATCHED_TOKENS
            )
        if max_num_batched_tokens < 1:
            raise InputError(
                f"max_num_batched_tokens is {max_num_batched_tokens}; it must be 1 or more.",
                ErrorCode.INVALID_VALUE,
            )
        self._scheduler = Scheduler(
            self._batch.prefixes, self._batch.image_encoder.cache, max_num_batched_tokens
        )
        self._jobs: list[_Job] = []
        self._logits_jobs: list[_LogitsJob] = []
        self._running_job: Generator[None, None, Any] | None = None
        self._must_clear = False
        self._thread = EngineThread(self)

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
            self._thread = EngineThread(self)
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

        Other requests wait meanwhile, except that the engine takes a step whenever a generator
        function yields. The function must not modify its argument.
        """
        job = _Job(self.state(prompt), function, Future())
        self.submit([job])
        return job.result.result()

    def next_token_logits(self, prompts: Sequence[PreparedPrompt]) -> list[torch.Tensor]:
        """The logits (V,) after the last token of each prompt, in float32.

        Prompts of several callers are computed together.
        """
        jobs = [_LogitsJob(self.state(prompt), Future()) for prompt in prompts]
        self.submit(jobs)
        return [job.result.result() for job in jobs]

    def clear_cache(self) -> None:
        """Clear the caches before the next prompt."""
        self._must_clear = True

    def stats(self) -> EngineStats:
        """Counts of requests, prompts, images and steps."""
        batch = self._batch
        return replace(
            batch.stats,
            num_running=len(batch.requests),
            num_waiting=len(self._scheduler.waiting),
            prefix_cache_keys=batch.prefixes.cached_keys,
            prefix_cache_bytes=batch.prefixes.bytes,
            num_encoded_images=batch.image_encoder.num_encoded,
            image_cache_bytes=batch.image_encoder.cache.bytes,
        )

    # ------------------------------------------------------------ for the engine's thread

    def run(self, items: Sequence[Item]) -> None:
        """Process items, and those that arrive meanwhile, until nothing is left.

        Errors such as a lack of memory end all requests, but not the thread.
        """
        if self._is_small:
            use_one_openmp_thread()
        with _neutral_modes(self.model.device):
            while not self._thread.closed:
                self._jobs += [item for item in items if isinstance(item, _Job)]
                self._logits_jobs += [item for item in items if isinstance(item, _LogitsJob)]
                self._scheduler.add([item for item in items if isinstance(item, Request)])
                try:
                    self._step()
                except Exception as error:  # the callers receive it
                    self._fail(error)
                items = self._thread.take()
                has_requests = self._scheduler.waiting or self._batch.requests
                if not (items or self._jobs or self._logits_jobs or has_requests):
                    return

    def _step(self) -> None:
        """Compute chunks of some prompts, and one token for all running requests."""
        batch, scheduler = self._batch, self._scheduler
        scheduler.waiting = [request for request in scheduler.waiting if not request.aborted]
        batch.remove_finished()
        if self._jobs or self._logits_jobs or scheduler.waiting:
            if self._must_clear:
                self._must_clear = False
                batch.clear()
            batch.clear_if_weights_changed()
        if self._jobs:
            self._run_job()
        self._compute_logits()
        requests, chunks = scheduler.schedule(batch.requests, self._fits, batch.store_prefix)
        batch.add(requests)
        num_decoding = batch.num_decoding
        if num_decoding and self.on_step is not None:
            self.on_step(num_decoding)
        if num_decoding or chunks:
            batch.step(chunks)

    def _run_job(self) -> None:
        """Run the next part of the first job; its caller receives its errors."""
        job = self._jobs[0]
        try:
            if self._running_job is None:
                self._running_job = self._job_parts(job)
            with self._batch.adapters.use(job.prompt.prepared.adapter):
                next(self._running_job)
            return
        except StopIteration as end:
            job.result.set_result(end.value)
        except Exception as error:
            job.result.set_exception(error)
        self._running_job = None
        self._jobs.remove(job)

    def _job_parts(self, job: _Job) -> Generator[None, None, Any]:
        def next_chunk(prompt: PromptState) -> PromptChunk:
            # Prompts of the batch get the other half of the budget.
            return self._scheduler.next_chunk(prompt, 0.5 if self._batch.requests else 1.0)

        output = yield from self._batch.prefill_alone(job.prompt, next_chunk)
        result = job.function(output)
        return (yield from result) if isinstance(result, Generator) else result

    def _compute_logits(self) -> None:
        """Compute the logits of some prompts with the same adapter in one batch."""
        is_busy = self._batch.requests or self._scheduler.waiting or self._jobs
        limit = self._scheduler.max_num_batched_tokens if is_busy else MAX_LOGITS_TOKENS_IDLE
        jobs: list[_LogitsJob] = []
        width = 0
        for job in self._logits_jobs:
            if jobs and job.prompt.prepared.adapter != jobs[0].prompt.prepared.adapter:
                continue
            width = max(width, job.prompt.num_tokens)
            if jobs and (len(jobs) + 1) * width > limit:
                break
            jobs.append(job)
        if not jobs:
            return
        self._logits_jobs = [job for job in self._logits_jobs if job not in jobs]
        try:
            logits = self._batch.next_token_logits([job.prompt for job in jobs])
            for job, row in zip(jobs, logits, strict=True):
                job.result.set_result(row)
        except Exception as error:  # the callers receive it
            for job in jobs:
                job.result.set_exception(error)

    def _fits(self, count: int, num_tokens: int) -> bool:
        """Whether there are rows and memory for requests of up to this length; one always fits."""
        if count <= 1:
            return True
        position_bytes = self._batch.runner.cache.position_bytes
        size = 2 * count * num_tokens * position_bytes  # 2: the cache grows by doubling
        return count <= self.max_num_seqs and size <= self._max_batch_bytes

    def _reset(self) -> tuple[list[Request], list[_Job | _LogitsJob]]:
        """Remove everything; returns what was removed."""
        requests = [*self._batch.reset(), *self._scheduler.waiting]
        jobs: list[_Job | _LogitsJob] = [*self._jobs, *self._logits_jobs]
        self._jobs, self._logits_jobs, self._running_job = [], [], None
        self._scheduler.waiting = []
        return requests, jobs

    def _fail(self, error: Exception) -> None:
        """End everything."""
        requests, jobs = self._reset()
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
