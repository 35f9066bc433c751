"""Prefill: prompts to keys and values in rows of the cache, and the logits after them.

::

    PromptState ──look_up──► cached prefix, new tokens and images
    new images ──vision encoder, abstractor──► embeddings (N, K+1, D)
    new tokens ──ModelRunner.prefill──► rows of the cache, logits (B, V)

Shapes: B prompts, P tokens of a prompt, N images, K+1 embeddings per image, D width, V vocabulary,
h key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from owl2.engine.model_runner import ModelRunner
from owl2.engine.prefix_cache import (
    ImageFeatureCache,
    PrefixCache,
    PromptState,
    weights_version,
)
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.prepared_prompt import PreparedPrompt

ENCODER_BATCH_SIZE = 32  # images


class PrefillOutput(NamedTuple):
    """The result for one prompt of P tokens.

    Attributes:
        logits: (1, V) after the last token.
        cache: (1, h, P, d) for each layer.
    """

    logits: torch.Tensor
    cache: DynamicCache


@torch.no_grad()
def prefill_uncached(model: Owl2ForConditionalGeneration, prompt: PreparedPrompt) -> PrefillOutput:
    """One prompt through the model's own forward, without an engine."""
    cache = DynamicCache(config=model.config)
    images: dict[str, Any] = {}
    if prompt.pixel_values is not None:
        images["pixel_values"] = prompt.pixel_values.to(model.device, model.dtype)
    ids = torch.tensor([prompt.ids], device=model.device)  # (1, P)
    outputs = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **images
    )
    return PrefillOutput(outputs.logits[:, -1], cache)


class Prefiller:
    """Computes prompts with a model, and caches what later prompts can use.

    Attributes:
        epoch: Increases whenever the caches are cleared.
        num_prompts, num_tokens, num_images: What was computed so far, without cache hits.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, prefix_bytes: int, feature_bytes: int
    ) -> None:
        self.model = model
        self.prefixes = PrefixCache(prefix_bytes)
        self.features = ImageFeatureCache(feature_bytes)
        self.epoch = 0
        self.num_prompts = self.num_tokens = self.num_images = 0
        self._version: Any = None
        self._runner: ModelRunner | None = None

    def prefill(
        self, prompts: Sequence[PromptState], runner: ModelRunner, first_row: int
    ) -> torch.Tensor:
        """Compute prompts together, after their cached prefixes, and cache them.

        Their keys and values go to the runner's rows from `first_row` on.

        Returns:
            (B, V) logits after the last token of each.
        """
        logits = runner.prefill(prompts, self._embed_images(prompts), first_row)
        self.num_prompts += len(prompts)
        for row, prompt in enumerate(prompts, first_row):
            self.num_tokens += prompt.num_new_tokens
            if self.prefixes.accepts(prompt.key):
                self.prefixes.add(prompt.key, *runner.cache.read(row, prompt.num_tokens))
            prompt.prefix = None  # the cache may evict it
        return logits

    def prefill_alone(self, prompt: PromptState) -> PrefillOutput:
        """Compute one prompt outside of the running batch."""
        if self._runner is None or self._runner.is_stale:
            self._runner = ModelRunner(self.model)
        prompt.look_up(self.prefixes)
        logits = self.prefill([prompt], self._runner, 0)
        cache = DynamicCache(config=self.model.config)
        layers = zip(*self._runner.cache.read(0, prompt.num_tokens), strict=True)
        for layer, (keys, values) in enumerate(layers):
            cache.update(keys[None], values[None], layer)
        return PrefillOutput(logits, cache)

    def clear(self) -> None:
        """Clear the caches."""
        self.prefixes.clear()
        self.features.clear()
        self._runner = None
        self.epoch += 1

    def clear_if_weights_changed(self) -> None:
        """Clear the caches if the weights are not those of the last call."""
        if not (self.prefixes.limit or self.features.limit):
            return
        if (version := weights_version(self.model)) != self._version:
            self.clear()
            self._version = version

    @torch.no_grad()
    def _embed_images(self, prompts: Sequence[PromptState]) -> torch.Tensor | None:
        """(N, K+1, D) of the new images of all prompts; equal images are encoded once."""
        digests: list[bytes] = []
        embeddings: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, torch.Tensor] = {}
        for state in prompts:
            prompt = state.prompt
            for index in state.new_images:
                digest = prompt.image_digests[index]
                digests.append(digest)
                if (cached := self.features.find(digest)) is not None:
                    embeddings[digest] = cached
                elif prompt.pixel_values is not None:
                    missing[digest] = prompt.pixel_values[index]
        for start in range(0, len(missing), ENCODER_BATCH_SIZE):
            batch = list(missing)[start : start + ENCODER_BATCH_SIZE]
            pixels = torch.stack([missing[digest] for digest in batch])
            pixels = pixels.to(self.model.device, self.model.dtype)
            encoded: Any = self.model.get_image_features(pixels).pooler_output
            self.num_images += len(batch)
            for digest, own in zip(batch, encoded, strict=True):
                embeddings[digest] = own
                if self.features.limit:
                    self.features.add(digest, own.clone())
        return torch.stack([embeddings[digest] for digest in digests]) if digests else None
