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
        layers: (2, R, h, C, d) for each decoder layer: keys and values.
    """

    def __init__(
        self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, 0, heads, 0, width)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row, over all layers."""
        heads, width = self.layers[0].shape[2], self.layers[0].shape[4]
        return 2 * len(self.layers) * heads * width * self.layers[0].element_size()

    def reserve(self, rows: int, capacity: int) -> None:
        """Grow to at least this many rows and positions; the content is kept.

        The size doubles, so that a growing conversation is rarely copied.
        """
        _, old_rows, heads, old_capacity, width = self.layers[0].shape
        if rows <= old_rows and capacity <= old_capacity:
            return
        rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        capacity = max(MIN_CAPACITY, old_capacity, 1 << (capacity - 1).bit_length())
        for layer, old in enumerate(self.layers):
            new = old.new_zeros(2, rows, heads, capacity, width)
            new[:, :old_rows, :, :old_capacity] = old
            self.layers[layer] = new

    def write(self, row: int, layers: Sequence[torch.Tensor]) -> None:
        """Write (2, h, S, d) for each layer to the start of a row."""
        for own, new in zip(self.layers, layers, strict=True):
            own[:, row, :, : new.shape[2]] = new

    def read(self, row: int, length: int) -> list[torch.Tensor]:
        """Copies of the first `length` positions of a row: (2, h, length, d) for each layer."""
        return [layer[:, row, :, :length].clone() for layer in self.layers]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def view(self, rows: Sequence[int], positions: torch.Tensor, length: int) -> Cache:
        """Rows as a cache for the model's forward.

        Args:
            rows: B of them. The forward reads consecutive ones in place, and copies of others.
            positions: (B, S), where it writes in each row.
            length: Positions that the queries see, the new ones included.
        """
        indices = torch.tensor(rows, device=positions.device)
        are_consecutive = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        selected = slice(rows[0], rows[0] + len(rows)) if are_consecutive else indices
        return Cache(
            layers=[
                _RowsLayer(layer, (indices[:, None], positions), selected, length)
                for layer in self.layers
            ]
        )


class _RowsLayer(DynamicLayer):
    """Rows of one layer of a `StaticKVCache`, written in place.

    Args:
        layer: (2, R, h, C, d).
        places: Rows (B, 1) and positions (B, S) of the new keys and values.
        selected: The rows that are read.
        length: Their positions.
    """

    def __init__(
        self,
        layer: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        selected: slice | torch.Tensor,
        length: int,
    ) -> None:
        super().__init__()
        self.keys, self.values = layer
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self._layer = layer
        self._places = places
        self._selected = selected
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, h, S, d) each; returns the rows (B, h, length, d)."""
        rows, positions = self._places
        for own, new in zip(self._layer, (key_states, value_states), strict=True):
            own[rows, :, positions] = new.transpose(1, 2)
        keys, values = self._layer[:, :, :, : self._length]
        return keys[self._selected], values[self._selected]

    def get_seq_length(self) -> int:
        """Positions before the new ones."""
        return self._length - self._places[1].shape[1]
