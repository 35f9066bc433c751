"""What the options of an answer change in the logits, before a token is chosen.

These are transformers' processors in the order of `generate`, and OpenAI's penalties and biases.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from owl2.engine.sampling_params import BATCHED, SamplingParams, changed_options
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration

# Options without a processor.
_NOT_PROCESSED = {
    *("max_new_tokens", "max_length", "seed", "n", "top_logprobs", "structured_outputs"),
    *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
}


def logits_processors(
    params: SamplingParams,
    model: Owl2ForConditionalGeneration,
    prompt_ids: Sequence[int],
    max_tokens: int,
    end_ids: Collection[int],
) -> LogitsProcessorList:
    """The processors of `generate` for one answer, with those of sampling.

    The list is empty if `sample` needs none: only options in `BATCHED` have an effect.

    Raises:
        ValueError: A value that transformers rejects.
    """
    values = changed_options(params)
    if not values.keys() - {"do_sample", *BATCHED, *_NOT_PROCESSED}:
        return LogitsProcessorList()
    config: Any = GenerationConfig()  # its arguments would be checked, with warnings
    for name, value in values.items():
        # The processors reject integers in place of floats.
        is_float = isinstance(getattr(SamplingParams, name), float)
        setattr(config, name, float(value) if is_float else value)
    config.max_length = len(prompt_ids) + max_tokens
    config._eos_token_tensor = torch.tensor([*end_ids], device=model.device) if end_ids else None
    ids: Any = torch.tensor([prompt_ids], device=model.device)
    device: Any = model.device
    own = LogitsProcessorList()
    if values.keys() & {"logit_bias", "presence_penalty", "frequency_penalty"}:
        own.append(_BiasAndPenalties(params, len(prompt_ids), model.config.vocab_size))
    # transformers inserts its argument before temperature and the other rules of sampling.
    return model._get_logits_processor(
        config, len(prompt_ids), encoder_input_ids=ids, device=device, logits_processor=own
    )


class _BiasAndPenalties(LogitsProcessor):
    """OpenAI's `logit_bias`, and its penalties on tokens after the first `num_prompt` ids."""

    def __init__(self, params: SamplingParams, num_prompt: int, vocab_size: int) -> None:
        self._params = params
        self._num_prompt = num_prompt
        self._biases = dict(params.logit_bias or {})
        for token in self._biases:
            if not (isinstance(token, int) and 0 <= token < vocab_size):
                raise ValueError(f"logit_bias has {token!r}; the model has {vocab_size} tokens")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._num_prompt :]  # (1, T)
        counts = torch.zeros_like(scores).scatter_add_(
            1, answer, torch.ones_like(answer, dtype=scores.dtype)
        )
        scores = scores - self._params.presence_penalty * (counts > 0)
        scores -= self._params.frequency_penalty * counts
        scores[:, list(self._biases)] += torch.tensor(
            list(self._biases.values()), dtype=scores.dtype, device=scores.device
        )
        return scores


def check_logits_processors(
    params: SamplingParams, model: Owl2ForConditionalGeneration, end_ids: Collection[int]
) -> None:
    """Run the processors once: an error in the engine's thread would end all requests.

    Raises:
        InputError: A value that a processor rejects, such as an id beyond the vocabulary.
    """
    try:
        if processors := logits_processors(params, model, [0], 1, end_ids):
            device, size = model.device, model.config.vocab_size
            ids: Any = torch.zeros(1, 1, dtype=torch.long, device=device)
            processors(ids, torch.zeros(1, size, device=device))
    except Exception as error:  # values of any type raise exceptions of any type
        raise InputError(
            f"The options of the generation are invalid: {error}", ErrorCode.INVALID_VALUE
        ) from error
