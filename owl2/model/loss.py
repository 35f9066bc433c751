"""Next-token cross-entropy, with or without the logits of all positions (Specification §2).

Shapes: B sequences, S positions, D width, V vocabulary, T labeled positions in the batch.

    hidden_states (B, S, D) ─► labeled (T, D) ─► chunks ─► lm_head (chunk, V) ─► sum / count

The logits are the largest tensor of a training step, V / D times the size of the hidden states, and
most positions of an instruction-tuning batch have no label. `chunked_cross_entropy` computes logits
at labeled positions only, one chunk at a time, and recomputes them in the backward pass.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.import_utils import is_tracing

from owl2.constants import IGNORE_INDEX
from owl2.errors import ErrorCode, InputError

CHUNK = 512  # positions: 66 MB of float32 logits with a vocabulary of 32,000

Count = torch.Tensor | int | None


def shift(labels: torch.Tensor) -> torch.Tensor:
    """The label of each position's next token (B, S), from the labels of the positions (B, S)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def next_token_labels(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    sequence: torch.Tensor,
    keep: slice | torch.Tensor,
    image_token_id: int,
) -> torch.Tensor:
    """The label of the next token of each of the L positions `keep` that have logits.

    Args:
        labels: (B, S), or (B, L) where each kept position's next token is the next column, as
            ms-swift passes them.
        shift_labels: (B, S) or (B, L), already shifted, instead of `labels`.
        sequence: (B, S) ids, or (B, S, D) embeddings.
        keep: The last positions, indices, or a mask (S,).

    Returns:
        (B, L), -100 for positions without a loss and for image tokens.

    Raises:
        InputError: The labels have another shape, or `labels` (B, L) are of the kept positions
            themselves although their next tokens are not kept.
    """
    found: torch.Tensor = shift(labels) if shift_labels is None else shift_labels  # type: ignore[arg-type]  # one of the two
    found = found.masked_fill(found == image_token_id, IGNORE_INDEX)
    positions = torch.arange(sequence.shape[1], device=sequence.device)[keep]
    if found.shape[1] == sequence.shape[1]:
        return found[:, keep]
    if found.shape[1] != len(positions):
        raise InputError(
            f"labels of {found.shape[1]} positions: the sequence has {sequence.shape[1]}, and "
            f"logits_to_keep selects {len(positions)}",
            ErrorCode.CONFLICT,
        )
    is_exact = shift_labels is not None or isinstance(keep, slice) or sequence.dim() == 3
    if not is_exact and not is_tracing(sequence):
        tokens = shift(sequence)[:, keep].to(found)
        if ((found != IGNORE_INDEX) & (found != tokens)).any():
            raise InputError(
                "labels of the positions that logits_to_keep selects do not contain their next "
                "tokens: pass the labels of all positions, or shift_labels",
                ErrorCode.CONFLICT,
            )
    return found


def next_token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: Count = None
) -> torch.Tensor:
    """Cross-entropy of each next token, averaged over all labeled tokens.

    Args:
        logits: (B, S, V).
        targets: (B, S), the next token of each position, -100 for positions without a loss.
        num_items_in_batch: The number of labels to average over. Default: the labels of this batch.
            With gradient accumulation it counts the labels of all micro-batches of the step.

    Returns:
        A scalar in float32; 0 and not NaN for a batch without labels.
    """
    targets = targets.flatten().to(logits.device)
    total = _sum_loss(logits.flatten(0, 1), targets)
    return _mean(total, (targets != IGNORE_INDEX).sum(), num_items_in_batch)


def labeled_positions(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token (B, S) has a label.

    The size of the result depends on the data, which synchronizes with a GPU. Call this function
    before work is queued.

    Returns:
        Rows (T,) of the flattened batch, and their labels (T,).
    """
    following = targets.flatten()  # (B·S,)
    rows = (following != IGNORE_INDEX).nonzero()[:, 0]
    return rows, following.index_select(0, rows)


def chunked_cross_entropy(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: Count = None,
) -> torch.Tensor:
    """`next_token_loss` from hidden states (B, S, D), without the logits of the complete batch.

    Args:
        lm_head: Called as a module, once per chunk, so that wrappers which manage its weight
            (FSDP2, DeepSpeed, adapters) work.
        rows, targets: See `labeled_positions`.
        num_items_in_batch: See `next_token_loss`.
    """

    def chunk_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _sum_loss(lm_head(states), labels)

    labeled = hidden_states.flatten(0, 1).index_select(0, rows.to(hidden_states.device))  # (T, D)
    targets = targets.to(hidden_states.device)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    # Without labels there is one empty chunk: in sharded training all processes must use lm_head.
    for states, labels in zip(labeled.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(chunk_loss, states, labels, use_reentrant=False)
    return _mean(total, len(targets), num_items_in_batch)


def _sum_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _mean(total: torch.Tensor, labeled: torch.Tensor | int, num_items: Count) -> torch.Tensor:
    count = torch.as_tensor(labeled if num_items is None else num_items, device=total.device)
    return total / count.clamp(min=1)
