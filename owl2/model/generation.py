"""`generate` for prompts with images: padding, beams, caches, and scores by token id."""

from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch.nn import functional as F
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from owl2.errors import ErrorCode, InputError
from owl2.model.image_inputs import (
    count_images,
    find_image_embeddings,
    prompt_ntk_alphas,
    repeat_images,
)

CHUNKS_WITH_IMAGES = Version("5.23")  # the first version of transformers that splits images

IMAGE_ARGUMENTS = (
    *("pixel_values", "image_grids"),
    *("mm_token_type_ids", "mm_encoder_outputs", "position_ids"),
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
        if self.config.has_dynamic_ntk and prompts is not None:
            alphas = prompt_ntk_alphas(self.config, prompts, mask)
            kwargs.setdefault("ntk_alphas", alphas)
        generate = super().generate  # type: ignore[misc]  # no class fits the Protocol of its self
        return generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]  # passes other arguments through
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # transformers inspects this signature to find out whether inputs_embeds is accepted.
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]  # as in generate
        inputs: dict[str, Any] = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # transformers 5.16 does not cut the modalities of the sequence to a step's one token, and
        # no version extends them to candidates.
        types, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
        if types is not None and ids is not None:
            types = F.pad(types, (0, max(0, input_ids.shape[1] - types.shape[1])))
            inputs["mm_token_type_ids"] = types[:, -ids.shape[1] :]
        # For the prompt of an assistant model, transformers drops the images.
        is_prompt = ids is not None and ids.shape[1] > 1 and inputs.get("pixel_values") is None
        if is_prompt and (ids == self.config.image_token_id).any():
            inputs |= {name: kwargs.get(name) for name in ("pixel_values", "image_grids")}
        return inputs

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        has_images = model_kwargs.get("pixel_values") is not None
        if generation_config.prefill_chunk_size is not None and has_images:
            if Version(transformers.__version__) < CHUNKS_WITH_IMAGES:
                raise InputError(
                    f"prefill_chunk_size with images requires transformers {CHUNKS_WITH_IMAGES}",
                    ErrorCode.UNSUPPORTED,
                )
            encode = super()._prepare_multimodal_encoder_kwargs_for_generation  # type: ignore[misc]  # as in generate
            model_kwargs = encode(model_kwargs)
        prefill = super()._prefill  # type: ignore[misc]  # as in generate
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """For beams and several answers, repeat the images of one prompt after another."""
        pixel_values, grids = model_kwargs.get("pixel_values"), None
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            embeds, ids = model_kwargs.get("inputs_embeds"), cast(torch.Tensor, input_ids)
            if embeds is not None:
                ids = find_image_embeddings(self.config, embeds)
            model_kwargs.pop("pixel_values")
            grids = model_kwargs.pop("image_grids", None)
            counts, _ = count_images(self.config, ids, pixel_values if grids is None else grids)
            pixel_values, grids = repeat_images(counts, expand_size, pixel_values, grids)
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]  # as in generate
        expanded_ids, model_kwargs = expand(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        if grids is not None:
            model_kwargs["image_grids"] = grids
        return expanded_ids, model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        make = super()._get_logits_processor  # type: ignore[misc]  # as in generate
        processors: LogitsProcessorList = make(*args, **kwargs)
        image_token_id = self.config.image_token_id
        if image_token_id >= self.config.vocab_size:
            return ImageTokenScores(processors, image_token_id)
        processors.insert(0, SuppressTokensLogitsProcessor([image_token_id]))
        return processors

    def _get_candidate_generator(  # type: ignore[override]  # passes other arguments through
        self,
        generation_config: Any,
        input_ids: torch.LongTensor,
        inputs_tensor: torch.Tensor,
        logits_processor: LogitsProcessorList,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        is_image = input_ids == self.config.image_token_id  # (B, S)
        own_id = getattr(getattr(assistant_model, "config", None), "image_token_id", None)
        hides_images = assistant_model is not None and own_id != self.config.image_token_id
        if hides_images:  # a language model, for which image positions are padding
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in IMAGE_ARGUMENTS}
            model_kwargs["attention_mask"] = mask.masked_fill(is_image, 0)
        make = super()._get_candidate_generator  # type: ignore[misc]  # as in generate
        generator: Any = make(
            generation_config,
            input_ids,
            inputs_tensor,
            logits_processor,
            model_kwargs,
            assistant_model,
            **kwargs,
        )
        if getattr(generator, "vocab_size", None) is not None:  # candidates from the prompt
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
        if hides_images:
            get_candidates = generator.get_candidates

            def get_text_candidates(ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
                text = ids.masked_fill(ids == self.config.image_token_id, 0)
                candidates, logits = get_candidates(text, **options)
                return torch.cat([ids, candidates[:, ids.shape[1] :]], 1), logits

            generator.get_candidates = get_text_candidates
        return generator


class ImageTokenScores(LogitsProcessorList):
    """Processors that see a score of -infinity for an image token without a row in `lm_head`.

    They use the ids of prompts, and of options such as `bad_words_ids`, to index the scores (B, V).
    """

    def __init__(self, processors: LogitsProcessorList, image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        size = scores.shape[-1]
        processors = list(self)
        if processors and isinstance(processors[0], UnbatchedClassifierFreeGuidanceLogitsProcessor):
            scores = processors.pop(0)(input_ids, scores)  # combines them with the model's scores
        if processors or self.image_token_id < size:  # prompt lookup has larger scores
            missing = max(0, self.image_token_id + 1 - size)
            scores = F.pad(scores, (0, missing), value=float("-inf"))
            scores[:, self.image_token_id] = float("-inf")
            scores = LogitsProcessorList(processors)(input_ids, scores, **kwargs)[:, :size]
        return scores


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
