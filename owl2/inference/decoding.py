"""How the next token is chosen: greedy or sampled, and never from logits that are not finite.

Sampling is done here, by a logits processor that leaves one token to choose from, so that a seed
needs a generator of its own only: transformers' sampling draws from torch's global one, which a
thread that streams would share with its consumer. The warpers are transformers'.

Shapes: B prompts, V the vocabulary.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from owl2.errors import InputError

DEFAULT_MAX_NEW_TOKENS = 512
LARGEST_SEED = 2**32 - 1  # the same as training takes
SAMPLING = ("temperature", "top_p", "top_k")


class Options(TypedDict, total=False):
    """What `Engine.chat`, `.stream` and `.batch` take; None or absent: as the checkpoint says.

    Attributes:
        max_new_tokens: of an answer at most; cut to what fits into the context.
        do_sample: draw tokens instead of taking the likeliest. Giving one of the next three also
            asks for it.
        temperature: above 1 wilder, below 1 tamer, 0 greedy.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only so many of the likeliest tokens; 0: all.
        seed: the same seed gives the same answer; torch's global generator is not touched.
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
        # The limit of an infinitely small temperature; dividing by it would give NaN.
        return cls(**values | {"do_sample": False}) if decoding.temperature == 0 else decoding

    def processors(self, dtype: torch.dtype) -> LogitsProcessorList:
        """What to hand to `generate`, with do_sample=False. One answer's or batch's: has state."""
        chain: list[LogitsProcessor] = [RefuseNonFinite(dtype)]
        if self.do_sample:
            chain.append(Sampler(self))
        return LogitsProcessorList(chain)

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


class RefuseNonFinite(LogitsProcessor):
    """Raises where logits hold a NaN or +infinity, or rule out every token."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        # Comparisons with NaN are False. -infinity is how other processors forbid a token.
        fine = (scores < float("inf")).all() & (scores.amax(-1) > float("-inf")).all()
        if not fine:
            raise non_finite(self.dtype, f"token {self.step} of the answer")
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


class Sampler(LogitsProcessor):
    """Draws a token from (B, V) scores; returns scores that leave only that one."""

    def __init__(self, decoding: Decoding) -> None:
        self.seed = decoding.seed
        self.generator: torch.Generator | None = None
        self.warpers: list[LogitsProcessor] = []
        if decoding.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))
        if decoding.min_p:
            self.warpers.append(MinPLogitsWarper(decoding.min_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.seed is not None and self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        chosen = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)  # (B, 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)
