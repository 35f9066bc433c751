"""vLLM's LLaMA with the modality-adaptive module (Specification §1.3).

vLLM runs the scheduled tokens of all requests as one flat sequence: prompts, chunks of prompts and
single new tokens. The layers receive the `VisualTokens` of the step. Each layer computes all tokens
with the text weights, as vLLM's LLaMA does, and replaces the norms, keys and values of visual
tokens. Most steps have no visual tokens and run vLLM's LLaMA unchanged.

Shapes: T tokens in the step, V of them visual, D width, h heads and g key-value heads of this
process, d head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.compilation.decorators import ignore_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.model_executor.models.utils import WeightsMapper

from owl2.model.modality import TEXT, VISUAL

# From released names (Specification §1.4), without the modality as a suffix: vLLM finds the modules
# of an adapter by the last part of their names.
MAM_NAMES = {
    f".{name}.multiway.{modality}": f".{prefix}{name}"
    for name in ("k_proj", "v_proj")
    for modality, prefix in ((TEXT, ""), (VISUAL, "visual_"))
}


class VisualTokens(NamedTuple):
    """The visual tokens of a step.

    Attributes:
        mask: (T, 1), true for visual tokens.
        rows: (V,) indices of the visual tokens. None: compute both modalities for each token and
            select. A CUDA graph does so, because it is replayed for other steps, and vLLM's LoRA
            needs it, because it finds the adapter of a token by its position in the step.
    """

    mask: torch.Tensor
    rows: torch.Tensor | None

    def replace_visual(
        self,
        states: torch.Tensor,
        module: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        """`states` (T, D') with ``module(inputs)`` of `inputs` (T, D) at visual tokens."""
        if self.rows is None:
            return torch.where(self.mask, module(inputs), states)
        return states.index_copy(0, self.rows, module(inputs[self.rows]))


class MultiwayNorm(nn.Module):
    """One RMSNorm for each modality (``multiway.0`` is text) with vLLM's fused residual."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        visual: VisualTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D) and a residual (T, D) to the normalized sum and the sum."""
        if residual is None:
            normed, residual = self.multiway[TEXT](hidden_states), hidden_states
        else:
            normed, residual = self.multiway[TEXT](hidden_states, residual)
        if visual is not None:
            normed = visual.replace_visual(normed, self.multiway[VISUAL], residual)
        return normed, residual


class VllmOwl2Attention(LlamaAttention):
    """vLLM's attention with the text weights and a projection for visual keys and values."""

    def __init__(self, *, quant_config: Any = None, bias: bool = False, **options: Any) -> None:
        super().__init__(quant_config=quant_config, bias=bias, **options)
        self.visual_kv_proj = MergedColumnParallelLinear(
            self.hidden_size,
            [self.total_num_kv_heads * self.head_dim] * 2,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{options['prefix']}.visual_kv_proj",
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        visual: VisualTokens | None = None,
    ) -> torch.Tensor:
        """(T, D), normalized with the norm of each token's modality, to (T, D)."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key_value = qkv.split([self.q_size, 2 * self.kv_size], dim=-1)  # (T, h·d), (T, 2g·d)
        if visual is not None:
            key_value = visual.replace_visual(key_value, self._visual_key_value, hidden_states)
        key, value = key_value.split(self.kv_size, dim=-1)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        output, _ = self.o_proj(self.attn(query, key, value.contiguous()))
        return output

    def _visual_key_value(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key_value, _ = self.visual_kv_proj(hidden_states)
        return key_value


class VllmOwl2DecoderLayer(LlamaDecoderLayer):
    """vLLM's decoder layer with a norm for each modality."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=VllmOwl2Attention)
        config = vllm_config.model_config.hf_config
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, MultiwayNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        visual: VisualTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.input_layernorm(hidden_states, residual, visual)
        attended = self.self_attn(positions, normed, visual)
        normed, residual = self.post_attention_layernorm(attended, residual, visual)
        return self.mlp(normed), residual


# vLLM compiles one graph for all steps, which could not skip the visual weights in steps without
# images.
@ignore_torch_compile
class Owl2LlamaModel(LlamaModel):
    """vLLM's LLaMA without its head. See `MAM_NAMES` for the names of weights."""

    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_stacked={
                ".visual_k_proj": (".visual_kv_proj", 0),
                ".visual_v_proj": (".visual_kv_proj", 1),
            }
        )
        | LlamaModel.hf_to_vllm_mapper
    )


class Owl2LlamaForCausalLM(LlamaForCausalLM):
    """The decoder with its head. With ``use_mam: false`` it has the layers of LLaMA."""

    hf_to_vllm_mapper = Owl2LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        use_mam = vllm_config.model_config.hf_config.use_mam
        layer = VllmOwl2DecoderLayer if use_mam else LlamaDecoderLayer
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = VllmOwl2DecoderLayer
    ) -> Owl2LlamaModel:
        return Owl2LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
