"""`generate` for prompts with images: padding, beams, caches, and scores by token id."""

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

from owl2.errors import ErrorCode, InputError
from owl2.model.image_inputs import count_images

# These index scores by the ids of the prompt. The image token has no score.
INDEXED_BY_PROMPT = (
    RepetitionPenaltyLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)


class MultimodalGenerationMixin(GenerationMixin):
    """`GenerationMixin` of transformers for a model whose prompts contain image tokens."""

    config: Any  # an Owl2Config

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for prompts padded on either side.

        New tokens are appended, so padding on the right would be between the prompt and the
        answer. Rows with such padding (by `attention_mask`) are converted to left padding first,
        and the result has left padding.
        """
        mask: Any = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", inputs)
        prompts = kwargs.get("inputs_embeds") if ids is None else ids
        # A mask that is longer than the prompts includes a filled cache, which cannot be moved.
        is_movable = mask is not None and prompts is not None and mask.shape == prompts.shape[:2]
        if is_movable and (mask[:, -1] == 0).any():
            rows = ("input_ids", "inputs_embeds", "mm_token_type_ids", "position_ids")
            for name in (*rows, "attention_mask"):
                if kwargs.get(name) is not None:
                    kwargs[name] = to_left_padding(kwargs[name], mask)
            inputs = None if inputs is None else to_left_padding(inputs, mask)
        generate = super().generate  # type: ignore[misc]  # no class fits the Protocol of its self
        return generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]  # passes other arguments through
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # transformers inspects this signature to find out whether inputs_embeds is accepted.
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]  # as in generate
        inputs: dict[str, Any] = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # transformers 5.16 does not cut the modalities of the sequence to a step's one token.
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
        """For beams and several answers, repeat the images of one prompt after another."""
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            counts, _ = count_images(self.config, input_ids, pixel_values)
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
        return LogitsProcessorList(
            PadImageTokenLogits(processor)
            if isinstance(processor, INDEXED_BY_PROMPT)
            else processor
            for processor in make(*args, **kwargs)
        )

    def _get_candidate_generator(
        self, generation_config: Any, input_ids: torch.LongTensor, *args: Any, **kwargs: Any
    ) -> Any:
        is_lookup = generation_config.prompt_lookup_num_tokens is not None
        if is_lookup and (input_ids == self.config.image_token_id).any():
            raise InputError(
                "prompt_lookup_num_tokens copies candidates from the prompt, which contains image "
                "tokens: omit it for prompts with images",
                ErrorCode.UNSUPPORTED,
            )
        make = super()._get_candidate_generator  # type: ignore[misc]  # as in generate
        return make(generation_config, input_ids, *args, **kwargs)


class PadImageTokenLogits(LogitsProcessor):
    """Adds a score of -infinity for the image token while `inner` runs; (B, V) in and out."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self.inner = inner

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        padded = F.pad(scores, (0, 1), value=float("-inf"))
        return self.inner(input_ids, padded)[:, :-1]


def to_left_padding(rows: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the padding at the end of every row (B, S, ...) to its beginning.

    Args:
        attention_mask: (B, S) of the given rows, 0 on padding.
    """
    length = attention_mask.shape[1]
    trailing = (attention_mask.flip(1).cumsum(1) == 0).sum(1)  # (B,)
    source = torch.arange(length, device=rows.device) - trailing[:, None].to(rows.device)  # (B, S)
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    return rows[batch, source % length]
