"""The training loss of DeQA-Score: soft labels, and the order of pairs (Model family §3.3).

::

    logits (B, S, V), labels ──level positions──► z (B, V), which predict the level words
    z, probabilities of the levels ──► KL; other labels ──► cross entropy
    scores of two sides, opinion scores ──► fidelity of their order

Shapes: B rows of a side, S positions, V vocabulary, L = 5 levels, the best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.nn import functional

from owl2.constants import IGNORE_INDEX
from owl2.errors import ErrorCode, InputError

EPSILON = 1e-8
MIN_OUTSIDE = 0.01  # of the probability of all other words, below which it is not reduced


@dataclass(frozen=True)
class PairLossConfig:
    """The settings of the loss, as in ``config.json`` of the checkpoints; defaults are published.

    Attributes:
        softkl_loss: Train the probabilities of the levels, instead of one level word.
        continuous_rating_loss: Compare the probabilities of an order, instead of the order.
        binary_rating_loss: The loss of an order, without `continuous_rating_loss`.
        closeset_rating_loss: Scores from the softmax over the levels, not over the vocabulary.
        use_fix_std: A standard deviation of 1 for predicted scores.
        detach_pred_std: No gradients through predicted standard deviations.
        weight_rank, weight_next_token, weight_softkl, weight_in_level: Weights of the parts.
    """

    softkl_loss: bool = True
    continuous_rating_loss: bool = True
    binary_rating_loss: Literal["fidelity", "bce"] = "fidelity"
    closeset_rating_loss: bool = True
    use_fix_std: bool = True
    detach_pred_std: bool = True
    weight_rank: float = 1.0
    weight_next_token: float = 0.05
    weight_softkl: float = 1.0
    weight_in_level: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> "PairLossConfig":
        """The settings in the configuration of a model."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)})


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


def level_positions(labels: torch.Tensor, prefix: Sequence[int]) -> torch.Tensor:
    """The positions (B,) of the level words: after the first `prefix` in the labels (B, S).

    Raises:
        InputError: A row has no such place.
    """
    expected = torch.tensor(prefix, device=labels.device)
    windows = labels.unfold(1, len(prefix), 1)  # (B, S - P + 1, P)
    found = (windows == expected).all(-1)
    if not found.any(1).all():
        raise InputError("A row has no answer with a level.", ErrorCode.NO_LABELS)
    return found.int().argmax(1) + len(prefix)


def side_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    probabilities: torch.Tensor,
    prefix: Sequence[int],
    level_ids: Sequence[int],
    config: PairLossConfig,
) -> SideLoss:
    """The loss of a batch of rows.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 without a loss.
        probabilities: (B, L) of the levels.
        prefix: Ids of the answer before the level word.
        level_ids: L ids.
    """
    rows = torch.arange(len(labels), device=labels.device)
    positions = level_positions(labels, prefix)
    z = logits[rows, positions - 1].float()  # (B, V)
    log_levels = z.log_softmax(-1)[:, list(level_ids)]  # (B, L)
    entropy = torch.xlogy(probabilities, probabilities).sum(1)
    kl = (entropy - (probabilities * log_levels).sum(1)).mean()
    targets = labels[:, 1:]
    others = labels.clone()
    others[rows, positions] = IGNORE_INDEX

    def cross_entropy(targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
        )

    rest = cross_entropy(others[:, 1:])
    soft = rest + config.weight_softkl * kl
    weights = torch.arange(len(level_ids), 0, -1, device=z.device, dtype=z.dtype)  # 5 to 1
    closed = z[:, list(level_ids)].softmax(-1)
    scores = (closed if config.closeset_rating_loss else log_levels.exp()) @ weights
    stds = (closed * (weights - scores[:, None]) ** 2).sum(1).sqrt()
    outside = (1 - log_levels.exp().sum(1)).mean().clamp(min=MIN_OUTSIDE)
    next_token = soft if config.softkl_loss else cross_entropy(targets)
    return SideLoss(next_token, rest, kl, scores, stds, outside)


def pair_loss(
    first: SideLoss,
    second: SideLoss,
    mos: tuple[torch.Tensor, torch.Tensor],
    stds: tuple[torch.Tensor, torch.Tensor],
    config: PairLossConfig,
) -> torch.Tensor:
    """The loss of B pairs.

    Args:
        mos, stds: (B,) for each side, in the range of the data set.
    """
    loss = config.weight_rank * _rank_loss(first, second, mos, stds, config)
    loss = loss + config.weight_next_token * (first.next_token + second.next_token)
    if config.weight_in_level is not None:
        loss = loss + config.weight_in_level * (first.outside + second.outside)
    return loss


def _rank_loss(
    first: SideLoss,
    second: SideLoss,
    mos: tuple[torch.Tensor, torch.Tensor],
    stds: tuple[torch.Tensor, torch.Tensor],
    config: PairLossConfig,
) -> torch.Tensor:
    difference = first.scores - second.scores
    if config.use_fix_std or not config.continuous_rating_loss:
        predicted = _normal_cdf(difference / 2**0.5)
    else:
        spreads = first.stds**2 + second.stds**2
        spreads = spreads.detach() if config.detach_pred_std else spreads
        predicted = _normal_cdf(difference / (spreads + EPSILON).sqrt())
    if config.continuous_rating_loss:
        truth = _normal_cdf((mos[0] - mos[1]) / (stds[0] ** 2 + stds[1] ** 2 + EPSILON).sqrt())
        fidelity = (predicted * truth + EPSILON).sqrt()
        return (1 - fidelity - ((1 - predicted) * (1 - truth) + EPSILON).sqrt()).mean()
    is_better = mos[0] > mos[1]
    if config.binary_rating_loss == "bce":
        return functional.binary_cross_entropy(predicted, is_better.to(predicted))
    return (1 - torch.where(is_better, predicted, 1 - predicted).sqrt()).mean()


def _normal_cdf(value: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(value / 2**0.5))
