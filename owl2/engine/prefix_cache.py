"""Caches across requests: embeddings of images, and keys and values of prompts.

::

    pixels ──digest──► ImageFeatureCache: embeddings (K+1, D)
    token ids, with digests in place of image tokens ──longest common prefix──► PrefixCache

Both have a limit in bytes and evict the least recently used entry. All image tokens have the same
id, so the key of a prompt contains the digest of the image instead: the same text about another
image is another prompt.

Shapes: K+1 embeddings per image, D width, h key-value heads, P positions, d head width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import psutil
import torch
from torch import nn

from owl2.processing.prepared_prompt import PreparedPrompt

MIN_PREFIX_TOKENS = 32  # copying shorter prefixes costs as much as it saves
MAX_PREFIXES = 256  # every lookup compares with all of them

Key = tuple[int | bytes, ...]


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def weights_version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """A value that changes when a weight is replaced or modified in place.

    It covers what autograd tracks, such as optimizers and `load_state_dict`. It does not cover
    writes to ``weight.data``.
    """
    return tuple(
        # Inference tensors have no version counter, and most of them cannot be modified.
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in chain(model.parameters(), model.buffers())
    )


class ImageFeatureCache:
    """Embeddings of images by digest, (K+1, D) each.

    Args:
        limit: Maximum size in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def find(self, digest: bytes) -> torch.Tensor | None:
        """The embeddings of an image if they are cached."""
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def add(self, digest: bytes, embeddings: torch.Tensor) -> None:
        """Cache embeddings that nothing else modifies, unless they exceed the limit."""
        if embeddings.nbytes > self.limit or digest in self._entries:
            return
        self._entries[digest] = embeddings
        self.bytes += embeddings.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self.bytes = 0


@dataclass(eq=False, frozen=True)
class Prefix:
    """Keys and values of the tokens of `key`, from position 0: (h, P, d) for each layer."""

    key: Key
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensor in chain(self.keys, self.values))


class PrefixCache:
    """Keys and values of token sequences, found by their longest common prefix.

    Args:
        limit: Maximum size in bytes.
        min_tokens: Shorter prefixes are neither stored nor found.
    """

    def __init__(self, limit: int, min_tokens: int = MIN_PREFIX_TOKENS) -> None:
        self.limit = limit
        self.min_tokens = min_tokens
        self.bytes = 0
        self._entries: OrderedDict[Prefix, None] = OrderedDict()

    @property
    def cached_keys(self) -> list[Key]:
        """The keys of all entries, the least recently used first."""
        return [prefix.key for prefix in self._entries]

    def find(self, key: Key) -> tuple[Prefix | None, int]:
        """The entry with the longest common prefix, and its length; (None, 0) without one.

        At least one token of `key` remains to be computed.
        """
        best, longest = None, self.min_tokens - 1
        for prefix in self._candidates(key):
            shared = common_prefix_length(prefix.key, key)
            if shared > longest:
                best, longest = prefix, shared
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        shared = min(longest, len(key) - 1)
        return (best, shared) if shared >= self.min_tokens else (None, 0)

    def accepts(self, key: Key) -> bool:
        """Whether `add` would store it: it is long enough, and no entry starts with it."""
        if len(key) < self.min_tokens or not self.limit:
            return False
        longer = (old for old in self._candidates(key) if len(old.key) >= len(key))
        return all(old.key[: len(key)] != key for old in longer)

    def add(self, key: Key, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Store keys and values, (h, P, d) for each layer, that nothing else modifies."""
        new = Prefix(key, keys, values)
        if new.bytes > self.limit or not self.accepts(key):
            return
        # The next turn of a dialogue contains the earlier turns.
        for old in [old for old in self._candidates(key) if key[: len(old.key)] == old.key]:
            self._remove(old)
        self._entries[new] = None
        self.bytes += new.bytes
        while self.bytes > self.limit or len(self._entries) > MAX_PREFIXES:
            self._remove(next(iter(self._entries)))

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self.bytes = 0

    def _candidates(self, key: Key) -> list[Prefix]:
        """Entries that have the last of the first `min_tokens` tokens in common with `key`."""
        position = self.min_tokens - 1
        if len(key) <= position:
            return []
        return [prefix for prefix in self._entries if prefix.key[position] == key[position]]

    def _remove(self, prefix: Prefix) -> None:
        del self._entries[prefix]
        self.bytes -= prefix.bytes


def common_prefix_length(one: Key, other: Key) -> int:
    """How many tokens two sequences have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection: comparing slices is faster than comparing token by token
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PromptState:
    """A prompt on its way through prefill; the n answers to a prompt share one.

    Attributes:
        key: The token ids, with the digest of the image in place of image tokens.
        prefix: An entry of the prefix cache that has the first `num_computed_tokens` tokens.
    """

    def __init__(self, prompt: PreparedPrompt) -> None:
        self.prompt = prompt
        self.prefix: Prefix | None = None
        self.num_computed_tokens = 0
        key: list[int | bytes] = list(prompt.ids)
        for (start, end), digest in zip(prompt.image_spans, prompt.image_digests, strict=True):
            key[start:end] = [digest] * (end - start)
        self.key: Key = tuple(key)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that prefill computes."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def new_images(self) -> list[int]:
        """Indices of the images that prefill computes."""
        spans = self.prompt.image_spans
        return [i for i, (start, _) in enumerate(spans) if start >= self.num_computed_tokens]

    def look_up(self, cache: PrefixCache) -> None:
        """Find the longest cached prefix that ends outside of an image."""
        self.prefix, shared = cache.find(self.key)
        for start, end in self.prompt.image_spans:
            if start < shared < end:
                shared = start
        self.num_computed_tokens = shared
        if not shared:
            self.prefix = None
