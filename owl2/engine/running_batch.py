"""The running requests: prefill of their prompts, decoding, and caches for later prompts.

::

    images of chunks ──ImageEncoder──► embeddings (K+1, D)
    last tokens of answers, next chunks of prompts ──ModelRunner.forward──► rows of the KV cache
        logits (B, V) after answers and complete prompts ──sample──► tokens

Shapes: B requests or prompts, P tokens of a prompt, K+1 embeddings per image, D width, V
vocabulary, h key-value heads, d head width.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from owl2.engine.image_encoder import ImageEncoder
from owl2.engine.lora import LoraManager
from owl2.engine.model_runner import ModelRunner, NewTokens
from owl2.engine.next_token import next_token_logits
from owl2.engine.prefix_cache import PrefixCache, PromptKey, weights_version
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.engine.sampler import compute_logprobs
from owl2.engine.scheduler import Request, sample_tokens
from owl2.model.image_inputs import ntk_options
from owl2.model.modeling import Owl2ForConditionalGeneration


@dataclass
class EngineStats:
    """What an engine does, and what it has computed since it was created.

    Attributes:
        num_running, num_waiting: Requests.
        num_prefills: Prompts that were computed; answers to the same prompt share one.
        num_prefill_tokens: Tokens of these prompts that no cached prefix had.
        num_encoded_images: Images that passed through the vision encoder.
        num_decode_steps: Steps of one token for each running request with a complete prompt.
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

    The last row moves to where one becomes free, so that rows 0 to B-1 are always used. Requests
    with the same prompt share its computation: one of them has a row, the others get copies of it
    when the prompt is complete.

    Args:
        prefix_bytes, image_bytes: Limits of the caches; 0 disables one.
        adapters: Of the model; default: none.

    Attributes:
        epoch: Increases whenever the caches are cleared.
        stats: Counts of what was computed so far, without cache hits; `EngineCore.stats` adds the
            other values.
    """

    def __init__(
        self,
        model: Owl2ForConditionalGeneration,
        prefix_bytes: int,
        image_bytes: int,
        adapters: LoraManager | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters or LoraManager(model)
        self.prefixes = PrefixCache(prefix_bytes)
        self.image_encoder = ImageEncoder(model, self.adapters, image_bytes)
        self.epoch = 0
        self.stats = EngineStats()
        self._rows: list[Request] = []
        self._copies: dict[PromptState, list[Request]] = {}  # by prompts that are incomplete
        self._version: Any = None
        self._runner: ModelRunner | None = None

    @property
    def requests(self) -> list[Request]:
        """All requests, with those that wait for the prompt of another."""
        copies = list(self._copies.values())  # other threads read `EngineCore.stats`
        return [*self._rows, *chain.from_iterable(copies)]

    @property
    def num_decoding(self) -> int:
        """Requests that get a token from each step."""
        return sum(not request.is_prefilling for request in self._rows)

    @property
    def runner(self) -> ModelRunner:
        """A new one if the model was moved or cast since the last request."""
        if self._runner is None or (not self._rows and self._runner.is_stale):
            self._runner = ModelRunner(self.model, self.adapters)
        return self._runner

    def add(self, requests: Sequence[Request]) -> None:
        """Start requests: `step` computes their prompts."""
        cache = self.runner.cache
        for request in requests:
            request.epoch = self.epoch
            request.is_prefilling = True
            request.create_processors(self.model)
            if (copies := self._copies.get(request.prompt)) is not None:
                copies.append(request)
                continue
            self._copies[request.prompt] = []
            self._rows.append(request)
            cache.reserve(len(self._rows), request.prompt.num_tokens)
            self._write_prefix(request.prompt, len(self._rows) - 1, self.runner)

    def step(self, chunks: Sequence[PromptChunk] = ()) -> None:
        """Compute chunks of prompts, and a token for every request with a complete prompt."""
        numbered = list(enumerate(self._rows))
        decoding = [(row, request) for row, request in numbered if not request.is_prefilling]
        rows = {request.prompt: row for row, request in numbered if request.is_prefilling}
        self.stats.num_decode_steps += bool(decoding)
        tokens = [
            NewTokens(
                row,
                request.num_cached,
                request.token_ids[-1:],
                ntk_alpha=request.prompt.ntk_alpha,
                adapter=request.prompt.prepared.adapter,
            )
            for row, request in decoding
        ]
        chunk_rows = [rows[chunk.prompt] for chunk in chunks]
        logits = self._compute(chunks, chunk_rows, self.runner, tokens)
        requests = [request for _, request in decoding]
        indices = list(range(len(requests)))  # of the logits
        complete = [chunk.prompt for chunk in chunks if not chunk.prompt.num_new_tokens]
        for index, prompt in enumerate(complete, len(requests)):
            row = rows[prompt]
            copies = [request for request in self._copies.pop(prompt) if not request.aborted]
            new = [self._rows[row], *copies]
            if new[0].epoch == self.epoch:
                self._store_prefix(prompt.key, row, self.runner)
            self.runner.cache.reserve(len(self._rows) + len(copies), prompt.num_tokens)
            for copy in copies:
                self.runner.cache.copy_row(row, len(self._rows), prompt.num_tokens)
                self._rows.append(copy)
            for request in new:
                request.is_prefilling = False
            requests += new
            indices += [index] * len(new)
        if requests:
            self._sample(requests, logits if len(indices) == len(logits) else logits[indices])

    def remove_finished(self) -> None:
        """Free the rows of requests that are finished or aborted."""
        cache = self.runner.cache
        for row in reversed(range(len(self._rows))):
            request = self._rows[row]
            if not (request.aborted or request.is_finished):
                continue
            if request.is_prefilling:
                copies = self._copies.pop(request.prompt)
                if remaining := [copy for copy in copies if not copy.aborted]:
                    self._rows[row], self._copies[request.prompt] = remaining[0], remaining[1:]
                    remaining[0].epoch = request.epoch
                    continue
            if request.epoch == self.epoch and (request.is_prefilling or request.token_ids):
                # The same prompt may be sent again, and the next turn of the conversation starts
                # with this prompt and answer.
                key = (*request.prompt.key, *request.token_ids[:-1])
                self._store_prefix(key[: request.num_cached], row, self.runner)
            last = self._rows.pop()
            if last is not request:
                cache.copy_row(len(self._rows), row, last.num_cached)
                self._rows[row] = last

    def store_prefix(self, prompt: PromptState, length: int) -> None:
        """Cache the first tokens of an incomplete prompt."""
        for row, request in enumerate(self._rows):
            if request.prompt is prompt and request.is_prefilling and request.epoch == self.epoch:
                self._store_prefix(prompt.key[:length], row, self.runner)

    def prefill(self, prompts: Sequence[PromptState], first_row: int = 0) -> torch.Tensor:
        """Compute prompts completely into the rows from `first_row` on, for measurements.

        Returns:
            (B, V) logits after the last token of each.
        """
        for row, prompt in enumerate(prompts, first_row):
            self.runner.cache.reserve(row + 1, prompt.num_tokens)
            self._write_prefix(prompt, row, self.runner)
        chunks = list(map(PromptChunk.rest_of, prompts))
        rows = range(first_row, first_row + len(prompts))
        return self._compute(chunks, rows, self.runner)

    def prefill_alone(
        self, prompt: PromptState, next_chunk: Callable[[PromptState], PromptChunk]
    ) -> Generator[None, None, PrefillOutput]:
        """Compute one prompt outside of the batch, whose rows would all grow to its length.

        Yields:
            After every chunk but the last.
        """
        runner = ModelRunner(self.model, self.adapters)
        epoch = self.epoch
        prompt.look_up(self.prefixes)
        runner.cache.reserve(1, prompt.num_tokens)
        self._write_prefix(prompt, 0, runner)
        logits = self._compute([next_chunk(prompt)], [0], runner)
        while prompt.num_new_tokens:
            yield
            logits = self._compute([next_chunk(prompt)], [0], runner)
        if epoch == self.epoch:
            self._store_prefix(prompt.key, 0, runner)
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(runner.cache.read(0, prompt.num_tokens)):
            cache.update(keys[None], values[None], layer)
        return PrefillOutput(logits, cache, prompt.ntk_alpha)

    def next_token_logits(self, prompts: Sequence[PromptState]) -> torch.Tensor:
        """(B, V) float32 logits after the last token of each prompt; nothing is generated.

        The prefix cache is neither read nor extended. All prompts have the same adapter.
        """
        self.image_encoder.encode(list(map(PromptChunk.rest_of, prompts)))
        embeddings = [prompt.image_embeddings for prompt in prompts]
        images = [by_index[index] for by_index in embeddings for index in sorted(by_index)]
        self.stats.num_prefills += len(prompts)
        self.stats.num_prefill_tokens += sum(prompt.num_tokens for prompt in prompts)
        stacked = torch.stack(images) if images else None  # (N, K+1, D)
        with self.adapters.use(prompts[0].prepared.adapter):
            return next_token_logits(self.model, prompts, stacked)

    def clear(self) -> None:
        """Clear the caches."""
        self.prefixes.clear()
        self.image_encoder.cache.clear()
        self.epoch += 1

    def clear_if_weights_changed(self) -> None:
        """Clear the caches if the weights are not those of the last call."""
        if not (self.prefixes.limit or self.image_encoder.cache.limit):
            return
        if (version := weights_version(self.model)) != self._version:
            self.clear()
            self._version = version

    def reset(self) -> list[Request]:
        """Remove and return all requests, and free all memory: a lack of it may be the error."""
        requests = self.requests
        self._rows, self._copies = [], {}
        self._runner = None
        self.clear()
        return requests

    def _sample(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        """Choose and report the next token of each request. `logits` (B, V) may be modified."""
        image_token_id = self.model.config.image_token_id
        if image_token_id < logits.shape[1]:  # in a resized vocabulary
            logits[:, image_token_id] = float("-inf")
        tokens = sample_tokens(requests, logits)
        logprobs = compute_logprobs(logits, tokens, [request.params for request in requests])
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

    @staticmethod
    def _write_prefix(prompt: PromptState, row: int, runner: ModelRunner) -> None:
        """Copy the cached prefix of a prompt to its row."""
        if prompt.prefix is not None:
            stop = prompt.num_computed_tokens
            runner.cache.write(row, [layer[:, :, :stop] for layer in prompt.prefix])
            prompt.prefix = None  # the cache may evict it

    def _compute(
        self,
        chunks: Sequence[PromptChunk],
        rows: Sequence[int],
        runner: ModelRunner,
        decoding: Sequence[NewTokens] = (),
    ) -> torch.Tensor:
        """Compute chunks of prompts into rows of a runner, together with other tokens.

        Returns:
            (B, V) logits after the tokens of `decoding`, and of the prompts that are complete.
        """
        self.image_encoder.encode(chunks)
        tokens = [*decoding]
        for (prompt, end, images), row in zip(chunks, rows, strict=True):
            start, is_last = prompt.num_computed_tokens, end == prompt.num_tokens
            parts = []
            for index in images:
                first = prompt.prepared.image_spans[index][0]
                if first < end:  # otherwise it is only encoded
                    chunk = slice(max(start - first, 0), end - first)
                    parts.append(prompt.image_embeddings[index][chunk])
            embeddings = torch.cat(parts) if parts else None  # (V, D)
            if end > start:
                ids = prompt.prepared.ids[start:end]
                options = prompt.ntk_alpha, is_last, prompt.prepared.adapter
                tokens.append(NewTokens(row, start, ids, embeddings, *options))
        logits = runner.forward(tokens) if tokens else torch.empty(0)
        for prompt, end, _ in chunks:
            self.stats.num_prefills += end == prompt.num_tokens
            self.stats.num_prefill_tokens += end - prompt.num_computed_tokens
            prompt.num_computed_tokens = end
            for index in prompt.image_embeddings.keys() - prompt.new_images:
                del prompt.image_embeddings[index]
        return logits
