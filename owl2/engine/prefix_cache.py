"""What is kept from earlier requests: images' embeddings, and the keys and values of prompts.

::

    an image's pixels ──digest──► Features: its embeddings (K+1, D)
    a prompt's tokens, images as their digests ──longest common start──► Prefixes: keys and values

Both are bounded by bytes; what was used least recently goes first. All image tokens have the same
id, so in the key of a prompt each stands as its image's digest: the same words about another
image are another prompt.

Shapes: K+1 embeddings an image, D width, h key-value heads, P positions, d head width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import psutil
import torch
from torch import nn

SHORTEST = 32  # positions: what fewer would save is not worth the copying
MOST = 256  # prefixes: all are looked through for every prompt

Key = tuple[int | bytes, ...]


def digest(pixels: torch.Tensor) -> bytes:
    """What tells an image (3, H, W) on the CPU from every other; a millisecond a megabyte."""
    data = pixels.detach().contiguous().view(torch.uint8).flatten().numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the model is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def weights_mark(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced, or changed in place by anything that autograd sees.

    That is what optimizers and `load_state_dict` do. Writing to ``weight.data`` goes unseen.
    """
    return tuple(
        # Tensors made in inference mode count no changes, and refuse most.
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in chain(model.parameters(), model.buffers())
    )


class Features:
    """Embeddings of images by their digest, (K+1, D) each.

    Args:
        limit: bytes that all may have together; the one asked for last is kept in any case.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def find(self, image: bytes) -> torch.Tensor | None:
        """An image's embeddings if they are kept."""
        if image in self._kept:
            self._kept.move_to_end(image)
        return self._kept.get(image)

    def add(self, image: bytes, embeddings: torch.Tensor) -> None:
        """Keep an image's embeddings, a tensor of their own, if they fit at all."""
        size = embeddings.nbytes
        if size > self.limit or image in self._kept:
            return
        self._kept[image] = embeddings
        self.bytes += size
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0


@dataclass(eq=False, frozen=True)
class Prefix:
    """Keys and values of the tokens of `key`, from position 0 on: (h, P, d) a layer."""

    key: Key
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in chain(self.keys, self.values))


class Prefixes:
    """Keys and values of token sequences, to be found by what they begin with.

    Args:
        limit: bytes that all may have together.

    Attributes:
        shortest: shorter ones are neither kept nor found.
    """

    def __init__(self, limit: int, shortest: int = SHORTEST) -> None:
        self.limit = limit
        self.shortest = shortest
        self.bytes = 0
        self._kept: OrderedDict[Prefix, None] = OrderedDict()

    def find(self, key: Key) -> tuple[Prefix | None, int]:
        """Who shares the longest start with `key`, and how many tokens that is; (None, 0): nobody.

        One token at least is left to compute.
        """
        best, most = None, self.shortest - 1
        for prefix in self._alike(key):
            shared = common(prefix.key, key)
            if shared > most:
                best, most = prefix, shared
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        shared = min(most, len(key) - 1)
        return (best, shared) if shared >= self.shortest else (None, 0)

    def wants(self, key: Key) -> bool:
        """Whether `add` would keep it: it is long enough, and no other begins with it."""
        if len(key) < self.shortest or not self.limit:
            return False
        covering = (old for old in self._alike(key) if len(old.key) >= len(key))
        return all(old.key[: len(key)] != key for old in covering)

    def add(self, key: Key, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Keep keys and values, (h, P, d) a layer, which must be nobody else's to change."""
        new = Prefix(key, keys, values)
        if new.bytes > self.limit or not self.wants(key):
            return
        # A dialogue grows: what it was before is a part of what it is now.
        for old in [old for old in self._alike(key) if key[: len(old.key)] == old.key]:
            self._drop(old)
        self._kept[new] = None
        self.bytes += new.bytes
        while self.bytes > self.limit or len(self._kept) > MOST:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0

    def _alike(self, key: Key) -> list[Prefix]:
        """Those that may share `shortest` tokens or more: they have the last of them in common."""
        place = self.shortest - 1
        if len(key) <= place:
            return []
        return [prefix for prefix in self._kept if prefix.key[place] == key[place]]

    def _drop(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self.bytes -= prefix.bytes


def common(one: Key, other: Key) -> int:
    """How many tokens two sequences have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves are compared as slices: by C, not token by token
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
