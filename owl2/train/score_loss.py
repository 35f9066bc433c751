"""The training loss of DeQA-Score: soft labels, and the order of pairs (Model family §3.3).

::

    logits (B, S, V), positions of the level words ──► z (B, V), which predict these words
    z, probabilities of the levels ──► KL; other labels ──► cross-entropy
    scores of two sides, opinion scores ──► fidelity of their order

All parts are sums divided by a number of rows or labels. With the numbers of an optimizer step, the
losses of its micro-batches on all devices add up to that of one batch.

Shapes: B rows of a side, S positions, V vocabulary, L = 5 levels, the best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.special import ndtr  # the distribution function of the normal distribution

from owl2.constants import IGNORE_INDEX
from owl2.data.packing import SCORE_FEATURES
from owl2.model.loss import next_token_loss, shift
from owl2.train.recipe_sections import LossSettings

EPSILON = 1e-8
MIN_OUTSIDE = 0.01  # of the probability of all other words, below which it is not reduced


@dataclass(frozen=True)
class SideLoss:
    """The parts of the loss of one side of the pairs.

    Attributes:
        next_token: The loss of all labels; with soft labels that of the level word is `kl`.
        cross_entropy: The mean over all labels but the level words.
        kl: Of the probabilities of the levels, mean over the rows.
        scores, stds: (B,) predicted.
        outside: The probability of words that are no level.
    """

    next_token: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor
    scores: torch.Tensor
    stds: torch.Tensor
    outside: torch.Tensor


def side_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    columns: torch.Tensor,
    probabilities: torch.Tensor,
    level_ids: Sequence[int],
    settings: LossSettings,
    num_rows: torch.Tensor | None = None,
    num_labels: torch.Tensor | None = None,
) -> SideLoss:
    """The loss of a batch of rows.

    Args:
        logits: (B, S, V).
        targets: (B, S), the next token of each position, -100 without a loss.
        columns: (B,) positions whose next token is the level word.
        probabilities: (B, L) of the levels.
        level_ids: L ids.
        num_rows, num_labels: Divide by these instead of by the numbers of this batch.
    """
    rows = torch.arange(len(logits), device=logits.device)
    num_rows = rows.new_tensor(len(rows)) if num_rows is None else num_rows
    num_labels = (targets != IGNORE_INDEX).sum() if num_labels is None else num_labels
    z = logits[rows, columns].float()  # (B, V)
    log_levels = z.log_softmax(-1)[:, list(level_ids)]  # (B, L)
    entropy = torch.xlogy(probabilities, probabilities).sum(1)
    kl = (entropy - (probabilities * log_levels).sum(1)).sum() / num_rows
    others = targets.clone()
    others[rows, columns] = IGNORE_INDEX
    rest = next_token_loss(logits, others, num_labels - num_rows)
    weights = torch.arange(len(level_ids), 0, -1, device=z.device, dtype=z.dtype)  # 5 to 1
    closed = z[:, list(level_ids)].softmax(-1)
    scores = (closed if settings.closeset_rating_loss else log_levels.exp()) @ weights
    stds = (closed * (weights - scores[:, None]) ** 2).sum(1).sqrt()
    outside = (1 - log_levels.exp().sum(1)).mean().clamp(min=MIN_OUTSIDE) * len(rows) / num_rows
    soft = rest + settings.weight_softkl * kl
    next_token = soft if settings.softkl_loss else next_token_loss(logits, targets, num_labels)
    return SideLoss(next_token, rest, kl, scores, stds, outside)


def pair_loss(
    first: SideLoss,
    second: SideLoss,
    mos: Sequence[torch.Tensor],
    stds: Sequence[torch.Tensor],
    settings: LossSettings,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of B pairs.

    Args:
        mos, stds: (B,) for each side, in the range of the dataset.
        num_rows: See `side_loss`.
    """
    difference = first.scores - second.scores
    if settings.use_fix_std or not settings.continuous_rating_loss:
        predicted = ndtr(difference / 2**0.5)
    else:
        spreads = first.stds**2 + second.stds**2
        spreads = spreads.detach() if settings.detach_pred_std else spreads
        predicted = ndtr(difference / (spreads + EPSILON).sqrt())
    is_better = mos[0] > mos[1]
    if settings.continuous_rating_loss:
        truth = ndtr((mos[0] - mos[1]) / (stds[0] ** 2 + stds[1] ** 2 + EPSILON).sqrt())
        fidelity = (predicted * truth + EPSILON).sqrt()
        rank = 1 - fidelity - ((1 - predicted) * (1 - truth) + EPSILON).sqrt()  # (B,)
    elif settings.binary_rating_loss == "bce":
        target = is_better.to(predicted)
        rank = functional.binary_cross_entropy(predicted, target, reduction="none")
    else:
        rank = 1 - torch.where(is_better, predicted, 1 - predicted).sqrt()
    loss = settings.weight_rank * rank.sum() / (len(rank) if num_rows is None else num_rows)
    loss = loss + settings.weight_next_token * (first.next_token + second.next_token)
    if settings.weight_in_level is not None:
        loss = loss + settings.weight_in_level * (first.outside + second.outside)
    return loss


class ScoreLoss:
    """The loss of a batch from `Collator`: scored rows, then descriptions.

    Args:
        level_ids: See `ScoreLabels`.
    """

    def __init__(self, settings: LossSettings, level_ids: Sequence[int]) -> None:
        self.settings = settings
        self.level_ids = level_ids

    def count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(4,): rows of a side, labels of the first and the second side, of descriptions."""
        labels = (shift(batch["labels"]) != IGNORE_INDEX).sum(1)  # (rows,)
        first, second, others = self._sides(batch)
        num_rows = labels[first].new_tensor(len(labels[first]))
        return torch.stack([num_rows, *(labels[side].sum() for side in (first, second, others))])

    def __call__(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], counts: torch.Tensor
    ) -> torch.Tensor:
        """The part of a micro-batch in the loss of an optimizer step.

        Args:
            inputs: A batch.
            counts: The sum of `count` over the micro-batches of the step on all devices.
        """
        settings = self.settings
        first, second, others = self._sides(inputs)
        inputs = dict(inputs)
        targets = shift(inputs.pop("labels"))
        labels = {key: inputs.pop(key) for key in SCORE_FEATURES if key in inputs}
        # Logits only where a row has a label.
        columns = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]
        outputs: Any = model(**inputs, logits_to_keep=columns)
        logits, targets = outputs.logits, targets[:, columns]  # (rows, columns, V)
        described = next_token_loss(logits[others], targets[others], counts[3])
        loss = settings.weight_desp * described
        if not labels:
            return loss
        at = torch.searchsorted(columns, labels["level_positions"] - 1)
        num_rows = counts[0]
        one, *two = (
            side_loss(
                logits[side],
                targets[side],
                at[side],
                labels["level_probs"][side],
                self.level_ids,
                settings,
                num_rows,
                num_labels,
            )
            for side, num_labels in ((first, counts[1]), (second, counts[2]))
            if side.stop > side.start
        )
        if not two:
            return loss + settings.weight_next_token * one.next_token
        mos, stds = ([labels[k][side] for side in (first, second)] for k in ("gt_scores", "stds"))
        return loss + pair_loss(one, two[0], mos, stds, settings, num_rows)

    def _sides(self, batch: dict[str, torch.Tensor]) -> tuple[slice, slice, slice]:
        """The rows of the first side, the second side, and the descriptions."""
        scored, rows = len(batch.get("level_probs", ())), len(batch["labels"])
        half = scored // 2 if self.settings.dataset_type == "pair" else scored
        return slice(0, half), slice(half, scored), slice(scored, rows)
