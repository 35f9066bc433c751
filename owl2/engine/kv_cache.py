"""The key-value cache of the sequences that are being decoded.

Shapes: R rows (one sequence each), C capacity in positions, h key-value heads, d head width, S new
positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

MIN_CAPACITY = 256  # positions


class StaticKVCache:
    """One row for each sequence, filled up to a length of its own.

    The caller tracks the lengths. Positions beyond them are never read.

    Attributes:
        keys, values: (R, h, C, d) for each layer.
    """

    def __init__(
        self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = self.capacity = 0
        shape = (0, heads, 0, width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row, over all layers."""
        heads, width = self.keys[0].shape[1], self.keys[0].shape[3]
        return 2 * len(self.keys) * heads * width * self.keys[0].element_size()

    def reserve(self, rows: int, capacity: int) -> None:
        """Grow to at least this many rows and positions; the content is kept.

        The size doubles, so that a growing dialogue is rarely copied.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        rows = self.rows if rows <= self.rows else max(rows, 2 * self.rows)
        if capacity > self.capacity:
            self.capacity = max(MIN_CAPACITY, 1 << (capacity - 1).bit_length())
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(rows, old.shape[1], self.capacity, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new
        self.rows = rows

    def write(self, row: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Write (h, S, d) for each layer to the start of a row."""
        for own, new in ((self.keys, keys), (self.values, values)):
            for tensor, part in zip(own, new, strict=True):
                tensor[row, :, : part.shape[1]] = part

    def read(self, row: int, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copies of the first `length` positions of a row: (h, length, d) for each layer."""
        return (
            [tensor[row, :, :length].clone() for tensor in self.keys],
            [tensor[row, :, :length].clone() for tensor in self.values],
        )

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def view(self, first: int, positions: torch.Tensor, length: int) -> Cache:
        """The rows from `first` on as a cache for the model's forward.

        Args:
            positions: (B, S), where the forward writes in each of B rows.
            length: Positions that the queries see, the new ones included.
        """
        rows = slice(first, first + len(positions))
        return Cache(
            layers=[
                _RowsLayer(keys[rows], values[rows], positions, length)
                for keys, values in zip(self.keys, self.values, strict=True)
            ]
        )


class _RowsLayer(DynamicLayer):
    """Rows of one layer of a `StaticKVCache`, written in place."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, length: int
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._rows = keys, values
        self._positions = positions
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, h, S, d) each; returns the rows (B, h, length, d)."""
        rows = torch.arange(len(self._positions), device=self._positions.device)[:, None]
        keys, values = self._rows
        keys[rows, :, self._positions] = key_states.transpose(1, 2)
        values[rows, :, self._positions] = value_states.transpose(1, 2)
        return keys[:, :, : self._length], values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Positions before the new ones."""
        return self._length - self._positions.shape[1]
