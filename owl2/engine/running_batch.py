"""The running requests: prefill of their prompts, decode steps, and caches for later prompts.

::

    PromptState ──look_up──► cached prefix, new tokens and images
    new images ──vision encoder, abstractor──► embeddings (N, K+1, D)
    new tokens ──ModelRunner.prefill──► rows of the KV cache, logits (B, V) ──sample──► tokens
    last tokens ──ModelRunner.decode──► logits (B, V) ──sample──► tokens

Shapes: B requests or prompts, P tokens of a prompt, N images, K+1 embeddings per image, D width, V
vocabulary, h key-value heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from owl2.engine.model_runner import ModelRunner
from owl2.engine.next_token import next_token_logits
from owl2.engine.prefix_cache import (
    PrefixCache,
    PromptKey,
    PromptState,
    TensorCache,
    weights_version,
)
from owl2.engine.sampling import compute_logprobs, sample
from owl2.engine.scheduler import Request
from owl2.model.image_inputs import ntk_options
from owl2.model.modeling import Owl2ForConditionalGeneration

ENCODER_BATCH_SIZE = 32  # images


@dataclass
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

    num_running: int = 0
    num_waiting: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_encoded_images: int = 0
    num_decode_steps: int = 0
    prefix_cache_keys: Sequence[PromptKey] = ()
    prefix_cache_bytes: int = 0
    image_cache_bytes: int = 0


class PrefillOutput(NamedTuple):
    """The result for one prompt of P tokens.

    Attributes:
        logits: (1, V) after the last token.
        cache: (1, h, P, d) for each layer.
        ntk_alpha: See `Owl2Config.ntk_alpha`.
    """

    logits: torch.Tensor
    cache: DynamicCache
    ntk_alpha: float = 1.0

    def options(self, model: Owl2ForConditionalGeneration, rows: int = 1) -> dict[str, Any]:
        """Arguments of the model for tokens after the prompt, in several rows."""
        alphas = ntk_options(model.config, [self.ntk_alpha] * rows, self.logits.device)
        return {"use_cache": True, **alphas}


class RunningBatch:
    """The running requests, each in the row of the KV cache with its index.

    The last row moves to where one becomes free, so that rows 0 to B-1 are always used.

    Args:
        prefix_bytes, image_bytes: Limits of the caches; 0 disables one.

    Attributes:
        epoch: Increases whenever the caches are cleared.
        stats: Counts of what was computed so far, without cache hits.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, prefix_bytes: int, image_bytes: int
    ) -> None:
        self.model = model
        self.requests: list[Request] = []
        self.prefixes = PrefixCache(prefix_bytes)
        self.images: TensorCache[bytes] = TensorCache(image_bytes)
        self.epoch = 0
        self.stats = EngineStats()
        self._version: Any = None
        self._runner: ModelRunner | None = None

    @property
    def runner(self) -> ModelRunner:
        """A new one if the model was moved or cast since the last request."""
        if self._runner is None or (self._runner.is_stale and not self.requests):
            self._runner = ModelRunner(self.model)
        return self._runner

    def add(self, requests: Sequence[Request]) -> None:
        """Compute the prompts of requests and their first tokens.

        Requests with the same prompt share its computation.
        """
        first, cache = len(self.requests), self.runner.cache
        originals: dict[PromptState, Request] = {}
        for request in requests:
            originals.setdefault(request.prompt, request)
            request.epoch = self.epoch
            request.create_processors(self.model)
        prompts = list(originals)
        cache.reserve(first + len(requests), max(prompt.num_tokens for prompt in prompts))
        logits = self.prefill(prompts, first)
        copies = [one for one in requests if one is not originals[one.prompt]]
        for row, request in enumerate(copies, first + len(prompts)):
            source = first + prompts.index(request.prompt)
            cache.copy_row(source, row, request.prompt.num_tokens)
        new = [*originals.values(), *copies]
        self.requests += new
        self._sample(new, logits[[prompts.index(request.prompt) for request in new]])

    def step(self) -> None:
        """Decode one token for every request."""
        self.stats.num_decode_steps += 1
        tokens = torch.tensor([request.token_ids[-1] for request in self.requests])
        positions = torch.tensor([request.num_cached for request in self.requests])
        alphas = [request.prompt.ntk_alpha for request in self.requests]
        tokens = tokens.to(self.model.device)
        logits = self.runner.decode(tokens, positions, alphas)  # (B, V)
        self._sample(self.requests, logits)

    def remove_finished(self) -> None:
        """Free the rows of requests that are finished or aborted."""
        cache = self.runner.cache
        for row in reversed(range(len(self.requests))):
            request = self.requests[row]
            if not (request.aborted or request.is_finished):
                continue
            # The next turn of the conversation starts with this prompt and answer.
            if request.token_ids and request.epoch == self.epoch:
                key = (*request.prompt.key, *request.token_ids[:-1])
                self._store_prefix(key, row, self.runner)
            last = self.requests.pop()
            if last is not request:
                cache.copy_row(len(self.requests), row, last.num_cached)
                self.requests[row] = last

    def prefill(
        self, prompts: Sequence[PromptState], first_row: int, runner: ModelRunner | None = None
    ) -> torch.Tensor:
        """Compute prompts together, after their cached prefixes, and cache them.

        Their keys and values go to the rows from `first_row` on, of another runner if one is given.

        Returns:
            (B, V) logits after the last token of each.
        """
        runner = runner or self.runner
        logits = runner.prefill(prompts, self._embed_images(prompts), first_row)
        self.stats.num_prefills += len(prompts)
        for row, prompt in enumerate(prompts, first_row):
            self.stats.num_prefill_tokens += prompt.num_new_tokens
            self._store_prefix(prompt.key, row, runner)
            prompt.prefix = None  # the cache may evict it
        return logits

    def prefill_alone(self, prompt: PromptState) -> PrefillOutput:
        """Compute one prompt outside of the batch, whose rows would all grow to its length."""
        runner = ModelRunner(self.model)
        prompt.look_up(self.prefixes)
        logits = self.prefill([prompt], 0, runner)
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(runner.cache.read(0, prompt.num_tokens)):
            cache.update(keys[None], values[None], layer)
        return PrefillOutput(logits, cache, prompt.ntk_alpha)

    def next_token_logits(self, prompts: Sequence[PromptState]) -> torch.Tensor:
        """(B, V) float32 logits after the last token of each prompt, which nothing is added to.

        The prefix cache is neither read nor extended.
        """
        images = self._embed_images(prompts)
        self.stats.num_prefills += len(prompts)
        self.stats.num_prefill_tokens += sum(prompt.num_tokens for prompt in prompts)
        return next_token_logits(self.model, prompts, images)

    def clear(self) -> None:
        """Clear the caches."""
        self.prefixes.clear()
        self.images.clear()
        self.epoch += 1

    def clear_if_weights_changed(self) -> None:
        """Clear the caches if the weights are not those of the last call."""
        if not (self.prefixes.limit or self.images.limit):
            return
        if (version := weights_version(self.model)) != self._version:
            self.clear()
            self._version = version

    def reset(self) -> list[Request]:
        """Remove and return all requests, and free all memory: a lack of it may be the error."""
        requests, self.requests = self.requests, []
        self._runner = None
        self.clear()
        return requests

    def _sample(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        """Choose and report the next token of each request. `logits` (B, V) may be modified."""
        image_token_id = self.model.config.image_token_id
        if image_token_id < logits.shape[1]:  # in a resized vocabulary
            logits[:, image_token_id] = float("-inf")
        params = [request.params for request in requests]
        generators = [request.generator for request in requests]
        processors = [request.bind_processors() for request in requests]
        masks = [request.allowed_tokens(logits.shape[1]) for request in requests]
        tokens = sample(logits, params, generators, processors, masks)
        logprobs = compute_logprobs(logits, tokens, params)
        for request, token, own in zip(requests, tokens, logprobs, strict=True):
            if token is None:
                error = request.no_token_error(logits.dtype)
                request.token_ids.clear()  # its keys and values must not be cached
                request.end(error)
            else:
                request.add_token(token, own)
        self.remove_finished()

    def _store_prefix(self, key: PromptKey, row: int, runner: ModelRunner) -> None:
        if self.prefixes.accepts(key):
            self.prefixes.add(key, runner.cache.read(row, len(key)))

    @torch.no_grad()
    def _embed_images(self, prompts: Sequence[PromptState]) -> torch.Tensor | None:
        """(N, K+1, D) of the new images of all prompts; equal images are encoded once."""
        new = [(state.prompt, index) for state in prompts for index in state.new_images]
        digests = [prompt.image_digests[index] for prompt, index in new]
        if not new:
            return None
        embeddings: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for digest, (prompt, index) in zip(digests, new, strict=True):
            if (cached := self.images.get(digest)) is not None:
                embeddings[digest] = cached[0]
            else:
                missing[digest] = prompt.crops_of(index)
        # Crops of one image are not split.
        most = max((len(pixels) for pixels, _ in missing.values()), default=1)
        size = max(1, ENCODER_BATCH_SIZE // most)
        for start in range(0, len(missing), size):
            batch = list(missing)[start : start + size]
            pixels = torch.cat([missing[digest][0] for digest in batch])
            pixels = pixels.to(self.model.device, self.model.dtype)
            grids = [grid for digest in batch if (grid := missing[digest][1]) is not None]
            described = torch.cat(grids) if grids else None
            encoded: Any = self.model.get_image_features(pixels, described).pooler_output
            self.stats.num_encoded_images += len(batch)
            for digest, own in zip(batch, encoded, strict=True):
                embeddings[digest] = own
                if self.images.limit:
                    self.images.add(digest, [own.clone()])
        return torch.stack([embeddings[digest] for digest in digests])
