"""The loss: cross-entropy of each next token, with and without all logits at once (SPEC 2).

Shapes: B sequences, S positions, D width, V vocabulary, T labelled positions in the whole batch.

    hidden_states (B, S, D) ─► labelled (T, D) ─► chunks ─► lm_head (chunk, V) ─► sum / count

Logits are by far the largest tensor of a training step, V / D times the hidden states, and in an
instruction's batch most positions have no label. So `chunked_cross_entropy` computes them at
labeled positions only, a chunk at a time, and once more in the backward pass.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from owl2.constants import IGNORE_INDEX

CHUNK = 512  # positions: 66 MB of float32 logits with 32,000 words

Count = torch.Tensor | int | None


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Count = None
) -> torch.Tensor:
    """Cross-entropy of each next token, averaged over all labelled tokens.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no loss.
        num_items_in_batch: the number of labels to average over; this batch's where absent. With
            accumulated gradients it counts all of the step's batches.

    Returns:
        a scalar in float32; 0 for a batch without any label, never NaN.
    """
    targets = labels[:, 1:].flatten().to(logits.device)
    total = _summed(logits[:, :-1].flatten(0, 1), targets)
    return _mean(total, (targets != IGNORE_INDEX).sum(), num_items_in_batch)


def labeled_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a next token has a label: rows (T,) of the flattened batch, and those labels (T,).

    How many there are must be known, so this waits for a GPU: call it before there is work queued.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (B·S,)
    rows = (following != IGNORE_INDEX).nonzero()[:, 0]
    return rows, following.index_select(0, rows)


def chunked_cross_entropy(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: Count = None,
) -> torch.Tensor:
    """`next_token_loss` from hidden states (B, S, D), without the logits of the whole batch.

    Args:
        lm_head: called as a module, a chunk at a time, so that whatever wraps it or hands it its
            weight (FSDP2, DeepSpeed, adapters) does so.
        rows, targets: of `labeled_positions`.
        num_items_in_batch: as for `next_token_loss`.
    """

    def summed(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _summed(lm_head(states), labels)

    labelled = hidden_states.flatten(0, 1).index_select(0, rows.to(hidden_states.device))  # (T, D)
    targets = targets.to(hidden_states.device)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    # No label at all makes one empty chunk: other processes wait for this one's lm_head.
    for states, labels in zip(labelled.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(summed, states, labels, use_reentrant=False)
    return _mean(total, len(targets), num_items_in_batch)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _mean(total: torch.Tensor, labelled: torch.Tensor | int, wanted: Count) -> torch.Tensor:
    count = torch.as_tensor(labelled if wanted is None else wanted, device=total.device)
    return total / count.clamp(min=1)
