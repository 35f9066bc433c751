"""How likely the tokens of an answer were, by the model alone.

The log-probabilities are those of the logits as the model gives them, in float32: temperature,
top_p and top_k change what is drawn, not what is reported.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Score(NamedTuple):
    """One token's.

    Attributes:
        logprob: of the token that was chosen.
        top: (id, log-probability) of the likeliest, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score_tokens(
    logits: torch.Tensor, tokens: Sequence[int | None], tops: Sequence[int | None]
) -> list[Score | None]:
    """The scores of B chosen tokens; None where none is wanted, or no token was chosen.

    Args:
        logits: (B, V).
        tops: of how many of the likeliest tokens each wants to know, too; None: no score at all.
            Tokens that the logits rule out are not among them.
    """
    scores: list[Score | None] = [None] * len(tokens)
    wanted = [row for row, top in enumerate(tops) if top is not None and tokens[row] is not None]
    if not wanted:
        return scores
    logprobs = logits[wanted].float().log_softmax(-1)
    chosen = torch.tensor([tokens[row] for row in wanted], device=logits.device)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    counts = [tops[row] or 0 for row in wanted]
    best = logprobs.topk(min(max(counts), logits.shape[1]))
    lines = zip(wanted, counts, own, best.values.tolist(), best.indices.tolist(), strict=True)
    for row, count, logprob, values, ids in lines:
        likeliest = zip(ids[:count], values[:count], strict=True)
        scores[row] = Score(logprob, tuple(one for one in likeliest if one[1] > float("-inf")))
    return scores
