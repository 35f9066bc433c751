"""The baseline: a straightforward implementation of mPLUG-Owl2 over the weights of a model.

Only the benchmark uses it. Each layer gathers the tokens of each modality and scatters the results;
attention is two matrix products with a float32 softmax and a full mask; the KV cache grows by
concatenation; requests are processed one by one; training pads and computes all logits.
"""

from typing import Any, NamedTuple

import torch
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from owl2.model.modality import ModalitySplit
from owl2.model.modeling import Owl2ForConditionalGeneration, Owl2Model
from owl2.model.variants import clone_sharing_weights


class GatherScatter(NamedTuple):
    """Selects the tokens of a modality by a mask, in place of `owl2.model.modality.Routing`.

    Attributes:
        is_image: (B, S).
    """

    is_image: torch.Tensor

    def split(self, hidden_states: torch.Tensor) -> ModalitySplit:
        """(B, S, D) to the text tokens (T, D) and the visual tokens (V, D)."""
        return hidden_states[~self.is_image], hidden_states[self.is_image]

    def join(self, parts: ModalitySplit, batch_size: int) -> torch.Tensor:
        """Inverse of `split`."""
        text, visual = parts
        joined = text.new_empty(batch_size, self.is_image.shape[1], text.shape[-1])
        joined[~self.is_image] = text
        joined[self.is_image] = visual
        return joined


class BaselineModel(Owl2Model):
    """The model without `lm_head`, with `GatherScatter` for inputs with images."""

    def forward(  # type: ignore[override]  # no inputs_embeds
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        images = None
        is_image = input_ids == self.config.image_token_id
        if pixel_values is not None:
            images = self.get_image_features(pixel_values).pooler_output
            if self.config.use_mam:
                kwargs["routing"] = GatherScatter(is_image)
        kwargs |= {"inputs_embeds": self.embed(input_ids, images), "mm_token_type_ids": None}
        return LlamaModel.forward(self, **kwargs)


def as_baseline(model: Owl2ForConditionalGeneration) -> Owl2ForConditionalGeneration:
    """The baseline with the weights of `model`, which both share."""
    baseline = clone_sharing_weights(model)
    for config in (baseline.config, baseline.config.visual_config):
        config._attn_implementation = "eager"
    baseline.model.__class__ = BaselineModel  # the same modules with another forward
    return baseline
