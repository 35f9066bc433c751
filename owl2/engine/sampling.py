"""Sampling parameters, and the choice of the next token from the logits.

Each answer draws from a generator of its own. Its tokens therefore depend neither on torch's global
generator, which threads share, nor on the other sequences of the batch. The logits are warped by
transformers' processors.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from owl2.errors import ErrorCode, InputError

DEFAULT_MAX_NEW_TOKENS = 512
MAX_SEED = 2**32 - 1  # training accepts the same range
MAX_TOP_LOGPROBS = 20
# (id, log-probability) of the chosen token, then of the most probable ones in descending order.
Logprobs = list[tuple[int, float]]
# Parameters that request sampling by being set.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# Lower temperatures are treated as 0. Logits divided by them are not finite, so that nothing can be
# drawn from them, and the other sequences of the step would fail as well.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is generated, and when it ends.

    `Engine.chat`, `.batch`, `.stream` and `.complete` take the fields as keyword arguments; there,
    None stands for the value in the checkpoint's `generation_config`.

    Attributes:
        max_new_tokens: Maximum number of generated tokens; at most what fits into the context.
        do_sample: Draw tokens instead of taking the most probable one.
        temperature: Divisor of the logits; below 0.00001 the answer is greedy.
        top_p: Sample from the smallest set of most probable tokens with this total probability.
        top_k: Sample from this number of most probable tokens; 0: all.
        min_p: Exclude tokens below this fraction of the highest probability.
        seed: Answer i of a request (counted from 0 over all its conversations) draws from a
            generator with the seed `seed` + i. None: torch's global generator.
        n: Number of answers to each prompt, which is computed once.
        stop: Strings that end the answer; they are not part of it.
        top_logprobs: Report the log-probability of each token and of this number of most probable
            alternatives, 0 to 20. None: no log-probabilities.

    Raises:
        InputError: A value is out of its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", 0 <= (self.seed or 0) <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("n", self.n >= 1, "1 or more"),
            ("top_logprobs", 0 <= (self.top_logprobs or 0) <= MAX_TOP_LOGPROBS, "from 0 to 20"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
        ):
            if not is_valid:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be {expected}.",
                    ErrorCode.INVALID_VALUE,
                )

    @classmethod
    def from_options(cls, defaults: GenerationConfig, **options: Any) -> "SamplingParams":
        """The options that are not None, over the defaults of a checkpoint.

        Setting temperature, top_p, top_k or min_p implies do_sample=True. `stop` may be one string.

        Raises:
            InputError: A value is out of its range, or sampling options with do_sample=False.
            TypeError: An unknown option.
        """
        requested = {name: value for name, value in options.items() if value is not None}
        sampling = [name for name in _SAMPLING if name in requested]
        if sampling and requested.get("do_sample") is False and requested.get("temperature") != 0:
            raise InputError(
                f"{' and '.join(sampling)} have no effect with do_sample=False.",
                ErrorCode.CONFLICT,
            )
        names = ("max_new_tokens", "do_sample", *_SAMPLING)
        values = {name: getattr(defaults, name, None) for name in names}
        values = {name: value for name, value in values.items() if value is not None} | requested
        if sampling and "do_sample" not in requested:
            values["do_sample"] = True
        stop = values.pop("stop", ())
        values["stop"] = (stop,) * bool(stop) if isinstance(stop, str) else tuple(stop)
        params = cls(**values)
        if params.temperature < MIN_TEMPERATURE:
            params = replace(params, do_sample=False)
        return params

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """The random generator of answer `index`; None: torch's global one."""
        if self.seed is None or not self.do_sample:
            return None
        return torch.Generator(device).manual_seed(self.seed + index)


def end_ids(defaults: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of a checkpoint, and the one that training labels."""
    eos: int | list[int] | None = defaults.eos_token_id
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
) -> list[int | None]:
    """The next token of each sequence; None where its logits are not finite.

    Logits are not finite if they contain NaN or +infinity, or if they exclude every token;
    -infinity excludes a token. The device is synchronized once.

    Args:
        logits: (B, V).
        params, generators: one for each sequence.
    """
    maximum, chosen = logits.max(-1)  # (B,); NaN if the row contains one
    is_finite = maximum.isfinite()
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for row, own in enumerate(params):
        if own.do_sample:
            groups.setdefault((own.temperature, own.top_k, own.top_p, own.min_p), []).append(row)
    for warping, rows in groups.items():
        # Rows that are not finite are discarded below, but would make multinomial fail.
        scores = logits[rows].float().masked_fill(~is_finite[rows, None], 0.0)
        no_ids: Any = torch.empty(len(rows), 0, dtype=torch.long, device=scores.device)
        for warper in _warpers(*warping):
            scores = warper(no_ids, scores)
        for probabilities, row in zip(scores.softmax(-1), rows, strict=True):
            chosen[row] = torch.multinomial(probabilities, 1, generator=generators[row])[0]
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
    logprobs = logits[list(counts)].float().log_softmax(-1)
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
