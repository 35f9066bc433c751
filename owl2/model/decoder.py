"""Language decoder: LLaMA layers of transformers with MAM (Specification §1.3).

Norms, `k_proj` and `v_proj`, or those of them in `Owl2Config.mam_modules`, have weights for each
modality; `q_proj`, `o_proj` and the MLP are shared. Shapes: B sequences, S positions, D width,
h heads, d = D / h.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from owl2.model.configuration import Owl2Config
from owl2.model.modality import (
    AnyRouting,
    ModalitySplit,
    by_modality,
    module_pair,
    requires_sequences,
    separate_modalities,
)


class Owl2Attention(LlamaAttention):
    """LLaMA attention. A token's key and value are projected by the weights of its modality."""

    def __init__(self, config: Owl2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        linear, output = self.k_proj, self.o_proj
        del self.o_proj
        make = partial(
            nn.Linear, linear.in_features, linear.out_features, bias=linear.bias is not None
        )
        separate_modalities(self, config.separate_modules, k_proj=make, v_proj=make)
        self.o_proj = output  # registered last, as in LLaMA

    def forward(  # type: ignore[override]  # LLaMA's signature plus the routing
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        routing: AnyRouting | None = None,
        parts: ModalitySplit | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in LLaMA. `parts` is `routing.split(hidden_states)`, shared by both projections."""
        assert position_embeddings is not None  # the decoder always passes it
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, h, S, d)
        key, value = (
            by_modality(self, name, hidden_states, routing, parts).view(heads).transpose(1, 2)
            for name in ("k_proj", "v_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights  # (B, S, D)


class Owl2DecoderLayer(LlamaDecoderLayer):
    """A LLaMA layer in which the modules of MAM have weights for each modality."""

    def __init__(self, config: Owl2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = Owl2Attention(config, layer_idx)
        make = partial(LlamaRMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        separate_modalities(
            self, config.separate_modules, input_layernorm=make, post_attention_layernorm=make
        )

    def requires_sequences(self) -> bool:
        """See `Multiway.requires_sequences`."""
        return requires_sequences(self, self.self_attn)

    def forward(  # type: ignore[override]  # LLaMA's signature plus the routing
        self, hidden_states: torch.Tensor, routing: AnyRouting | None = None, **kwargs: Any
    ) -> torch.Tensor:
        text_norm, visual_norm = module_pair(self, "input_layernorm")
        parts = None
        if routing is None or text_norm is visual_norm:
            normed = text_norm(hidden_states)
            if routing is not None and hasattr(self.self_attn, "multiway"):
                parts = routing.split(normed)
        else:
            text, visual = routing.split(hidden_states)
            parts = text_norm(text), visual_norm(visual)
            normed = routing.join(parts, hidden_states.shape[0])
        attended, _ = self.self_attn(normed, routing=routing, parts=parts, **kwargs)
        hidden_states = hidden_states + attended
        normed = by_modality(self, "post_attention_layernorm", hidden_states, routing)
        return hidden_states + self.mlp(normed)


def make_decoder_layer(config: Owl2Config, layer_idx: int) -> LlamaDecoderLayer:
    """A decoder layer with MAM, or a plain LLaMA layer if ``config.use_mam`` is False."""
    layer = Owl2DecoderLayer if config.use_mam else LlamaDecoderLayer
    return layer(config, layer_idx)
