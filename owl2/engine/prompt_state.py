"""Prompts on their way through prefill, in chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from owl2.engine.prefix_cache import PrefixCache, PromptKey
from owl2.processing.prepared_prompt import PreparedPrompt


class PromptState:
    """A prompt and how much of it is computed; the n answers to a prompt share one.

    Args:
        ntk_alpha: `config.ntk_alpha` of its length.

    Attributes:
        prepared: The token ids and images.
        key: The token ids, with the digest of the image in place of image tokens. The first one
            contains `ntk_alpha` and the adapter, with which all keys and values change.
        image_keys: The keys of the images in the cache of their embeddings.
        num_computed_tokens: Tokens whose keys and values exist, or are in `prefix`.
        prefix: An entry of the prefix cache that has the first `num_computed_tokens` tokens:
            (2, h, P, d) for each layer. None after the prefix was copied.
        image_embeddings: (K+1, D) by index, of images whose tokens are computed next.
        arrival: The prompt's place in the order of arrival.
    """

    def __init__(self, prompt: PreparedPrompt, ntk_alpha: float = 1.0) -> None:
        self.prepared = prompt
        self.ntk_alpha = ntk_alpha
        self.prefix: Sequence[torch.Tensor] | None = None
        self.num_computed_tokens = 0
        self.image_embeddings: dict[int, torch.Tensor] = {}
        self.arrival: int | None = None
        key: list[int | bytes] = list(prompt.ids)
        for (start, end), digest in zip(prompt.image_spans, prompt.image_digests, strict=True):
            key[start:end] = [digest] * (end - start)
        if prompt.adapter is not None or ntk_alpha != 1:
            key[0] = repr((key[0], ntk_alpha, prompt.adapter)).encode()
        self.key: PromptKey = tuple(key)
        suffix = b"" if prompt.adapter is None else prompt.adapter.encode()
        self.image_keys = tuple(digest + suffix for digest in prompt.image_digests)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prepared.ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that are still to be computed."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def new_images(self) -> list[int]:
        """Indices of the images that have tokens among them."""
        spans = self.prepared.image_spans
        return [i for i, (_, end) in enumerate(spans) if end > self.num_computed_tokens]

    def look_up(self, cache: PrefixCache) -> None:
        """Start with the longest cached prefix that ends outside of an image."""
        self.prefix, shared = cache.find(self.key)
        self.num_computed_tokens = self.end_of_shared(shared)
        self.image_embeddings.clear()
        if not self.num_computed_tokens:
            self.prefix = None

    def end_of_shared(self, length: int) -> int:
        """The end of a prefix that can be taken from another prompt with `length` equal tokens.

        It is outside of an image, and at least one token remains.
        """
        length = min(length, self.num_tokens - 1)
        for start, end in self.prepared.image_spans:
            if start < length < end:
                return start
        return length


class PromptChunk(NamedTuple):
    """The part of a prompt that a step computes, from `prompt.num_computed_tokens` on.

    Attributes:
        end: The position after its last token.
        images: Indices of the images that it needs. The last one may begin at `end`: it is only
            encoded.
    """

    prompt: PromptState
    end: int
    images: Sequence[int] = ()

    @classmethod
    def rest_of(cls, prompt: PromptState) -> "PromptChunk":
        """All tokens that are still to be computed."""
        return cls(prompt, prompt.num_tokens, prompt.new_images)
