"""Decoder of mPLUG-Owl2.1: Qwen layers with MAM (Model family §7.3).

The projection to queries, keys and values has weights for each modality; everything else is shared.
Prompts that are longer than those of training have rotary embeddings with a larger base (dynamic
NTK scaling), and their later queries are scaled (log-n). Shapes: B sequences, S positions, D width,
h heads, d width of a head.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from owl2.model.modality import AnyRouting, Multiway, by_modality, requires_sequences
from owl2.model.owl2_1_configuration import Owl2_1Config


class QwenAttention(LlamaAttention):
    """Attention with one projection to queries, keys and values for each modality."""

    def __init__(self, config: Owl2_1Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not the projections of LLaMA
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = config.num_attention_heads * self.head_dim
        make = partial(nn.Linear, config.hidden_size, 3 * width)
        if config.use_mam:
            self.multiway = Multiway(c_attn=make)
        else:
            self.c_attn = make()
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(  # type: ignore[override]  # other arguments than LLaMA's
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        routing: AnyRouting | None = None,
        ntk_alphas: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in LLaMA.

        Args:
            position_ids: (B or 1, S).
            ntk_alphas: (B,), see `Owl2_1Config.ntk_alpha`; None: 1.
        """
        query, key, value = self.project(
            hidden_states, position_embeddings, position_ids, routing, ntk_alphas
        )
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
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            position_ids=position_ids,
            **kwargs,
        )
        return self.c_proj(attended.flatten(2)), weights  # (B, S, D)

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
        routing: AnyRouting | None = None,
        ntk_alphas: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (B, h, S, d), with rotary embeddings; arguments of `forward`."""
        fused = by_modality(self, "c_attn", hidden_states, routing)  # (B, S, 3·h·d)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in fused.chunk(3, -1)
        )
        if ntk_alphas is not None:
            position_embeddings = self.scaled_rotary(position_ids, ntk_alphas, query.dtype)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.config.use_logn_attn and not self.training:
            query = query * self.logn_scale(position_ids)[:, None, :, None].to(query.dtype)
        return query, key, value

    def scaled_rotary(
        self, position_ids: torch.Tensor, ntk_alphas: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, S, d) with the base of each sequence."""
        width = self.head_dim
        bases = self.config.rotary_emb_base * ntk_alphas.float() ** (width / (width - 2))
        exponents = torch.arange(0, width, 2, device=bases.device).float() / width
        frequencies = 1 / bases[:, None] ** exponents  # (B, d / 2)
        angles = position_ids[..., None].float() * frequencies[:, None]  # (B, S, d / 2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def logn_scale(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B or 1, S): 1 up to the length of training, then the logarithm to this base."""
        count = (position_ids + 1).clamp(min=1).float()
        return (count.log() / math.log(self.config.seq_length)).clamp(min=1)


class QwenMLP(nn.Module):
    """SwiGLU: ``c_proj(w1(x) * silu(w2(x)))``."""

    def __init__(self, config: Owl2_1Config) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(width, inner, bias=bias)
        self.w2 = nn.Linear(width, inner, bias=bias)
        self.c_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(hidden_states) * F.silu(self.w2(hidden_states)))


class QwenDecoderLayer(LlamaDecoderLayer):
    """A Qwen layer. Its norms are shared by the modalities."""

    def __init__(self, config: Owl2_1Config, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not the modules of LLaMA
        self.ln_1 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = QwenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = QwenMLP(config)  # type: ignore[assignment]  # not a LlamaMLP

    def requires_sequences(self) -> bool:
        """See `Multiway.requires_sequences`."""
        return requires_sequences(self.attn)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]  # LLaMA's in kwargs
        attended, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))
