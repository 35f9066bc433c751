"""`generate` with images in the prompt: padding, beams, caches, and scores by token id."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from owl2.errors import InputError
from owl2.model.image_inputs import TokenCounts, images_per_sequence

# They look up scores by the ids of the prompt, and the image token has none.
LOOK_UP_IDS = (
    RepetitionPenaltyLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)


class MultimodalGenerationMixin(GenerationMixin):
    """transformers' generation for a model whose prompts hold image tokens."""

    config: Any  # of an mPLUG-Owl2

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, for prompts padded on either side.

        New tokens are written behind a prompt, so padding there would stand between the two: such
        rows (by `attention_mask`) are first turned to left padding, and come back so.
        """
        mask: Any = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", inputs)
        prompts = kwargs.get("inputs_embeds") if ids is None else ids
        # A mask longer than the prompts speaks of a filled cache, which cannot be turned.
        whole = mask is not None and prompts is not None and mask.shape == prompts.shape[:2]
        if whole and (mask[:, -1] == 0).any():
            rows = ("input_ids", "inputs_embeds", "mm_token_type_ids", "position_ids")
            for name in (*rows, "attention_mask"):
                if kwargs.get(name) is not None:
                    kwargs[name] = to_left_padding(kwargs[name], mask)
            inputs = None if inputs is None else to_left_padding(inputs, mask)
        generate = super().generate  # type: ignore[misc]  # no class fits the Protocol of its self
        return generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]  # hands on what it does not name
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # inputs_embeds is named as transformers looks at the signature: whether they may be given.
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]  # as in generate
        inputs: dict[str, Any] = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # transformers 5.16 leaves the modalities of the whole sequence beside a step's one token.
        types, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
        if types is not None and ids is not None:
            inputs["mm_token_type_ids"] = types[:, -ids.shape[1] :]
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Beams and several answers: images are repeated a prompt at a time, in their order."""
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            image_tokens = TokenCounts.of(input_ids, self.config.image_token_id).image_tokens
            counts = images_per_sequence(image_tokens, pixel_values, self.config.num_image_tokens)
            model_kwargs.pop("pixel_values")
            repeated = [part for part in pixel_values.split(counts) for _ in range(expand_size)]
            pixel_values = torch.cat(repeated)
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]  # as in generate
        expanded_ids, model_kwargs = expand(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return expanded_ids, model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        make = super()._get_logits_processor  # type: ignore[misc]  # as in generate
        processors = make(*args, **kwargs)
        return LogitsProcessorList(
            PadImageTokenLogits(processor) if isinstance(processor, LOOK_UP_IDS) else processor
            for processor in processors
        )

    def _get_candidate_generator(
        self, generation_config: Any, input_ids: torch.LongTensor, *args: Any, **kwargs: Any
    ) -> Any:
        looked_up = generation_config.prompt_lookup_num_tokens is not None
        if looked_up and (input_ids == self.config.image_token_id).any():
            raise InputError(
                "prompt_lookup_num_tokens guesses that the answer repeats the prompt, image tokens "
                "too: leave it out where the prompt holds an image"
            )
        make = super()._get_candidate_generator  # type: ignore[misc]  # as in generate
        return make(generation_config, input_ids, *args, **kwargs)


class PadImageTokenLogits(LogitsProcessor):
    """Lends the image token a score, -infinity, while `inner` works; (B, V) in and out."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self.inner = inner

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wider = F.pad(scores, (0, 1), value=float("-inf"))
        return self.inner(input_ids, wider)[:, :-1]


def to_left_padding(rows: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Turn every row (B, S, ...) so that the padding at its end stands at its beginning.

    Args:
        attention_mask: (B, S) of the rows as they are, 0 on padding.
    """
    length = attention_mask.shape[1]
    trailing = (attention_mask.flip(1).cumsum(1) == 0).sum(1)  # (B,)
    places = torch.arange(length, device=rows.device) - trailing[:, None].to(rows.device)  # (B, S)
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    return rows[batch, places % length]
