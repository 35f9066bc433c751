"""mPLUG-Owl2 as a vLLM model: the vision encoder and abstractor of owl2, vLLM's LLaMA with MAM.

    pixel_values (N, 3, H, W) ──► vision_model ──► visual_abstractor (N, K+1, D) ─┐ cached by vLLM
    scheduled ids (T,) ──► embed_tokens (T, D) ───────────────────────────────────┴─► (T, D)
    ──► vLLM's LLaMA layers with `VisualTokens` ──► norm ──► lm_head (T, vocabulary)

Shapes: N images to encode in this step, T scheduled tokens of all requests, D width.

In each step vLLM passes the positions of visual tokens to `embed_input_ids`. They are therefore
correct for chunks of prompts, for cached prefixes and for new tokens, which are text. The token ids
do not contain this information.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from owl2.model.abstractor import AbstractorAttention, VisualAbstractor
from owl2.model.vision import VisionModel, resize_positions
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.vllm_plugin.decoder import MAM_NAMES, Owl2LlamaForCausalLM, VisualTokens
from owl2.vllm_plugin.processing import Owl2DummyInputs, Owl2MultiModalProcessor, Owl2ProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(
    Owl2MultiModalProcessor, info=Owl2ProcessingInfo, dummy_inputs=Owl2DummyInputs
)
class VllmOwl2ForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA):
    """A checkpoint in the released layout. Every process has the complete visual modules."""

    # The fused modules, for vLLM features that use the names of their parts.
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "visual_kv_proj": ["visual_k_proj", "visual_v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr=MAM_NAMES,
        orig_to_new_prefix={
            "model.vision_model.": "vision_model.",
            "model.visual_abstractor.": "visual_abstractor.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        },
    )

    # Methods of SupportsMultiModal, which has no type annotations.
    _mark_tower_model: Any
    _mark_language_model: Any

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """The placeholder of an image in a prompt."""
        if modality != "image":
            raise ValueError(f"unsupported modality {modality!r}: mPLUG-Owl2 supports images")
        return IMAGE_TOKEN

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self._has_lora = vllm_config.lora_config is not None
        visual = config.visual_config
        # vLLM does not set it; the default of transformers materializes the attention scores.
        visual._attn_implementation = "sdpa"
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_model: nn.Module = VisionModel(visual.visual_model)
            self.visual_abstractor: nn.Module = VisualAbstractor(
                visual.visual_abstractor, config.hidden_size
            )
        with self._mark_language_model(vllm_config):
            self.language_model = Owl2LlamaForCausalLM(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._compute_position_codes()
        # A buffer with a fixed address, as CUDA graphs need.
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        mask = torch.zeros(tokens, 1, dtype=torch.bool)
        self.visual_mask: torch.Tensor
        self.register_buffer("visual_mask", mask, persistent=False)
        self._visual_rows: torch.Tensor | None = None

    @torch.no_grad()
    def _compute_position_codes(self) -> None:
        """Compute the position codes of the abstractor, which a checkpoint may omit."""
        for module in self.visual_abstractor.modules():
            if isinstance(module, AbstractorAttention):
                module.init_parameters()

    # -------------------------------------------------------------- a step

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """`pixel_values` (N, 3, H, W) to (N, K+1, D); nothing without them."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self.visual_abstractor(self.vision_model(pixel_values))

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T,) to (T, D), with the embeddings of images at their positions.

        vLLM calls this in each step before `forward`, with the image tokens of the step.
        """
        mask = self.visual_mask[: len(input_ids), 0]
        if is_multimodal is None or not multimodal_embeddings:
            mask.fill_(False)
            self._visual_rows = None
        else:
            mask.copy_(is_multimodal)
            self._visual_rows = is_multimodal.nonzero()[:, 0].to(mask.device)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def _visual_tokens(self, inputs_embeds: torch.Tensor | None) -> VisualTokens | None:
        """The visual tokens of the step that `embed_input_ids` prepared."""
        rows, self._visual_rows = self._visual_rows, None
        if inputs_embeds is None or not self.config.use_mam:  # None: images are disabled in vLLM
            return None
        mask = self.visual_mask[: len(inputs_embeds)]
        if inputs_embeds.is_cuda and torch.cuda.is_current_stream_capturing():
            return VisualTokens(mask, None)
        if rows is None:
            return None
        return VisualTokens(mask, None if self._has_lora else rows)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states (T, D) after the final norm."""
        visual = self._visual_tokens(inputs_embeds)
        routed = {} if visual is None else {"visual": visual}
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, **routed
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(n, D) to (n, vocabulary); an image token in a resized vocabulary is never sampled."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.config.image_token_id < logits.shape[-1]:
            logits[:, self.config.image_token_id] = float("-inf")
        return logits

    # -------------------------------------------------------------- weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load released keys (Specification §1.4); vLLM rejects missing and unexpected ones."""
        # The image size in config.json may differ from that of the stored position embedding.
        if isinstance(self.vision_model, VisionModel):  # absent if images are disabled in vLLM
            positions: Any = self.vision_model.embeddings.position_embedding
            positions.weight_loader = _load_positions
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _load_positions(parameter: nn.Parameter, stored: torch.Tensor) -> None:
    grid = round((parameter.shape[1] - 1) ** 0.5)
    parameter.data.copy_(resize_positions(stored, grid))
