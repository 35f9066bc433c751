"""mPLUG-Owl2: vision encoder, visual abstractor and a LLaMA decoder with MAM in one model.

    pixel_values (N, 3, H, W) ──► vision_model ──► visual_abstractor (N, K+1, D) ─┐ scatter
    input_ids (B, S) ──► embed_tokens (B, S, D) ──────────────────────────────────┴─► (B, S, D)
    ──► LLaMA layers, routed by modality ──► norm ──► lm_head (B, S, vocabulary)

Shapes: B sequences of S positions, N images in the batch, K learnable queries, D width.
`input_ids` already contain K + 1 times `config.image_token_id` for every image. The model never
changes the length of a sequence.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.llama.modeling_llama import (
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.model.generation import MultimodalGenerationMixin
from owl2.model.image_inputs import (
    TokenEmbedding,
    check_embeddings,
    count_images,
    default_ntk_alphas,
    find_image_embeddings,
)
from owl2.model.loss import (
    chunked_cross_entropy,
    labeled_positions,
    next_token_labels,
    next_token_loss,
)
from owl2.model.modality import TEXT, Multiway, Routing
from owl2.model.pretrained import Owl2PreTrainedModel
from owl2.model.registry import get_model_type


class Owl2Model(Owl2PreTrainedModel, LlamaModel):
    """The model without `lm_head`: a LLaMA model whose input may contain images.

    Attributes:
        run_all_branches: Use all weights also for a batch without images, without changing its
            result: a blank image is encoded and multiplied by 0. Sharded training needs this,
            because processes wait for each other at each weight and a process that skips one would
            block the others.
    """

    run_all_branches = False
    # A checkpoint with `lm_head` contains this model.
    _keys_to_ignore_on_load_unexpected = [
        *Owl2PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
    ]

    def __init__(self, config: Owl2Config) -> None:
        Owl2PreTrainedModel.__init__(self, config)
        parts, visual = get_model_type(config.registry_key), config.visual_config
        make_layer = parts.load("decoder_layer")
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = TokenEmbedding(config)
        self.layers = nn.ModuleList(make_layer(config, i) for i in range(config.num_hidden_layers))
        # accelerate rejects names of classes that the model does not contain.
        self._no_split_modules = [*self._no_split_modules, type(self.layers[0]).__name__]
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.vision_model = parts.load("vision_encoder")(visual.visual_model)
        self.visual_abstractor = parts.load("connector")(visual.connector, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()
        # Not in _init_weights: transformers calls that only for modules with parameters.
        for module in self.modules():
            if isinstance(module, Multiway):
                module.copy_text_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_grids: torch.Tensor | None = None,
        ntk_alphas: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `Owl2ForConditionalGeneration.forward`. Returns hidden states after the norm.

        Args:
            mm_encoder_outputs: ``{"image": ...}`` from `get_image_features` instead of
                `pixel_values`. Only the positions of some image tokens may be in `input_ids`, with
                their rows of ``pooler_output``: chunked prefill splits images.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError(
                "pass either input_ids or inputs_embeds, not both", ErrorCode.INVALID_VALUE
            )
        num_visual = None
        if input_ids is not None:
            encoded = (mm_encoder_outputs or {}).get("image")
            images = None if encoded is None else encoded.pooler_output
            inputs_embeds, mm_token_type_ids, num_visual = self._embed_inputs(
                input_ids, pixel_values, mm_token_type_ids, images, image_grids
            )
        elif inputs_embeds is not None and pixel_values is not None:
            ids = find_image_embeddings(self.config, inputs_embeds)
            merged, mm_token_type_ids, num_visual = self._embed_inputs(
                ids, pixel_values, None, image_grids=image_grids
            )
            is_image = ids == self.config.image_token_id
            inputs_embeds = torch.where(is_image[..., None], merged, inputs_embeds)
        elif inputs_embeds is not None:
            if mm_token_type_ids is not None:
                # PEFT inserts embeddings of a trained prompt before the others.
                inserted = inputs_embeds.shape[1] - mm_token_type_ids.shape[1]
                mm_token_type_ids = functional.pad(mm_token_type_ids, (inserted, 0), value=TEXT)
            if inputs_embeds.shape[1] > 1 and not is_tracing(inputs_embeds):
                num_visual = check_embeddings(inputs_embeds, mm_token_type_ids)
        if self.config.use_mam and mm_token_type_ids is not None:
            layers: Any = () if is_tracing(mm_token_type_ids) else self.layers
            masked = any(layer.requires_sequences() for layer in layers)
            always = self.run_all_branches
            kwargs["routing"] = Routing.of(mm_token_type_ids, num_visual, always, masked)
        if self.config.has_dynamic_ntk and not self.training:
            if ntk_alphas is None and inputs_embeds is not None:
                ntk_alphas = default_ntk_alphas(self.config, inputs_embeds, **kwargs)
            kwargs["ntk_alphas"] = ntk_alphas
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    @capture_outputs
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images as embeddings of the language model.

        Args:
            pixel_values: (N, 3, H, W), normalized.
            image_grids: For models whose images are several crops, see `forward`.

        Returns:
            ``.pooler_output`` (N, K+1, D): the embeddings that are inserted into the sequence;
            ``.last_hidden_state`` (N, 1+P, width): the vision encoder's features, CLS first; with
            ``output_hidden_states`` and ``output_attentions`` (eager) those of its layers.
        """
        features = self.vision_model(pixel_values)  # (N, 1+P, width)
        grids = () if image_grids is None else (image_grids,)
        embeddings = self.visual_abstractor(features, *grids)  # (N, K+1, D)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=embeddings)

    def embed(
        self, input_ids: torch.Tensor, image_embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of a sequence of text and images, for `forward` as ``inputs_embeds``.

        Args:
            input_ids: (B, S), with K + 1 image tokens for every image.
            image_embeddings: (N, K+1, D) from `get_image_features`, in order of appearance.

        Returns:
            (B, S, D): token embeddings, and image embeddings at the image tokens.

        Raises:
            InputError: The numbers of image tokens and images do not fit, or an id is outside the
                vocabulary.
        """
        count_images(self.config, input_ids, image_embeddings)
        return self._merge_image_features(input_ids, image_embeddings)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """The image tokens in `input_ids` (B, S), or in `inputs_embeds`, as a mask (B, S, 1).

        Raises:
            InputError: The numbers of image tokens and images do not fit.
        """
        if input_ids is None:
            input_ids = find_image_embeddings(self.config, inputs_embeds)
        count_images(self.config, input_ids, image_features)
        return (input_ids == self.config.image_token_id)[..., None].to(inputs_embeds.device)

    def _embed_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        token_types: torch.Tensor | None,
        images: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, int | None]:
        """Embeddings (B, S, D), modalities (B, S), and the number of visual positions.

        `images` are embeddings (..., D) for all image tokens, in place of `pixel_values`.

        The last two are None in a decode step, which cannot contain an image. It needs no check,
        and a check would synchronize with the GPU.
        """
        has_images = pixel_values is not None or images is not None
        if input_ids.shape[1] == 1 and not has_images and not self.run_all_branches:
            try:
                return self.embed_tokens(input_ids), None, None
            except IndexError:  # an id outside the vocabulary; the check names it
                count_images(self.config, input_ids, None)
                raise
        num_visual = None
        if is_tracing(input_ids):  # without the checks, which read values
            if not has_images and token_types is None and not self.run_all_branches:
                return self.embed_tokens(input_ids), None, None
        elif images is not None:
            rows = images.flatten(0, -2)
            _, num_visual = count_images(self.config, input_ids, rows, token_types, per_image=1)
        else:
            one_per_image = pixel_values if image_grids is None else image_grids
            _, num_visual = count_images(self.config, input_ids, one_per_image, token_types)
        if pixel_values is not None and pixel_values.shape[0]:
            images = self.get_image_features(pixel_values, image_grids).pooler_output
        if token_types is None:
            token_types = input_ids == self.config.image_token_id
        return self._merge_image_features(input_ids, images), token_types, num_visual

    def _merge_image_features(
        self, input_ids: torch.Tensor, images: torch.Tensor | None
    ) -> torch.Tensor:
        is_image = input_ids == self.config.image_token_id  # (B, S)
        blank: Any = None
        if self.run_all_branches and (images is None or not len(images)):
            # Before the text embeddings, like images: all processes use weights in one order.
            size, has_grids = self.config.image_size, self.config.visual_config.has_image_grids
            grids = input_ids.new_ones(1, 2) if has_grids else None
            pixels = input_ids.new_zeros(1 + has_grids, 3, size, size).float()
            blank = self.get_image_features(pixels, grids)
        # Id 0 replaces the image token, which may have no row, and is overwritten. `TokenEmbedding`
        # accepts it, but adapters of embeddings index their own rows.
        embeddings = self.embed_tokens(input_ids.masked_fill(is_image, 0))  # (B, S, D)
        if blank is not None:
            return embeddings + 0 * blank.pooler_output.mean().to(embeddings)
        if images is None:
            return embeddings
        return embeddings.masked_scatter(is_image[..., None], images.to(embeddings))

    def set_image_size(self, image_size: int) -> None:
        """Change the input resolution to `image_size` x `image_size` pixels (Specification §2).

        Learned position embeddings are resized bicubically; computed ones are recomputed.

        Raises:
            InputError: `image_size` is not a positive multiple of the patch size.
        """
        patch = self.config.visual_config.visual_model.patch_size
        if image_size <= 0 or image_size % patch:
            raise InputError(
                f"image_size ({image_size}) must be a multiple of the patch size ({patch})",
                ErrorCode.INVALID_VALUE,
            )
        if image_size != self.config.image_size:
            self.vision_model.set_image_size(image_size)
            self.visual_abstractor.set_grid_size(image_size // patch)


class Owl2ForConditionalGeneration(MultimodalGenerationMixin, Owl2PreTrainedModel, GenerationMixin):
    """mPLUG-Owl2 with its language-model head, for generation and training."""

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
        image_grids: torch.Tensor | None = None,
        ntk_alphas: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given.

        Args:
            input_ids: (B, S), with K + 1 image tokens for every image.
            pixel_values: (N, 3, H, W), all images of the batch in order of appearance.
            attention_mask: (B, S), 0 on padding on either side.
            position_ids: (B, S). Default: counted from 0 over text and images.
            past_key_values: Any cache of transformers.
            inputs_embeds: (B, S, D) instead of `input_ids`: with `pixel_values` as
                `get_input_embeddings` gives them, or with images already inserted.
            mm_token_type_ids: (B, S), 0 text, 1 visual. Default: derived from `input_ids`.
            image_grids: (G, 2), for models whose images are several crops (DocOwl2): the rows and
                columns of the crops of each image. `pixel_values` then contain the whole image and
                its crops for each of the G images.
            ntk_alphas: (B,) `config.ntk_alpha` of the length of each prompt, for models with
                dynamic NTK scaling and a filled cache. Default: derived from the inputs.
            labels: (B, S), -100 for positions without a loss. Image tokens have none. With
                `logits_to_keep`, of all positions or of those; see `next_token_labels`.
            shift_labels: (B, S), the label of each position's next token, instead of `labels`: for
                sequences that are split across processes.
            logits_to_keep: Compute logits of the last N positions only (0: all), or of a tensor of
                indices.
            num_items_in_batch: Divide the summed loss by this instead of by this batch's number of
                labels.
            return_logits: False for training: `.logits` is None, and the loss is computed at
                labeled positions only, in chunks, so that the full logits never exist.

        Returns:
            ``.loss``, ``.logits`` (B, S, vocabulary), ``.past_key_values``, and on request
            ``.hidden_states`` and ``.attentions`` (eager only).

        Raises:
            InputError: The numbers of image tokens and images do not fit, images have another
                size, an id is outside the vocabulary, or labels do not fit `logits_to_keep`.
        """
        last = isinstance(logits_to_keep, int)
        keep: Any = slice(-logits_to_keep, None) if last else logits_to_keep
        if labels is not None or shift_labels is not None:
            sequence: Any = inputs_embeds if input_ids is None else input_ids
            image_token_id = self.config.image_token_id
            shift_labels = next_token_labels(labels, shift_labels, sequence, keep, image_token_id)
        # Before the decoder runs, while a GPU has no queued work: this synchronizes with it.
        labeled = None
        if shift_labels is not None and not return_logits:
            labeled = labeled_positions(shift_labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            image_grids=image_grids,
            ntk_alphas=ntk_alphas,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, D)
        logits = loss = None
        kept = hidden_states[:, keep]
        if return_logits:
            # As a matrix: `linear` may copy the complete weight for a slice with three dimensions.
            logits = self.lm_head(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
            if shift_labels is not None:
                loss = next_token_loss(logits, shift_labels, num_items_in_batch)
        elif labeled is not None:
            loss = chunked_cross_entropy(self.lm_head, kept, *labeled, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `Owl2Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    def set_image_size(self, image_size: int) -> None:
        """See `Owl2Model.set_image_size`."""
        self.model.set_image_size(image_size)
