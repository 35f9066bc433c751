"""Prompts in ids → answers in ids: what waits is computed together, what is known is not again.

::

    any thread ──Request──► Inbox ──► one thread that leads, turn by turn:
        prompts of like length ──Reader: one forward──► rows of the cache
        all rows ──FastDecoder: a token each──► queues ──► the threads that wait

New requests join between steps and finished ones leave, so none waits for another's end. An answer
does not depend on what else is computed beside it, as far as the dtype's rounding goes.
"""

import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from owl2.engine.prefill import Read, Reader
from owl2.engine.prefix_cache import free_memory
from owl2.engine.running_batch import Request
from owl2.engine.sampling import SamplingParams
from owl2.engine.scheduler import Inbox, Job, Worker
from owl2.engine.token_stream import Following
from owl2.model.modeling import Owl2ForConditionalGeneration

# Of the memory that is free beside the model: for keys and values of earlier prompts, for images'
# embeddings, for what is being answered.
PREFIX_SHARE, FEATURE_SHARE, ROWS_SHARE = 0.1, 0.01, 0.5


class Prompt(NamedTuple):
    """Ids with K + 1 image tokens for every image, and the images (N, 3, H, W) or None."""

    ids: tuple[int, ...]
    pixel_values: torch.Tensor | None = None


class Runner:
    """Answers prompts with a model, from any number of threads at once.

    The images' embeddings, and the keys and values of prompts and answers, are kept from request
    to request. They are forgotten when weights change in a way that autograd sees (optimizers,
    `load_state_dict`); after writing to ``weight.data`` call `forget`.

    Args:
        max_batch: requests that are answered together.
        prefix_bytes: for keys and values; default: a tenth of what is free beside the model.
        feature_bytes: for images' embeddings; default: a hundredth.
        reuse: False: nothing is kept, whatever these two say.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        *,
        max_batch: int = 16,
        prefix_bytes: int | None = None,
        feature_bytes: int | None = None,
        reuse: bool = True,
    ) -> None:
        free = free_memory(model.device)
        if prefix_bytes is None:
            prefix_bytes = int(free * PREFIX_SHARE)
        if feature_bytes is None:
            feature_bytes = int(free * FEATURE_SHARE)
        self.model = model
        self.reader = Reader(model, prefix_bytes * reuse, feature_bytes * reuse)
        self._inbox = Inbox()
        self._worker = Worker(self.reader, self._inbox, max_batch, int(free * ROWS_SHARE))
        # Also at the interpreter's end, which must not find the worker's thread inside of torch.
        weakref.finalize(self._worker, self._inbox.close)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: SamplingParams,
        limits: Sequence[int],
        ends: Collection[int],
    ) -> list[list[int]]:
        """The answers, each up to one of the ids in `ends` (included) or to its limit.

        Prompt i is sampled with the seed `decoding.seed` + i, so its answer is the one that it
        would have alone with that seed.

        Raises:
            InputError: ids or images that do not fit; logits that are not finite.
        """
        ended: SimpleQueue = SimpleQueue()
        requests = []
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            sampler = (decoding, decoding.generator(number, self.model.device))
            begun = self.reader.begin(*prompt)
            requests.append(Request(begun, sampler, limit, frozenset(ends), ended))
        try:
            self._worker.lead(requests, lambda: ended.qsize() == len(requests))
            for _ in requests:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            for request in requests:
                request.cancelled = True
        return [request.answer for request in requests]

    def stream(
        self, prompt: Prompt, decoding: SamplingParams, limit: int, ends: Collection[int]
    ) -> Generator[int, None, None]:
        """The ids of `generate`'s answer, as they are made.

        Nothing is computed before the first is asked for. Closing the iterator frees the row
        for who asks next.
        """
        following = self.follow([prompt], decoding, [limit], ends)

        def tokens() -> Generator[int, None, None]:
            with closing(following):
                for event in following:
                    yield event.token

        return tokens()

    def follow(
        self,
        prompts: Sequence[Prompt],
        decoding: SamplingParams,
        limits: Sequence[int],
        ends: Collection[int],
        copies: int = 1,
        top: int | None = None,
    ) -> Following:
        """Answers as they are made, the tokens of all of them in one line.

        Args:
            copies: answers to each prompt, which is computed once: those of prompt i have the
                numbers from i · copies on. Number i is sampled with the seed `decoding.seed` + i.
            top: of how many of the likeliest tokens each event has the log-probabilities, beside
                its own; None: no scores.

        Raises:
            InputError: as `generate`.
        """
        queue: SimpleQueue = SimpleQueue()
        requests: list[Request] = []
        for prompt, limit in zip(prompts, limits, strict=True):
            begun = self.reader.begin(*prompt)
            for _ in range(copies):
                number = len(requests)
                sampler = (decoding, decoding.generator(number, self.model.device))
                requests.append(Request(begun, sampler, limit, frozenset(ends), queue, number, top))
        return Following(self._worker, requests, queue)

    def read(self, prompt: Prompt, use: Callable[[Read], Any]) -> Any:
        """What `use` makes of a prompt's logits, keys and values, by who leads.

        It must leave them as they are. Other requests wait meanwhile.
        """
        done: SimpleQueue = SimpleQueue()
        job = Job(self.reader.begin(*prompt), use, done)
        self._worker.lead([job], lambda: not done.empty())
        if (error := done.get()) is not None:
            raise error
        return job.result

    def forget(self) -> None:
        """Keep nothing of what was computed so far."""
        self._worker.forget = True
