"""Requests, and the choice of the waiting ones whose prompts are computed next.

A prefill batch contains similar prompts. Padded rows need about equally many new tokens after
equally many cached ones; the CPU kernels take any lengths. Of prompts with a common uncached
prefix, one is computed first, and the others find its keys and values in the prefix cache.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from owl2.engine.prefix_cache import PrefixCache, PromptState
from owl2.engine.sampling import Logprobs, SamplingParams

# Positions of one prefill: without running requests, and with some that wait for their next token.
MAX_PREFILL_TOKENS_IDLE, MAX_PREFILL_TOKENS_BUSY = 4096, 512

OnToken = Callable[[int, Logprobs | None], object]
OnEnd = Callable[[BaseException | None], object]


class Request:
    """One answer to a prompt, from its submission to its end.

    The scheduler's thread calls the callbacks. An exception that `on_token` raises ends the
    request; `on_end` must not raise.

    Args:
        prompt: Shared by all answers to it.
        index: Selects the seed, `params.seed` + `index`.
        max_tokens: Tokens of the answer.
        end_ids: Tokens that end the answer.
        on_token: Gets each token, and its log-probabilities if `params` request them.
        on_end: Called once, with the error that ended the request or None; not after `aborted`.

    Attributes:
        token_ids: The answer so far, with its end token.
        aborted: The result is no longer wanted. May be set from any thread.
        epoch: The prefiller's epoch when the prompt was computed.
    """

    def __init__(
        self,
        prompt: PromptState,
        params: SamplingParams,
        max_tokens: int,
        end_ids: Collection[int],
        device: torch.device,
        index: int = 0,
        on_token: OnToken | None = None,
        on_end: OnEnd | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.generator = params.generator(index, device)
        self.max_tokens = max_tokens
        self.end_ids = end_ids
        self.token_ids: list[int] = []
        self.aborted = False
        self.epoch = 0
        self._on_token = on_token
        self._on_end = on_end

    @property
    def num_cached(self) -> int:
        """Positions whose keys and values exist: all but that of the last token."""
        return self.prompt.num_tokens + len(self.token_ids) - 1

    @property
    def max_length(self) -> int:
        """Positions that the request may need."""
        return self.prompt.num_tokens + self.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        if not self.token_ids:
            return False
        return len(self.token_ids) >= self.max_tokens or self.token_ids[-1] in self.end_ids

    def add_token(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Append the next token; ends the request if it is the last one."""
        self.token_ids.append(token)
        try:
            if self._on_token is not None:
                self._on_token(token, logprobs)
        except Exception as error:  # the submitter receives it
            self.end(error)
            return
        if self.is_finished:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Report the end, once."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None and not self.aborted:
            on_end(error)
        self.aborted |= error is not None


class PackedPrefills:
    """A prefill batch without padding.

    Args:
        prefixes: The prefix cache.
        max_tokens: Limit for the new tokens of all prompts.
    """

    def __init__(self, prefixes: PrefixCache, max_tokens: int) -> None:
        self.prompts: list[PromptState] = []
        self._prefixes = prefixes
        self._max_tokens = max_tokens
        self._starts: set[tuple[int | bytes, ...]] = set()

    def must_wait(self, prompt: PromptState) -> bool:
        """Whether a prompt belongs into another batch, for example behind its prefix."""
        is_long = prompt.num_new_tokens > self._prefixes.min_tokens
        return bool(self._prefixes.limit) and is_long and self._start(prompt) in self._starts

    def has_room(self, prompt: PromptState) -> bool:
        """Whether the batch remains below the limit; one prompt always fits."""
        return not self.prompts or self._num_tokens([*self.prompts, prompt]) <= self._max_tokens

    def add(self, prompt: PromptState) -> None:
        """Add a prompt to the batch."""
        self.prompts.append(prompt)
        self._starts.add(self._start(prompt))

    def _start(self, prompt: PromptState) -> tuple[int | bytes, ...]:
        return prompt.key[: prompt.num_computed_tokens + self._prefixes.min_tokens]

    def _num_tokens(self, prompts: Sequence[PromptState]) -> int:
        return sum(prompt.num_new_tokens for prompt in prompts)


class PaddedPrefills(PackedPrefills):
    """A prefill batch of right-padded rows."""

    def must_wait(self, prompt: PromptState) -> bool:
        """Also a prompt whose numbers of cached and new tokens are not similar."""
        if not self.prompts:
            return False
        first, new = self.prompts[0], prompt.num_new_tokens
        return (
            prompt.num_computed_tokens != first.num_computed_tokens
            or abs(new - first.num_new_tokens) > max(8, new // 8)
            or super().must_wait(prompt)
        )

    def _num_tokens(self, prompts: Sequence[PromptState]) -> int:
        return len(prompts) * max(prompt.num_new_tokens for prompt in prompts)


def select_prefills(
    waiting: Sequence[Request],
    prefixes: PrefixCache,
    *,
    is_packed: bool,
    is_busy: bool,
    fits: Callable[[Sequence[Request]], bool],
) -> list[Request]:
    """The requests to be computed by the next prefill, the first waiting one among them.

    Answers to the same prompt are selected together.

    Args:
        is_packed: Whether the model runner takes prompts without padding.
        is_busy: Whether running requests wait meanwhile.
        fits: Whether these requests fit into rows and memory.
    """
    for request in waiting:
        request.prompt.look_up(prefixes)
    max_tokens = MAX_PREFILL_TOKENS_BUSY if is_busy else MAX_PREFILL_TOKENS_IDLE
    batch = (PackedPrefills if is_packed else PaddedPrefills)(prefixes, max_tokens)
    selected: list[Request] = []
    for request in waiting:
        prompt = request.prompt
        is_new = prompt not in batch.prompts
        if is_new and batch.must_wait(prompt):
            continue
        if not fits([*selected, request]) or (is_new and not batch.has_room(prompt)):
            break
        selected.append(request)
        if is_new:
            batch.add(prompt)
    return selected
