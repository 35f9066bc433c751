"""Sequences that are being answered, all of them a token further at each step.

::

    Request ──join: its prompt is computed──► a row of the cache
    ──step──► a token more ──► … ──its end token, its limit, or nobody waits──► the row is free

Rows are always 0 … B-1: the last one moves to where one becomes free.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Collection, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import torch

from owl2.engine.model_runner import FastDecoder
from owl2.engine.prefill import Begun, Reader
from owl2.engine.sampling import (
    Logprobs as Score,
)
from owl2.engine.sampling import (
    SamplingParams,
    compute_logprobs,
    non_finite_error,
    sample,
)


class Event(NamedTuple):
    """A token was made: for the request of this number among those with the same listener."""

    number: int
    token: int
    score: Score | None = None


class Request:
    """A prompt that waits for its answer, or is being answered.

    Attributes:
        answer: ids so far, the end token too.
        top: how many of the likeliest tokens are reported beside each; None: no scores.
        cancelled: nobody waits any more; may be set from any thread.
    """

    def __init__(
        self,
        prompt: Begun,
        sampler: tuple[SamplingParams, torch.Generator | None],
        limit: int,
        ends: Collection[int],
        listener: SimpleQueue,
        number: int | None = None,
        top: int | None = None,
    ) -> None:
        """`listener`: gets an `Event` for each token if the request has a `number`, and at the end
        in any case the exception that ended it, or None."""
        self.prompt = prompt
        self.sampler = sampler
        self.limit = limit
        self.ends = ends
        self.answer: list[int] = []
        self.cancelled = False
        self.epoch = 0  # of what is kept, when the prompt was computed
        self.top = top
        self._listener = listener
        self._number = number

    @property
    def filled(self) -> int:
        """Positions whose keys and values are there: all but the last token's."""
        return len(self.prompt.ids) + len(self.answer) - 1

    @property
    def longest(self) -> int:
        """Positions that it may need in all."""
        return len(self.prompt.ids) + self.limit

    @property
    def is_over(self) -> bool:
        """Whether the answer is whole."""
        if not self.answer:
            return False
        return len(self.answer) >= self.limit or self.answer[-1] in self.ends

    def add(self, token: int, score: Score | None = None) -> None:
        """Take its next token, and tell who listens."""
        self.answer.append(token)
        if self._number is not None:
            self._listener.put(Event(self._number, token, score))

    def end(self, error: BaseException | None = None) -> None:
        """Tell who listens that nothing more comes."""
        self._listener.put(error)


class Rows:
    """The requests that are being answered, each in the row of the cache that has its number.

    Args:
        reader: keeps keys and values of requests that are over.
    """

    def __init__(self, decoder: FastDecoder, reader: Reader) -> None:
        self.decoder = decoder
        self.active: list[Request] = []
        self._reader = reader

    def join(self, requests: Sequence[Request]) -> None:
        """Take in requests: compute their prompts, and choose their first tokens.

        Several may have one prompt: it is computed once, and copied.
        """
        first, cache = len(self.active), self.decoder.cache
        firsts: dict[Begun, Request] = {}
        for request in requests:
            firsts.setdefault(request.prompt, request)
        copies = [request for request in requests if request is not firsts[request.prompt]]
        requests = [*firsts.values(), *copies]
        cache.reserve(first + len(requests), max(len(prompt.ids) for prompt in firsts))
        logits = self._reader.read(list(firsts), self.decoder, first)
        if copies:
            numbers = {prompt: number for number, prompt in enumerate(firsts)}
            for row, request in enumerate(copies, first + len(firsts)):
                cache.move(first + numbers[request.prompt], row, len(request.prompt.ids))
            logits = logits[[numbers[request.prompt] for request in requests]]
        for request in requests:
            request.epoch = self._reader.epoch
        going = self._take_tokens(requests, logits)
        self.active += requests
        self._leave([first + number for number, goes_on in enumerate(going) if not goes_on])

    def step(self) -> None:
        """A token more for all."""
        tokens = torch.tensor([request.answer[-1] for request in self.active])
        positions = torch.tensor([request.filled for request in self.active])
        logits = self.decoder.step(tokens.to(self.decoder.model.device), positions)  # (B, V)
        going = self._take_tokens(self.active, logits)
        self._leave([row for row, goes_on in enumerate(going) if not goes_on])

    def drop_cancelled(self) -> None:
        """Free the rows of requests that nobody waits for."""
        self._leave([row for row, request in enumerate(self.active) if request.cancelled])

    def _take_tokens(self, requests: Sequence[Request], logits: torch.Tensor) -> list[bool]:
        """Choose and hand out the next token of each; False for those that are over with it."""
        tokens = sample(logits, *zip(*[request.sampler for request in requests], strict=True))
        scores = compute_logprobs(logits, tokens, [request.top for request in requests])
        going = []
        for request, token, score in zip(requests, tokens, scores, strict=True):
            if token is None:
                place = f"token {len(request.answer) + 1} of the answer"
                request.end(non_finite_error(logits.dtype, place))
                going.append(False)
                continue
            request.add(token, score)
            if request.is_over:
                request.end()
            going.append(not request.is_over)
        return going

    def _leave(self, rows: Sequence[int]) -> None:
        """Free rows; `rows` in ascending order."""
        cache = self.decoder.cache
        for row in reversed(rows):
            request, last = self.active[row], len(self.active) - 1
            self._keep(request, row)
            if row != last:
                moved = self.active[last]
                cache.move(last, row, moved.filled)
                self.active[row] = moved
            self.active.pop()

    def _keep(self, request: Request, row: int) -> None:
        """Keep prompt and answer of a request that leaves its row: a next turn begins with them."""
        whole = request.is_over or request.cancelled  # else its numbers went wrong
        if not whole or request.epoch != self._reader.epoch:
            return
        key = (*request.prompt.key, *request.answer[:-1])
        if self._reader.prefixes.wants(key):
            self._reader.prefixes.add(key, *self.decoder.cache.take(row, request.filled))
