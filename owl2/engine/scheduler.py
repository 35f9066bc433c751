"""Requests, and the choice of the prompts, or chunks of them, that each step computes."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList

from owl2.engine.logits_processors import logits_processors
from owl2.engine.prefix_cache import PrefixCache, TensorCache, common_prefix_length
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.engine.sampler import Logprobs, non_finite_error, sample
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.structured_output import GrammarMatcher
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration

MIN_PREFILL_FRACTION = 0.25  # of the tokens of a step, however many requests decode


class Request:
    """One answer to a prompt, from its submission to its end.

    Args:
        prompt: Shared by all answers to it.
        max_tokens: Tokens of the answer.
        end_ids: Tokens that end the answer.
        index: Of the answer; selects the seed, `params.seed` + `index`.

    Attributes:
        token_ids: The answer so far, with its end token.
        aborted: The result is no longer wanted. May be set from any thread.
        is_prefilling: The request runs, and its prompt is incomplete.
        epoch: The batch's epoch when the request started.
        processors: What the options change in the logits; see `logits_processors`.
        matcher: The state of the answer in its grammar; None without `structured_outputs`.
        on_token: Called in the engine's thread with each token, and its log-probabilities if
            `params` request them. An exception ends the request.
        on_end: Called there once, with the error that ended the request or None; not after
            `aborted`. It must not raise.
    """

    def __init__(
        self,
        prompt: PromptState,
        params: SamplingParams,
        max_tokens: int,
        end_ids: Collection[int],
        device: torch.device,
        index: int = 0,
    ) -> None:
        self.prompt = prompt
        self.index = index
        self.params = params
        self.device = device
        self.generator = params.generator(index, device)
        self.max_tokens = max_tokens
        self.end_ids = end_ids
        self.token_ids: list[int] = []
        self.aborted = False
        self.is_prefilling = False
        self.epoch = 0
        self.processors = LogitsProcessorList()
        self.matcher: GrammarMatcher | None = None
        self.on_token: Callable[[int, Logprobs | None], object] | None = None
        self.on_end: Callable[[BaseException | None], object] | None = None

    @property
    def num_cached(self) -> int:
        """Positions whose keys and values exist: in decoding all but that of the last token."""
        if self.is_prefilling:
            return self.prompt.num_computed_tokens
        return self.prompt.num_tokens + len(self.token_ids) - 1

    @property
    def num_total(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return self.prompt.num_tokens + self.max_tokens

    @property
    def has_end_token(self) -> bool:
        """Whether the last token is an end token."""
        return bool(self.token_ids) and self.token_ids[-1] in self.end_ids

    @property
    def is_stopped(self) -> bool:
        """Whether the answer has its end token, or its grammar allows no more tokens."""
        return self.has_end_token or (self.matcher is not None and self.matcher.is_stopped)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        return self.is_stopped or len(self.token_ids) >= self.max_tokens

    def allowed_tokens(self, vocab_size: int) -> torch.Tensor | None:
        """The mask (V,) of the next token for `sample`; None without a grammar."""
        return None if self.matcher is None else self.matcher.allowed_tokens(vocab_size)

    def create_processors(self, model: Owl2ForConditionalGeneration) -> None:
        """Set `processors`, before the first token."""
        self.processors = logits_processors(
            self.params, model, self.prompt.prepared.ids, self.max_tokens, self.end_ids
        )

    def bind_processors(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What `sample` applies to the logits of the next token; None without processors."""
        if not self.processors:
            return None
        ids: Any = torch.tensor([[*self.prompt.prepared.ids, *self.token_ids]], device=self.device)
        return partial(self.processors, ids)

    def add_token(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Append the next token; ends the request if it is the last one."""
        self.token_ids.append(token)
        if self.matcher is not None:
            self.matcher.accept(token)
        try:
            if self.on_token is not None:
                self.on_token(token, logprobs)
        except Exception as error:  # the submitter receives it
            self.end(error)
        if self.is_finished:
            self.end()

    def no_token_error(self, dtype: torch.dtype) -> InputError:
        """The error if there is no next token for logits of this dtype."""
        if self.matcher is not None and self.matcher.error is not None:
            return self.matcher.input_error()
        return non_finite_error(dtype, f"token {len(self.token_ids) + 1} of the answer")

    def end(self, error: BaseException | None = None) -> None:
        """Report the end, once."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None and not self.aborted:
            on_end(error)
        self.aborted |= error is not None


def sample_tokens(requests: Sequence[Request], logits: torch.Tensor) -> list[int | None]:
    """The next token of each of B requests from its logits (B, V), see `sample`."""
    return sample(
        logits,
        [request.params for request in requests],
        [request.generator for request in requests],
        [request.bind_processors() for request in requests],
        [request.allowed_tokens(logits.shape[1]) for request in requests],
    )


class Scheduler:
    """Chooses the chunks of prompts that each step computes, as in vLLM's chunked prefill.

    The running requests decode in every step. The prompts get the rest of its token budget, at
    least a quarter:

    - Half of it belongs to the prompt that arrived first, and the rest to those with the fewest
      remaining tokens. A short prompt does not wait for a long one, and none waits forever.
    - An image counts twice, because encoding takes about as long as its tokens in the decoder. The
      last image of a chunk may exceed the budget.
    - Of prompts with a common uncached prefix, one computes it, and the others find its keys and
      values in the prefix cache.

    Args:
        prefixes, images: The caches of the batch.
        max_num_batched_tokens: Tokens of a step.

    Attributes:
        waiting: Requests that have not started, in the order of arrival.
    """

    def __init__(
        self, prefixes: PrefixCache, images: TensorCache[bytes], max_num_batched_tokens: int
    ) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Request] = []
        self._prefixes = prefixes
        self._images = images
        self._num_arrived = 0

    def add(self, requests: Sequence[Request]) -> None:
        """Append requests to those that wait."""
        for request in requests:
            prompt = request.prompt
            if prompt.arrival is None:
                prompt.arrival = self._num_arrived
                self._num_arrived += 1
                prompt.look_up(self._prefixes)  # for the number of new tokens only
                prompt.prefix = None  # the cache may evict it
        self.waiting += requests

    def schedule(
        self,
        running: Sequence[Request],
        fits: Callable[[int, int], bool],
        store_prefix: Callable[[PromptState, int], None],
    ) -> tuple[list[Request], list[PromptChunk]]:
        """The requests that start, and the chunks of this step.

        Args:
            running: Decoding, or with incomplete prompts.
            fits: Whether there are rows and memory for a number of requests of up to a number of
                tokens each.
            store_prefix: Adds the first tokens of an incomplete prompt to the prefix cache.
        """
        prefilling = (request.prompt for request in running if request.is_prefilling)
        started = list(dict.fromkeys(prefilling))
        groups = self._admit(running, fits)
        prompts = [*started, *(prompt for prompt in groups if prompt not in started)]
        prompts.sort(key=lambda prompt: prompt.arrival or 0)
        num_decoding = sum(not request.is_prefilling for request in running)
        minimum = math.ceil(MIN_PREFILL_FRACTION * self.max_num_batched_tokens)
        budget = max(self.max_num_batched_tokens - num_decoding, minimum)
        active, chunks = started.copy(), []

        def start(prompt: PromptState) -> bool:
            if prompt not in active:
                if not self._may_start(prompt, active, store_prefix):
                    return False
                active.append(prompt)
            return True

        first = next((prompt for prompt in prompts if start(prompt)), None)
        share = 0 if first is None else min((budget + 1) // 2, self._cost(first))
        for prompt in sorted(prompts, key=lambda prompt: prompt.num_new_tokens):
            if budget <= share:
                break
            if prompt is not first and start(prompt):
                chunk, cost = self._next_chunk(prompt, budget - share)
                chunks.append(chunk)
                budget -= cost
        if first is not None:
            chunks.append(self._next_chunk(first, max(budget, share))[0])
        requests = [request for prompt in active for request in groups.get(prompt, ())]
        self.waiting = [request for request in self.waiting if request not in requests]
        return requests, chunks

    def next_chunk(self, prompt: PromptState, fraction: float = 1.0) -> PromptChunk:
        """The next tokens of a prompt, up to a fraction of the budget."""
        return self._next_chunk(prompt, max(1, int(self.max_num_batched_tokens * fraction)))[0]

    def _admit(
        self, running: Sequence[Request], fits: Callable[[int, int], bool]
    ) -> dict[PromptState, list[Request]]:
        """The waiting requests that fit, by prompt; none overtakes one that does not fit."""
        groups: dict[PromptState, list[Request]] = {}
        longest = max((request.num_total for request in running), default=0)
        for count, request in enumerate(self.waiting, len(running) + 1):
            longest = max(longest, request.num_total)
            if not fits(count, longest):
                break
            groups.setdefault(request.prompt, []).append(request)
        return groups

    def _may_start(
        self,
        prompt: PromptState,
        active: Sequence[PromptState],
        store_prefix: Callable[[PromptState, int], None],
    ) -> bool:
        """Look a prompt up in the prefix cache, unless an active one computes its prefix."""
        for other in active if self._prefixes.limit else ():
            shared = prompt.end_of_shared(common_prefix_length(prompt.key, other.key))
            if shared <= prompt.num_computed_tokens + self._prefixes.min_tokens:
                continue
            if other.num_computed_tokens < shared:
                return False
            store_prefix(other, shared)
        prompt.look_up(self._prefixes)
        return True

    def _is_encoded(self, prompt: PromptState, index: int) -> bool:
        return index in prompt.image_embeddings or prompt.image_keys[index] in self._images

    def _encoding_cost(self, prompt: PromptState, index: int) -> int:
        """Tokens of the budget for encoding an image: the number of its tokens for each crop."""
        if self._is_encoded(prompt, index):
            return 0
        start, end = prompt.prepared.image_spans[index]
        return (end - start) * len(prompt.prepared.crops_of(index)[0])

    def _cost(self, prompt: PromptState) -> int:
        """Tokens of the budget that the rest of a prompt takes."""
        encoding = (self._encoding_cost(prompt, index) for index in prompt.new_images)
        return prompt.num_new_tokens + sum(encoding)

    def _next_chunk(self, prompt: PromptState, budget: int) -> tuple[PromptChunk, int]:
        """The next tokens that fit into a budget, and their part of it."""
        position, remaining = prompt.num_computed_tokens, budget
        images: list[int] = []

        def advance(end: int) -> None:
            nonlocal position, remaining
            count = min(end - position, max(0, remaining))
            position, remaining = position + count, remaining - count

        for index in prompt.new_images:
            start, end = prompt.prepared.image_spans[index]
            advance(max(start, position))
            if remaining <= 0:
                break
            images.append(index)
            remaining -= self._encoding_cost(prompt, index)
            advance(end)
        else:
            advance(prompt.num_tokens)
        return PromptChunk(prompt, position, images), budget - remaining
