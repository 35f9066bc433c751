"""The running requests: their prompts, decode steps, and rows of the cache.

Shapes: B requests, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from owl2.engine.prefix_cache import PromptState
from owl2.engine.sampling import compute_logprobs, non_finite_error, sample
from owl2.engine.scheduler import Request

if TYPE_CHECKING:
    from owl2.engine.model_runner import ModelRunner
    from owl2.engine.prefill import Prefiller


class RunningBatch:
    """The running requests, each in the row of the cache with its index.

    The last row moves to where one becomes free, so that rows 0 to B-1 are always used.
    """

    def __init__(self, runner: "ModelRunner", prefiller: "Prefiller") -> None:
        self.runner = runner
        self.requests: list[Request] = []
        self._prefiller = prefiller

    def add(self, requests: Sequence[Request]) -> None:
        """Compute the prompts of requests and their first tokens.

        Requests with the same prompt share its computation.
        """
        first, cache = len(self.requests), self.runner.cache
        originals: dict[PromptState, Request] = {}
        for request in requests:
            originals.setdefault(request.prompt, request)
        copies = [one for one in requests if one is not originals[one.prompt]]
        requests = [*originals.values(), *copies]
        cache.reserve(first + len(requests), max(prompt.num_tokens for prompt in originals))
        logits = self._prefiller.prefill(list(originals), self.runner, first)
        if copies:
            rows = {prompt: row for row, prompt in enumerate(originals)}
            for row, request in enumerate(copies, first + len(originals)):
                cache.copy_row(first + rows[request.prompt], row, request.prompt.num_tokens)
            logits = logits[[rows[request.prompt] for request in requests]]
        for request in requests:
            request.epoch = self._prefiller.epoch
        self.requests += requests
        self._sample(requests, logits)

    def step(self) -> None:
        """Decode one token for every request."""
        tokens = torch.tensor([request.token_ids[-1] for request in self.requests])
        positions = torch.tensor([request.num_cached for request in self.requests])
        logits = self.runner.decode(tokens.to(self.runner.model.device), positions)  # (B, V)
        self._sample(self.requests, logits)

    def remove_aborted(self) -> None:
        """Free the rows of requests that are finished or aborted."""
        cache = self.runner.cache
        for row in reversed(range(len(self.requests))):
            request = self.requests[row]
            if not (request.aborted or request.is_finished):
                continue
            self._store_prefix(request, row)
            last = self.requests.pop()
            if last is not request:
                cache.copy_row(len(self.requests), row, last.num_cached)
                self.requests[row] = last

    def _sample(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        """Choose and report the next token of each request."""
        params = [request.params for request in requests]
        tokens = sample(logits, params, [request.generator for request in requests])
        logprobs = compute_logprobs(logits, tokens, [own.top_logprobs for own in params])
        for request, token, own in zip(list(requests), tokens, logprobs, strict=True):
            if token is None:
                position = f"token {len(request.token_ids) + 1} of the answer"
                request.token_ids.clear()  # its keys and values must not be cached
                request.end(non_finite_error(logits.dtype, position))
            else:
                request.add_token(token, own)
        self.remove_aborted()

    def _store_prefix(self, request: Request, row: int) -> None:
        """Cache the prompt and the answer: the next turn of the dialogue starts with them."""
        if not request.token_ids or request.epoch != self._prefiller.epoch:
            return
        key = (*request.prompt.key, *request.token_ids[:-1])
        if self._prefiller.prefixes.accepts(key):
            self._prefiller.prefixes.add(key, *self.runner.cache.read(row, request.num_cached))
