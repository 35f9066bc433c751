"""The modality-adaptive module, MAM: a norm or a projection with a weight a modality (SPEC 1.3).

Shapes: B sequences, S positions, D features; rows = B · S tokens, T of them text and V visual.

Which token is of which modality is the same in every layer, so it is worked out once a forward (a
`Routing`) and handed down. A step without visual tokens has no routing (`None`): then a module is
its text weight and nothing else, the plain LLaMA path. Only where processes share out the weights
must all of them be touched by each; then such a step is routed, too, with no rows for the visual
weights, whose gradient is zeros and not missing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

TEXT, VISUAL = 0, 1


class Routing(NamedTuple):
    """Where the tokens of each modality stand in the flattened batch.

    Attributes:
        rows: the rows' indices (T,) of text and (V,) of visual tokens.
        order: (B·S,) puts the concatenation [text; visual] back into the batch's order.
    """

    rows: tuple[torch.Tensor, torch.Tensor]
    order: torch.Tensor

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
        joined = is_visual.argsort(stable=True)
        text, visual_rows = joined.split([len(joined) - visual, visual])
        return cls((text, visual_rows), joined.argsort())


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
        rows = hidden_states.flatten(0, 1)  # (B·S, D)
        # index_select: on a GPU the gradient of rows[index] would sort the indices first.
        parts = [
            way(rows.index_select(0, index))
            for way, index in zip(self.multiway, routing.rows, strict=True)
        ]
        joined = torch.cat(parts).index_select(0, routing.order)
        return joined.unflatten(0, hidden_states.shape[:2])
