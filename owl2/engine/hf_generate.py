"""Generation by transformers' `generate`, for models whose weights are not all on one device.

Processes that share the weights of one model (FSDP2, ZeRO-3) have a part of each weight, so that
all of them must take every step together. Nothing is cached across calls, and nothing is streamed.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from owl2.engine.running_batch import PrefillOutput
from owl2.engine.scheduler import Request, sample_tokens
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.prepared_prompt import PreparedPrompt


def is_on_one_device(model: Owl2ForConditionalGeneration) -> bool:
    """Whether all weights are complete and on one device, as `EngineCore` needs them."""
    weights = list(model.parameters())
    # Only a DTensor, which has a part of a weight, has a device mesh.
    is_sharded = any(hasattr(weight, "device_mesh") for weight in weights)
    return not is_sharded and {weight.device for weight in weights} == {model.device}


@torch.no_grad()
def run_prefilled(
    model: Owl2ForConditionalGeneration,
    prompt: PreparedPrompt,
    function: Callable[[PrefillOutput], Any],
) -> Any:
    """As `EngineCore.run_prefilled`."""
    cache = DynamicCache(config=model.config)
    images: dict[str, Any] = {}
    if prompt.pixel_values is not None:
        images["pixel_values"] = prompt.pixel_values.to(model.device, model.dtype)
        images["image_grids"] = prompt.image_grids
    ids = torch.tensor([prompt.ids], device=model.device)  # (1, P)
    outputs = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **images
    )
    ntk_alpha = model.config.ntk_alpha(len(prompt.ids))
    result = function(PrefillOutput(outputs.logits[:, -1], cache, ntk_alpha))
    while isinstance(result, Generator):
        try:
            next(result)
        except StopIteration as end:
            result = end.value
    return result


def generate(
    model: Owl2ForConditionalGeneration, requests: Sequence[Request], synced_gpus: bool = False
) -> None:
    """Add the tokens of their answers to requests with the same `end_ids`.

    Args:
        synced_gpus: As in transformers: True where processes share the weights.

    Raises:
        InputError: Logits that are not finite.
    """
    prompts = [request.prompt.prepared for request in requests]
    end_ids = requests[0].end_ids
    width = max(len(prompt.ids) for prompt in prompts)
    pad_id = next(iter(end_ids), 0)
    rows = [[pad_id] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    images = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grids for prompt in prompts if prompt.image_grids is not None]
    config = GenerationConfig(
        max_new_tokens=max(request.max_tokens for request in requests),
        do_sample=False,  # `_Sampler` samples
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,  # after the end; not read
    )
    sampler = _Sampler(model, requests, pad_id)
    # transformers would merge the checkpoint's options. The requests have them.
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            pixel_values=torch.cat(images).to(model.device, model.dtype) if images else None,
            image_grids=torch.cat(grids).to(model.device) if grids else None,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=synced_gpus or None,
        )
    finally:
        model.generation_config = defaults


class _Sampler(LogitsProcessor):
    """Scores (B, V) that exclude all tokens but the sampled ones, which it adds to the requests.

    Args:
        pad_id: An end token, or 0 without one.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, requests: Sequence[Request], pad_id: int
    ) -> None:
        for request in requests:
            request.create_processors(model)
        self._requests = requests
        self._pad_id = pad_id
        self._dtype = model.dtype
        self._vocab_size = model.config.vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = [
            row
            for row, request in enumerate(self._requests)
            if not (request.aborted or request.is_finished)
        ]
        running = [self._requests[row] for row in rows]
        # Without the score of the image token, with which other random numbers would be drawn.
        tokens = sample_tokens(running, scores[rows, : self._vocab_size])
        chosen = [self._pad_id] * len(scores)  # ends the rows of finished requests
        for row, request, token in zip(rows, running, tokens, strict=True):
            if token is None:
                raise request.no_token_error(self._dtype)
            request.add_token(token)
            chosen[row] = token
        ids = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, ids, 0.0)
