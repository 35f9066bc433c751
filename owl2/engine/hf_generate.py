"""Answers by transformers' `generate`: for models that `Runner` cannot take.

Several processes may share out the weights of one model (FSDP2, ZeRO-3): each has a part of each
weight, and all must take every step together. Nothing is kept, nothing is streamed.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from owl2.engine.engine_core import Prompt
from owl2.engine.running_batch import Event
from owl2.engine.sampling import SamplingParams, non_finite_error, sample
from owl2.model.modeling import Owl2ForConditionalGeneration


def is_whole(model: Owl2ForConditionalGeneration) -> bool:
    """Whether all weights are here, on one device, as `Runner` needs them."""
    weights = list(model.parameters())
    # Only a DTensor, a part of a weight, has a mesh of devices.
    parts = any(hasattr(weight, "device_mesh") for weight in weights)
    return not parts and {weight.device for weight in weights} == {model.device}


def generate(
    model: Owl2ForConditionalGeneration,
    prompts: Sequence[Prompt],
    decoding: SamplingParams,
    limits: Sequence[int],
    ends: Collection[int],
    synced_gpus: bool | None = None,
) -> list[list[int]]:
    """As `Runner.generate`. `synced_gpus`: as transformers has it, True for shared weights."""
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = next(iter(ends), 0)
    rows = [[padding] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in prompts]
    mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    images = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    limit = max(limits)
    # transformers fills what is unset from the checkpoint's settings, and warns when it then
    # has both: name the limit as a checkpoint with a max_length (LLaMA's have one) does.
    named = model.generation_config.max_new_tokens is not None
    length = {"max_new_tokens": limit} if named else {"max_length": longest + limit}
    config = GenerationConfig(
        **length,
        do_sample=False,  # what is sampled, our own processor samples
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,  # after the end; not read
        # Settings of a sampling checkpoint, or transformers would warn of them.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
    )
    ids = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        pixel_values=torch.cat(images).to(model.device, model.dtype) if images else None,
        generation_config=config,
        logits_processor=LogitsProcessorList([_Choose(decoding, len(prompts), model)]),
        synced_gpus=synced_gpus,
    )
    answers: list[list[int]] = ids[:, longest:].tolist()
    # Shorter prompts may go on for longer; what a long one got beyond its limit is not its own.
    return [_ended(answer[:own], ends) for answer, own in zip(answers, limits, strict=True)]


class Whole:
    """Answers that come at once, looked at token by token; made when the first is asked for."""

    def __init__(self, make: Callable[[], list[list[int]]]) -> None:
        self._make = make
        self._dropped: set[int] = set()
        self._closed = False

    def __iter__(self) -> Iterator[Event]:
        if self._closed:
            return
        for number, answer in enumerate(self._make()):
            for token in answer:
                if self._closed or number in self._dropped:
                    break
                yield Event(number, token)

    def drop(self, number: int) -> None:
        """No more of this answer."""
        self._dropped.add(number)

    def close(self) -> None:
        """No more of any."""
        self._closed = True


class _Choose(LogitsProcessor):
    """Scores (B, V) that leave only the token that `choose` gives."""

    def __init__(
        self, decoding: SamplingParams, count: int, model: Owl2ForConditionalGeneration
    ) -> None:
        self.params = [decoding] * count
        self.generators = [decoding.generator(number, model.device) for number in range(count)]
        self.dtype = model.dtype
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        tokens = sample(scores, self.params, self.generators)
        if None in tokens:
            raise non_finite_error(self.dtype, f"token {self.step} of the answer")
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def _ended(ids: list[int], ends: Collection[int]) -> list[int]:
    """Ids up to the first end token, and it."""
    place = next((place for place, id_ in enumerate(ids) if id_ in ends), len(ids))
    return ids[: place + 1]
