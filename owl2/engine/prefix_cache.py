"""Caches across requests: embeddings of images, and keys and values of prompts.

::

    pixels ──digest──► TensorCache: embeddings (K+1, D)
    token ids, with digests in place of image tokens ──longest common prefix──► PrefixCache

Both have a limit in bytes and evict the least recently used entry. All image tokens have the same
id, so the key of a prompt contains the digest of the image instead: the same text about another
image is another prompt. The keys also contain the adapter, so that adapters share nothing.

Shapes: K+1 embeddings per image, D width, h key-value heads, P positions, d head width.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import partial
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import nn

MIN_PREFIX_TOKENS = 32  # copying shorter prefixes costs as much as it saves
MAX_PREFIXES = 256  # a lookup compares with all that start equally

PromptKey = tuple[int | bytes, ...]
K = TypeVar("K", bound=Hashable)


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


class TensorCache(Generic[K]):
    """Tensors by key; the least recently used entry is evicted.

    Args:
        limit: Maximum size in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[K, Sequence[torch.Tensor]] = OrderedDict()

    @property
    def cached_keys(self) -> list[K]:
        """The keys of all entries, the least recently used first."""
        return list(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> Sequence[torch.Tensor] | None:
        """The tensors of a key if they are cached."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def add(self, key: K, tensors: Sequence[torch.Tensor]) -> None:
        """Cache tensors that nothing else modifies, unless they exceed the limit."""
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self.limit or key in self._entries:
            return
        self._entries[key] = tensors
        self.bytes += size
        while self.bytes > self.limit:
            self._remove(next(iter(self._entries)))

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self.bytes = 0

    def _remove(self, key: K) -> None:
        self.bytes -= sum(tensor.nbytes for tensor in self._entries.pop(key))


class PrefixCache(TensorCache[PromptKey]):
    """Keys and values of token sequences, (2, h, P, d) for each layer, from position 0.

    Args:
        limit: Maximum size in bytes.
        min_tokens: Shorter prefixes are neither stored nor found.
    """

    def __init__(self, limit: int, min_tokens: int = MIN_PREFIX_TOKENS) -> None:
        super().__init__(limit)
        self.min_tokens = min_tokens
        self._by_start: dict[PromptKey, list[PromptKey]] = {}  # entries with the same first tokens

    def find(self, key: PromptKey) -> tuple[Sequence[torch.Tensor] | None, int]:
        """The entry with the longest common prefix, and its length; (None, 0) without one.

        At least one token of `key` remains to be computed.
        """
        candidates = self._candidates(key)
        best = max(candidates, key=partial(common_prefix_length, key), default=())
        shared = min(common_prefix_length(key, best), len(key) - 1)
        return (self.get(best), shared) if shared >= self.min_tokens else (None, 0)

    def accepts(self, key: PromptKey) -> bool:
        """Whether `add` would store it: it is long enough, and no entry starts with it."""
        is_long = bool(self.limit) and len(key) >= self.min_tokens
        return is_long and all(old[: len(key)] != key for old in self._candidates(key))

    def add(self, key: PromptKey, tensors: Sequence[torch.Tensor]) -> None:
        """Store keys and values that nothing else modifies."""
        if not self.accepts(key) or sum(tensor.nbytes for tensor in tensors) > self.limit:
            return
        # The next turn of a conversation contains the earlier turns.
        for old in self._candidates(key):
            if key[: len(old)] == old:
                self._remove(old)
        self._by_start.setdefault(key[: self.min_tokens], []).append(key)
        super().add(key, tensors)
        if len(self._entries) > MAX_PREFIXES:
            self._remove(next(iter(self._entries)))

    def clear(self) -> None:
        """Remove all entries."""
        super().clear()
        self._by_start.clear()

    def _candidates(self, key: PromptKey) -> Sequence[PromptKey]:
        """Entries that have the first `min_tokens` tokens in common with `key`."""
        return tuple(self._by_start.get(key[: self.min_tokens], ()))

    def _remove(self, key: PromptKey) -> None:
        super()._remove(key)
        alike = self._by_start[key[: self.min_tokens]]
        alike.remove(key)
        if not alike:
            del self._by_start[key[: self.min_tokens]]


def common_prefix_length(first: PromptKey, second: PromptKey) -> int:
    """How many tokens two sequences have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection: comparing slices is faster than comparing token by token
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
