"""Requests, and the choice of the waiting ones whose prompts are computed next.

A prefill batch contains similar prompts. Padded rows need about equally many new tokens after
equally many cached ones; the CPU kernels take any lengths. Of prompts with a common uncached
prefix, one is computed first, and the others find its keys and values in the prefix cache.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList

from owl2.engine.logits_processors import logits_processors
from owl2.engine.prefix_cache import PrefixCache, PromptKey, PromptState
from owl2.engine.sampling import Logprobs, SamplingParams, non_finite_error
from owl2.engine.structured_output import GrammarMatcher
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration

# Positions of one prefill: without running requests, and with some that wait for their next token.
MAX_PREFILL_TOKENS_IDLE, MAX_PREFILL_TOKENS_BUSY = 4096, 512


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
        epoch: The batch's epoch when the prompt was computed.
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
        self.epoch = 0
        self.processors = LogitsProcessorList()
        self.matcher: GrammarMatcher | None = None
        self.on_token: Callable[[int, Logprobs | None], object] | None = None
        self.on_end: Callable[[BaseException | None], object] | None = None

    @property
    def num_cached(self) -> int:
        """Positions whose keys and values exist: all but that of the last token."""
        return self.prompt.num_tokens + len(self.token_ids) - 1

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
            self.params, model, self.prompt.prompt.ids, self.max_tokens, self.end_ids
        )

    def bind_processors(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What `sample` applies to the logits of the next token; None without processors."""
        if not self.processors:
            return None
        ids: Any = torch.tensor([[*self.prompt.prompt.ids, *self.token_ids]], device=self.device)
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
        is_packed: The model runner takes prompts of any lengths. Otherwise it pads them, and the
            selected ones have equally many cached tokens and similar numbers of new ones.
        is_busy: Whether running requests wait meanwhile.
        fits: Whether these requests fit into rows and memory.
    """
    max_tokens = MAX_PREFILL_TOKENS_BUSY if is_busy else MAX_PREFILL_TOKENS_IDLE
    selected: list[Request] = []
    prompts: list[PromptState] = []
    starts: set[PromptKey] = set()
    for request in waiting:
        prompt = request.prompt
        if is_new := prompt not in prompts:
            prompt.look_up(prefixes)
            start = prompt.key[: prompt.num_computed_tokens + prefixes.min_tokens]
            is_long = bool(prefixes.limit) and prompt.num_new_tokens > prefixes.min_tokens
            if (is_long and start in starts) or not (is_packed or _are_similar(prompt, prompts)):
                continue
        if not fits([*selected, request]):
            break
        if is_new:
            sizes = [one.num_new_tokens for one in (*prompts, prompt)]
            if prompts and (sum(sizes) if is_packed else len(sizes) * max(sizes)) > max_tokens:
                break
            prompts.append(prompt)
            starts.add(start)
        selected.append(request)
    return selected


def _are_similar(prompt: PromptState, prompts: Sequence[PromptState]) -> bool:
    """Whether a prompt can be padded to the others without much waste."""
    if not prompts:
        return True
    difference = abs(prompt.num_new_tokens - prompts[0].num_new_tokens)
    is_aligned = prompt.num_computed_tokens == prompts[0].num_computed_tokens
    return is_aligned and difference <= max(8, prompt.num_new_tokens // 8)
