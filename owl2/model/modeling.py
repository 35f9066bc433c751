"""mPLUG-Owl2: vision encoder, visual abstractor and a LLaMA decoder with MAM as one model.

    pixel_values (N, 3, H, W) ──► vision_model ──► visual_abstractor (N, K+1, D) ─┐ scatter
    input_ids (B, S) ──► embed_tokens (B, S, D) ──────────────────────────────────┴─► (B, S, D)
    ──► LLaMA layers, routed by modality ──► norm ──► lm_head (B, S, vocabulary)

Shapes: B sequences of S positions, N images in the whole batch, K learnable queries, D width.
`input_ids` already hold K + 1 times `config.image_token_id` for every image; the length of a
sequence never changes inside the model.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from owl2.checkpoints.load import CheckpointMixin
from owl2.errors import InputError
from owl2.model.abstractor import AbstractorAttention, VisualAbstractor
from owl2.model.configuration import Owl2Config
from owl2.model.decoder import Owl2DecoderLayer
from owl2.model.generation import MultimodalGenerationMixin
from owl2.model.image_inputs import TokenCounts, images_per_sequence
from owl2.model.loss import chunked_cross_entropy, labeled_positions, next_token_loss
from owl2.model.modality import Multiway, Routing
from owl2.model.vision import VisionEmbeddings, VisionModel


class Owl2PreTrainedModel(CheckpointMixin, LlamaPreTrainedModel):
    """Initialisation and what transformers needs to know; loading is in `CheckpointMixin`."""

    config_class = Owl2Config
    config: Owl2Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionLayer", "AbstractorLayer"]  # and the decoder's, of either kind

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, for all three parts: 5.16 does not look into nested configurations."""
        super().set_attn_implementation(*args, **kwargs)
        self.config.visual_config._attn_implementation = self.config._attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionEmbeddings):
            init.normal_(module.cls_token, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, VisualAbstractor):
            init.normal_(module.query_embeds, std=std)
            init.normal_(module.vit_eos, std=std)
        elif isinstance(module, AbstractorAttention):
            query_codes, key_codes = module.position_codes()
            init.copy_(module.q_pos_embed, query_codes)
            init.copy_(module.k_pos_embed, key_codes)


class Owl2Model(Owl2PreTrainedModel, LlamaModel):
    """Everything but `lm_head`: LLaMA's model whose input may hold images.

    Attributes:
        run_all_branches: let a batch without images pass through all weights, too, without
            changing its result: a blank image times 0, and MAM routed to no visual token.
            Processes that share out a model's weights or gradients wait for each other at each
            weight, so one that skips some hangs the others (USERS 7).
    """

    run_all_branches = False

    def __init__(self, config: Owl2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        # One attention implementation for all three parts, also when none was asked for.
        config.visual_config._attn_implementation = config._attn_implementation
        layer = Owl2DecoderLayer if config.use_mam else LlamaDecoderLayer
        # Only what is there: accelerate refuses to shard by the name of a class that is not.
        self._no_split_modules = [*self._no_split_modules, layer.__name__]
        visual = config.visual_config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.vision_model = VisionModel(visual.visual_model)
        self.visual_abstractor = VisualAbstractor(visual.visual_abstractor, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()
        # Not in _init_weights: transformers asks that of modules with weights of their own only.
        for module in self.modules():
            if isinstance(module, Multiway):
                module.copy_text_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `Owl2ForConditionalGeneration.forward`; returns hidden states after the norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        visual: int | None = None  # how many positions are
        if input_ids is None:
            if pixel_values is not None:
                raise InputError("pixel_values need input_ids, which say where the images go")
        elif input_ids.shape[1] == 1 and pixel_values is None and not self.run_all_branches:
            # A step of `generate`: no image has room in it, so nothing has to be looked at.
            inputs_embeds, mm_token_type_ids = self._embed_words(input_ids), None
        else:
            visual = self._check(input_ids, pixel_values, mm_token_type_ids)
            is_image = input_ids == self.config.image_token_id  # (B, S)
            inputs_embeds = self._put_together(input_ids, is_image, self._encode(pixel_values))
            mm_token_type_ids = is_image if mm_token_type_ids is None else mm_token_type_ids
        if self.config.use_mam and mm_token_type_ids is not None:
            kwargs["routing"] = Routing.of(mm_token_type_ids, visual, always=self.run_all_branches)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Images to embeddings of the language model.

        Args:
            pixel_values: (N, 3, H, W), normalised.

        Returns:
            ``.pooler_output`` (N, K+1, D): what stands in the sequence;
            ``.last_hidden_state`` (N, 1+P, width): the vision encoder's features, CLS first.
        """
        features = self.vision_model(pixel_values)  # (N, 1+P, width)
        embeddings = self.visual_abstractor(features)  # (N, K+1, D)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=embeddings)

    def embed(
        self, input_ids: torch.Tensor, image_embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A mixed sequence of embeddings, for `forward` as ``inputs_embeds``.

        Args:
            input_ids: (B, S), with K + 1 image tokens for every image.
            image_embeddings: (N, K+1, D) from `get_image_features`, in order of appearance.

        Returns:
            (B, S, D): words' embeddings, and the images' where the image tokens stand.

        Raises:
            InputError: image tokens and images do not fit, with both counts; ids that the
                vocabulary does not have.
        """
        self._check(input_ids, image_embeddings)
        is_image = input_ids == self.config.image_token_id  # (B, S)
        return self._put_together(input_ids, is_image, image_embeddings)

    def _check(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None,
        token_types: torch.Tensor | None = None,
    ) -> int:
        """Whether ids and images fit; returns how many positions are visual."""
        contents = TokenCounts.of(input_ids, self.config.image_token_id, token_types)
        images_per_sequence(contents.image_tokens, images, self.config.num_image_tokens)
        return contents.visual

    def _embed_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError:  # an id that is no word's: say which, and why
            self._check(input_ids, None)
            raise

    def _put_together(
        self, input_ids: torch.Tensor, is_image: torch.Tensor, images: torch.Tensor | None
    ) -> torch.Tensor:
        some = images is not None and len(images) > 0
        blank: Any = None
        if not some and self.run_all_branches:
            # Before the words, as images are: all processes must ask for weights in one order.
            size = self.config.image_size
            blank = self.get_image_features(input_ids.new_zeros(1, 3, size, size).float())
        # The image token has no row in the embedding; any id does, its row is overwritten.
        words = self.embed_tokens(input_ids.masked_fill(is_image, 0))  # (B, S, D)
        if images is not None and some:
            return words.masked_scatter(is_image[..., None], images.to(words))
        return words if blank is None else words + 0 * blank.pooler_output.mean().to(words)

    def _encode(self, pixel_values: torch.Tensor | None) -> torch.Tensor | None:
        if pixel_values is None or not len(pixel_values):
            return None
        return self.get_image_features(pixel_values).pooler_output

    def set_image_size(self, image_size: int) -> None:
        """Take images of `image_size` x `image_size` pixels from now on (SPEC 2, resolution).

        Learned positions are resized bicubically, computed ones computed anew.

        Raises:
            InputError: if `image_size` is not a positive multiple of the patch size.
        """
        patch = self.config.visual_config.visual_model.patch_size
        if image_size <= 0 or image_size % patch:
            raise InputError(f"image_size ({image_size}) must be a multiple of the patch ({patch})")
        if image_size != self.config.image_size:
            self.vision_model.set_image_size(image_size)
            self.visual_abstractor.set_grid_size(image_size // patch)


class Owl2ForConditionalGeneration(MultimodalGenerationMixin, Owl2PreTrainedModel, GenerationMixin):
    """mPLUG-Owl2 with its language-model head: ask, generate, train."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Owl2Config) -> None:
        super().__init__(config)
        self.model = Owl2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: (B, S), with K + 1 image tokens for every image.
            pixel_values: (N, 3, H, W), all images of the batch in order of appearance.
            attention_mask: (B, S), 0 on padding, either side.
            position_ids: (B, S); counted from 0 over the mixed sequence where absent.
            past_key_values: any of transformers' caches.
            inputs_embeds: (B, S, D) instead of `input_ids`, images already in it.
            mm_token_type_ids: (B, S), 0 text, 1 visual; derived from `input_ids` where absent.
            labels: (B, S), -100 where there is no loss.
            logits_to_keep: compute the last so many positions only (0: all), or these indices.
            num_items_in_batch: divide the summed loss by this instead of by this batch's labels.
            return_logits: False to train: `.logits` is None, and the loss is computed at labelled
                positions only, in chunks, so that the logits are never there at once.

        Returns:
            ``.loss``, ``.logits`` (B, S, vocabulary), ``.past_key_values``, and on request
            ``.hidden_states`` and ``.attentions`` (eager only).

        Raises:
            InputError: image tokens and images do not fit, or images of another size; ids that
                the vocabulary does not have; labels beside `logits_to_keep`.
        """
        all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not all_logits:
            raise InputError("labels need the logits of all positions: leave logits_to_keep at 0")
        # Before the decoder: it waits for a GPU, which has nothing to do as yet.
        labelled = None if labels is None or return_logits else labeled_positions(labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, D)
        logits = loss = None
        if return_logits:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            kept = hidden_states[:, keep]
            # As a matrix: `linear` may copy the whole weight for a slice with three dimensions.
            logits = self.lm_head(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
            if labels is not None:
                loss = next_token_loss(logits, labels, num_items_in_batch)
        elif labelled is not None:
            loss = chunked_cross_entropy(self.lm_head, hidden_states, *labelled, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:
        """See `Owl2Model.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def set_image_size(self, image_size: int) -> None:
        """See `Owl2Model.set_image_size`."""
        self.model.set_image_size(image_size)


AutoModelForCausalLM.register(Owl2Config, Owl2ForConditionalGeneration)
AutoModelForImageTextToText.register(Owl2Config, Owl2ForConditionalGeneration)
