"""The modality-adaptive module (MAM): norms and projections with separate weights per modality.

Specification §1.3. Shapes: B sequences, S positions, D features; B · S tokens, T of them text and
V visual.

The modality of a token is the same in every layer, so a forward pass computes one `Routing` and
passes it to all layers. A step without visual tokens has no routing (None): each module then uses
only its text weight, as a plain LLaMA does. In sharded training every process must use all weights.
Such a step then has a routing with V = 0, and the gradients of the visual weights are zeros.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

TEXT, VISUAL = 0, 1

ModalitySplit = tuple[torch.Tensor, torch.Tensor]  # the text and the visual tokens


class Routing(NamedTuple):
    """Positions of the tokens of each modality in the flattened batch.

    Attributes:
        grouped: (B·S,) rows of all text tokens, followed by the rows of all visual tokens.
        order: (B·S,) inverse permutation of `grouped`.
        sizes: T and V.
    """

    grouped: torch.Tensor
    order: torch.Tensor
    sizes: tuple[int, int]

    @classmethod
    def of(
        cls, token_types: torch.Tensor, num_visual: int | None = None, always: bool = False
    ) -> "Routing | None":
        """The routing for modalities (B, S), 0 for text and 1 for visual tokens.

        Args:
            num_visual: The number of visual positions. By default they are counted, which
                synchronizes with a GPU.
            always: Return a routing also if there are no visual tokens.

        Returns:
            None if there are no visual tokens and `always` is False.
        """
        is_visual = token_types.flatten() == VISUAL
        if num_visual is None:
            num_visual = int(is_visual.sum())
        if not num_visual and not always:
            return None
        # A sort and not `nonzero`, whose result size depends on the data and synchronizes a GPU.
        grouped = is_visual.argsort(stable=True)
        return cls(grouped, grouped.argsort(), (len(grouped) - num_visual, num_visual))

    def split(self, hidden_states: torch.Tensor) -> ModalitySplit:
        """Split (B, S, D) into text tokens (T, D) and visual tokens (V, D)."""
        rows: torch.Tensor = PermuteRows.apply(
            hidden_states.flatten(0, 1), self.grouped, self.order
        )
        text, visual = rows.split(self.sizes)
        return text, visual

    def join(self, parts: ModalitySplit, batch_size: int) -> torch.Tensor:
        """Inverse of `split`: (T, D) and (V, D) to (B, S, D)."""
        rows: torch.Tensor = PermuteRows.apply(torch.cat(parts), self.order, self.grouped)
        return rows.unflatten(0, (batch_size, -1))


class PermuteRows(torch.autograd.Function):
    """Permute rows. The backward pass applies the inverse permutation.

    The backward pass of `index_select` would accumulate into a tensor of zeros, because PyTorch
    cannot assume that each row is selected once.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class Multiway(nn.Module):
    """Two modules of one kind: ``multiway.0`` for text tokens, ``multiway.1`` for visual tokens.

    Args:
        make: Creates one of them: a `torch.nn.Linear`, an RMSNorm, or another module that processes
            each token independently.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def copy_text_weights(self) -> None:
        """Initialize the visual weights as copies of the text weights (Specification §1.3)."""
        self.multiway[VISUAL].load_state_dict(self.multiway[TEXT].state_dict())

    def forward(self, hidden_states: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """(B, S, D) to (B, S, D'), each token by the module of its modality."""
        if routing is None:
            return self.multiway[TEXT](hidden_states)
        return routing.join(self.each(routing.split(hidden_states)), len(hidden_states))

    def each(self, parts: ModalitySplit) -> ModalitySplit:
        """Apply both modules to tokens that are already split, (T, D) and (V, D)."""
        return self.multiway[TEXT](parts[TEXT]), self.multiway[VISUAL](parts[VISUAL])
