"""The modality-adaptive module, MAM: a norm or a projection with a weight a modality (SPEC 1.3).

Shapes: B sequences, S positions, D features; rows = B · S tokens, T of them text and V visual.

Which token is of which modality is the same in every layer, so it is worked out once a forward (a
`Routing`) and handed down. A step without visual tokens has no routing (`None`): then a module is
its text weight and nothing else, the plain LLaMA path. Only where processes share out the weights
must all of them be touched by each; then such a step is routed, too, with no rows for the visual
weights, whose gradient is zeros and not missing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

TEXT, VISUAL = 0, 1

ModalitySplit = tuple[torch.Tensor, torch.Tensor]  # text's and visual tokens'


class Routing(NamedTuple):
    """Where the tokens of each modality stand in the flattened batch.

    Attributes:
        grouped: (B·S,) the rows of all text tokens, then those of all visual ones.
        order: (B·S,) puts tokens so grouped back into the batch's order: the inverse.
        sizes: T and V.
    """

    grouped: torch.Tensor
    order: torch.Tensor
    sizes: tuple[int, int]

    @classmethod
    def of(
        cls, token_types: torch.Tensor, visual: int | None = None, always: bool = False
    ) -> "Routing | None":
        """The routing of (B, S) modalities (0 text, 1 visual).

        Args:
            visual: how many positions are visual; counted where absent, which waits for a GPU.
            always: a routing for text alone, too, so that every weight is used.

        Returns:
            None if there is no visual token, unless `always`.
        """
        is_visual = token_types.flatten() == VISUAL
        if visual is None:
            visual = int(is_visual.sum())
        if not visual and not always:
            return None
        # Sorted, and not searched: how many a search finds, a GPU would have to tell.
        grouped = is_visual.argsort(stable=True)
        return cls(grouped, grouped.argsort(), (len(grouped) - visual, visual))

    def split(self, hidden_states: torch.Tensor) -> ModalitySplit:
        """(B, S, D) to the tokens of each modality, (T, D) and (V, D)."""
        rows: torch.Tensor = PermuteRows.apply(
            hidden_states.flatten(0, 1), self.grouped, self.order
        )
        text, visual = rows.split(self.sizes)
        return text, visual

    def join(self, parts: ModalitySplit, batch: int) -> torch.Tensor:
        """What `split` gives for `batch` sequences, (T, D) and (V, D), to (B, S, D)."""
        rows: torch.Tensor = PermuteRows.apply(torch.cat(parts), self.order, self.grouped)
        return rows.unflatten(0, (batch, -1))


class PermuteRows(torch.autograd.Function):
    """Rows in another order: those of the gradient go back in the inverse one.

    PyTorch does not know that no row is taken twice: it would add up into a tensor of zeros.
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
    """Two modules of the same kind, ``multiway.0`` for text and ``multiway.1`` for visual tokens.

    Args:
        make: makes one of them: a `torch.nn.Linear`, an RMSNorm, any module that treats each
            token by itself.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def copy_text_weights(self) -> None:
        """Visual weights start as copies of the text ones (SPEC 1.3)."""
        self.multiway[VISUAL].load_state_dict(self.multiway[TEXT].state_dict())

    def forward(self, hidden_states: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """(B, S, D) to (B, S, D'), each token through its modality's module."""
        if routing is None:
            return self.multiway[TEXT](hidden_states)
        parts = self.each(routing.split(hidden_states))
        return routing.join(parts, len(hidden_states))

    def each(self, parts: ModalitySplit) -> ModalitySplit:
        """Tokens that are split already, (T, D) and (V, D), each through its module."""
        return self.multiway[TEXT](parts[TEXT]), self.multiway[VISUAL](parts[VISUAL])
