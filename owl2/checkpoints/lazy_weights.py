"""Weights of a checkpoint that are read one by one, while transformers loads them.

Each process of a sharded training run reads only its share (`rank_share`). The other values of a
weight are never written, so that the system gives them no memory.
"""

import mmap
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn

from owl2.checkpoints.weight_files import read_tensors
from owl2.checkpoints.weight_names import released_name


class RankShare(NamedTuple):
    """The share of one process in sharded weights: rows `rank` · n to (`rank` + 1) · n of each,
    where n is the number of rows divided by `world_size`, rounded up, as in FSDP2."""

    rank: int
    world_size: int


# Of the model that is being loaded; None: complete weights.
loaded_share: ContextVar[RankShare | None] = ContextVar("loaded_share", default=None)


class WeightReader:
    """Reads single tensors of weight files. The files are memory-mapped, one at a time.

    Attributes:
        tensors: All tensors by name, on the meta device.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        self._lock = Lock()  # transformers reads in several threads
        for file in files:
            found = read_tensors(file)
            self.tensors |= found
            self._files |= dict.fromkeys(found, file)

    def stored_name(self, name: str) -> str | None:
        """The name in the files of the tensor with a released name; None if there is none."""
        return next((stored for stored in self.tensors if released_name(stored) == name), None)

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a view of the mapped file, which it keeps open."""
        file = self._files[name]
        with self._lock:
            if self._open[0] != file:
                self._open = (None, {})  # closes the other file first
                self._open = (file, read_tensors(file, "cpu"))
            return self._open[1][name]

    def read_copy(self, name: str) -> torch.Tensor:
        """A contiguous copy of the tensor, which does not keep the file open."""
        return self.read(name).clone(memory_format=torch.contiguous_format)

    def read_share(self, name: str, share: RankShare, dtype: torch.dtype) -> torch.Tensor:
        """The tensor with the values of one process, and zeros that take no memory elsewhere."""
        stored = self.read(name)
        size = max(1, stored.numel() * dtype.itemsize)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=dtype, count=stored.numel()).view(stored.shape)
        rows = -(-len(stored) // share.world_size)
        own = slice(share.rank * rows, (share.rank + 1) * rows)
        tensor[own].copy_(stored[own])
        return tensor


@dataclass
class LazyTensor:
    """A tensor that is read when it is indexed, as transformers does with safetensors' slices."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]


def rank_share(
    model: nn.Module, reader: WeightReader, share: RankShare, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint as one process of a sharded run needs them.

    Buffers and scalars are complete, because they are not sharded.

    Args:
        dtype: Of the loaded parameters.
    """
    parameters = {released_name(name) for name, _ in model.named_parameters()}
    weights = {}
    for name, tensor in reader.tensors.items():
        read = partial(reader.read_copy, name)
        if released_name(name) in parameters and tensor.dim() and tensor.is_floating_point():
            read = partial(reader.read_share, name, share, dtype)
        weights[name] = LazyTensor(read)
    return weights
