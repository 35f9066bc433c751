"""How the next token is chosen: greedy or sampled, and never from logits that are not finite.

Sampling is done here, so that each answer draws from a generator of its own: its tokens then depend
neither on torch's global one, which threads share, nor on what else is in the batch. The warpers
are transformers'.

Shapes: B sequences, V the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from owl2.errors import InputError

DEFAULT_MAX_NEW_TOKENS = 512
LARGEST_SEED = 2**32 - 1  # the same as training takes
SAMPLING = ("temperature", "top_p", "top_k")
# One below it is 0, its limit: logits divided by much less are not finite, nothing can be drawn
# from them, and whatever is computed in the same step would fail, too.
LOWEST_TEMPERATURE = 1e-5


class Options(TypedDict, total=False):
    """What `Engine.chat`, `.stream` and `.batch` take; None or absent: as the checkpoint says.

    Attributes:
        max_new_tokens: of an answer at most; cut to what fits into the context.
        do_sample: draw tokens instead of taking the likeliest. Giving one of the next three also
            asks for it.
        temperature: above 1 wilder, below 1 tamer, 0 (or less than 0.00001) greedy.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only so many of the likeliest tokens; 0: all.
        seed: the same seed gives the same answer; torch's global generator is not touched. Of
            several conversations together, number i (from 0) has the seed `seed` + i.
    """

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None


@dataclass(frozen=True)
class Decoding:
    """`Options` with the checkpoint's defaults in them; `min_p` is the checkpoint's alone."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @classmethod
    def of(cls, options: Options, defaults: GenerationConfig) -> "Decoding":
        """Options over the model's `generation_config`, checked.

        Raises:
            InputError: a value out of its range, or sampling options with do_sample=False.
            TypeError: an option that does not exist.
        """
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise TypeError(f"unexpected options: {', '.join(unknown)}")
        given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        asked = [name for name in SAMPLING if name in given]
        if asked and given.get("do_sample") is False and given.get("temperature") != 0:
            raise InputError(f"{' and '.join(asked)} have no effect with do_sample=False: drop one")
        names = ("max_new_tokens", "do_sample", *SAMPLING, "min_p")
        values = {name: getattr(defaults, name, None) for name in names}
        values = {name: value for name, value in values.items() if value is not None} | given
        if asked and "do_sample" not in given:
            values["do_sample"] = True
        decoding = cls(**values)
        decoding._check()
        is_greedy = decoding.temperature < LOWEST_TEMPERATURE
        return cls(**values | {"do_sample": False}) if is_greedy else decoding

    def of_answer(self, number: int) -> "Decoding":
        """For one of several answers: each has its own seed, as if it were asked for alone."""
        return self if self.seed is None else replace(self, seed=self.seed + number)

    def sampler(self, device: torch.device) -> "Sampler | None":
        """What draws one answer's tokens; None: the likeliest is taken."""
        return Sampler(self, device) if self.do_sample else None

    def _check(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("seed", 0 <= (self.seed or 0) <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {wanted}")


class Sampler:
    """How one answer's tokens are drawn: it has a generator of its own, or torch's for no seed.

    Attributes:
        settings: equal for samplers that may look at their logits together.
    """

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self.settings = replace(decoding, seed=None)
        self.generator: torch.Generator | None = None
        if decoding.seed is not None:
            self.generator = torch.Generator(device).manual_seed(decoding.seed)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """The next token of each sequence; None where its logits are not finite.

    Logits are not finite if they hold a NaN or +infinity, or rule out every token: -infinity is how
    a token is forbidden. All waits for the device are one.

    Args:
        logits: (B, V).
        samplers: B of them; None: the likeliest token.
    """
    top, chosen = logits.max(-1)  # (B,), NaN if there is one in the row
    fine = top.isfinite()
    together: dict[Decoding, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            together.setdefault(sampler.settings, []).append(row)
    for settings, rows in together.items():
        # What is not finite is not chosen from, but drawing from it would fail for all.
        scores = logits[rows].float().masked_fill(~fine[rows, None], 0.0)
        for probabilities, row in zip(_warped(scores, settings).softmax(-1), rows, strict=True):
            sampler = samplers[row]
            assert sampler is not None  # or its row would not be here
            chosen[row] = torch.multinomial(probabilities, 1, generator=sampler.generator)[0]
    tokens, finite = torch.stack([chosen, fine.to(chosen.dtype)]).tolist()
    return [token if is_fine else None for token, is_fine in zip(tokens, finite, strict=True)]


def _warped(scores: torch.Tensor, settings: Decoding) -> torch.Tensor:
    """(B, V) scores with the settings' temperature, -infinity on tokens that they leave out."""
    warpers: list[LogitsProcessor] = []
    if settings.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(settings.min_p))
    no_ids = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
    for warper in warpers:
        scores = warper(no_ids, scores)
    return scores


def non_finite(dtype: torch.dtype, where: str) -> InputError:
    """The error for a model whose output is no numbers."""
    name = str(dtype).removeprefix("torch.")
    advice = (
        "the checkpoint's weights are probably broken"
        if dtype == torch.float32
        else "numbers may be too large for it: try another dtype, bfloat16 or float32"
    )
    return InputError(
        f"The model's logits are not finite (NaN or infinity) at {where}. It runs in {name}; "
        f"{advice}."
    )
