"""The choice of the next token from the logits, and the log-probabilities of tokens.

Each answer draws from a generator of its own. Its tokens therefore depend neither on torch's global
generator, which threads share, nor on the other sequences of the batch.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from owl2.engine.sampling_params import SamplingParams
from owl2.errors import ErrorCode, InputError

# (id, log-probability) of the chosen token, then of the most probable ones in descending order.
Logprobs = list[tuple[int, float]]


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
    processors: Sequence[Callable[[torch.Tensor], torch.Tensor] | None] = (),
    masks: Sequence[torch.Tensor | None] = (),
) -> list[int | None]:
    """The next token of each sequence; None where its logits are not finite.

    Logits are not finite if they contain NaN or +infinity, or if they exclude every token;
    -infinity excludes a token. Without processors, the device is synchronized once.

    Args:
        logits: (B, V).
        params, generators: one for each sequence.
        processors: for each sequence, a function of its (1, V) logits in float32, which replaces
            its `_warpers`, or None. Default: none.
        masks: for each sequence, the tokens (V,) that its grammar allows, or None. Default: none.
            If the processors exclude all of them, they have no effect on this token.
    """
    maximum, chosen = logits.max(-1)  # (B,); NaN if the row contains one
    is_finite = maximum.isfinite()
    allowed = {row: mask.to(logits.device) for row, mask in enumerate(masks) if mask is not None}
    if allowed:
        logits = logits.clone()
        for row, mask in allowed.items():  # faster than an index of several rows
            logits[row] = torch.where(mask, logits[row], float("-inf"))
            maximum[row], chosen[row] = logits[row].max(-1)
        is_finite &= maximum.isfinite()

    def draw(rows: Sequence[int], scores: torch.Tensor) -> None:
        for probabilities, row in zip(scores.softmax(-1), rows, strict=True):
            chosen[row] = torch.multinomial(probabilities, 1, generator=generators[row])[0]

    processed = {row: process for row, process in enumerate(processors) if process is not None}
    for row, process in processed.items():
        scores = process(logits[row : row + 1].float())
        if row in allowed:  # a processor may force a token
            scores = torch.where(allowed[row], scores, float("-inf"))
            has_token = (scores > float("-inf")).any()
            scores = torch.where(has_token, scores, logits[row : row + 1].float())
        best, chosen[row] = scores[0].max(-1)
        is_valid = is_finite[row] | params[row].remove_invalid_values
        is_finite[row] = best.isfinite() & is_valid
        if params[row].do_sample and is_finite[row]:
            draw([row], scores)
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for row, own in enumerate(params):
        if own.do_sample and row not in processed:
            groups.setdefault((own.temperature, own.top_k, own.top_p, own.min_p), []).append(row)
    for warping, rows in groups.items():
        # Rows that are not finite are discarded below, but would make multinomial fail.
        scores = logits[rows].float().masked_fill(~is_finite[rows, None], 0.0)
        no_ids: Any = torch.empty(len(rows), 0, dtype=torch.long, device=scores.device)
        for warper in _warpers(*warping):
            scores = warper(no_ids, scores)
        draw(rows, scores)
    tokens, finite = torch.stack([chosen, is_finite.to(chosen.dtype)]).tolist()
    return [token if fine else None for token, fine in zip(tokens, finite, strict=True)]


def _warpers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> Iterator[LogitsProcessor]:
    if temperature != 1:
        yield TemperatureLogitsWarper(float(temperature))
    if top_k:
        yield TopKLogitsWarper(top_k)
    if top_p < 1:
        yield TopPLogitsWarper(top_p)
    if min_p:
        yield MinPLogitsWarper(min_p)


def compute_logprobs(
    logits: torch.Tensor, tokens: Sequence[int | None], params: Sequence[SamplingParams]
) -> list[Logprobs | None]:
    """Log-probabilities of B chosen tokens; None where there is no token or none are requested.

    They are those of the logits (B, V) as the model gives them, in float32: temperature, top_p and
    top_k change which token is drawn, but not these values.
    """
    found: list[Logprobs | None] = [None] * len(tokens)
    counts = {
        row: own.top_logprobs
        for row, (own, token) in enumerate(zip(params, tokens, strict=True))
        if own.top_logprobs is not None and token is not None
    }
    if not counts:
        return found
    # NaN and infinity occur with `remove_invalid_values` only.
    logprobs = logits[list(counts)].float().nan_to_num(neginf=float("-inf")).log_softmax(-1)
    chosen = torch.tensor([[tokens[row]] for row in counts], device=logits.device)
    best = logprobs.topk(min(max(counts.values()), logits.shape[1]))
    ids = torch.cat([chosen, best.indices], 1).tolist()
    values = torch.cat([logprobs.gather(1, chosen), best.values], 1).tolist()
    for (row, count), *pairs in zip(counts.items(), ids, values, strict=True):
        # -infinity: the logits exclude the token.
        possible = [pair for pair in zip(*pairs, strict=True) if pair[1] > float("-inf")]
        found[row] = possible[: 1 + count]
    return found


def non_finite_error(dtype: torch.dtype, position: str) -> InputError:
    """The error for logits with NaN or infinity at a position of the answer."""
    name = str(dtype).removeprefix("torch.")
    advice = (
        "the weights of the checkpoint are probably corrupt"
        if dtype == torch.float32
        else "values may exceed its range; try bfloat16 or float32"
    )
    return InputError(
        f"The model's logits are not finite (NaN or infinity) at {position}. It runs in {name}: "
        f"{advice}.",
        ErrorCode.NON_FINITE,
    )
