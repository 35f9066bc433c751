"""vLLM's LLaMA with MAM in it; only the difference (SPEC 1.3).

vLLM runs the scheduled tokens of all requests as one flat row: prompts, parts of prompts, single
new tokens. Which of them are visual differs from step to step, so the layers get a `VisualTokens`
of the step. Each layer computes all tokens as vLLM's LLaMA does, with the text weights, and puts
the visual tokens' norms, keys and values in their places. A step without visual tokens, as most
are, is vLLM's LLaMA and nothing else.

Shapes: T tokens in the step, V of them visual, D width, h heads and g key-value heads of this
process, d = the size of one.
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


class VisualTokens(NamedTuple):
    """Which tokens of a step are visual.

    Attributes:
        mask: (T, 1), true for visual tokens.
        rows: (V,) their indices; None where a CUDA graph is recorded: it must do for all later
            steps, so it computes both modalities for each token and chooses.
    """

    mask: torch.Tensor
    rows: torch.Tensor | None

    def put(
        self,
        states: torch.Tensor,
        module: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        """`states` (T, D'), with ``module(inputs)`` of `inputs` (T, D) where tokens are visual."""
        if self.rows is None:
            return torch.where(self.mask, module(inputs), states)
        return states.index_copy(0, self.rows, module(inputs[self.rows]))


class MultiwayNorm(nn.Module):
    """An RMSNorm a modality, ``multiway.0`` for text, with vLLM's residual."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        visual: VisualTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D) and what is to be added to it first, to the normed sum and the sum."""
        if residual is None:
            normed, residual = self.multiway[TEXT](hidden_states), hidden_states
        else:
            normed, residual = self.multiway[TEXT](hidden_states, residual)
        if visual is not None:
            normed = visual.put(normed, self.multiway[VISUAL], residual)
        return normed, residual


class Owl2Attention(LlamaAttention):
    """vLLM's attention, whose fused projection is the text's; visual keys and values beside it."""

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
        """(T, D), each token normed by its own modality's norm, to (T, D)."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key_value = qkv.split([self.q_size, 2 * self.kv_size], dim=-1)  # (T, h·d), (T, 2g·d)
        if visual is not None:
            key_value = visual.put(key_value, self._visual_key_value, hidden_states)
        key, value = key_value.split(self.kv_size, dim=-1)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        output, _ = self.o_proj(self.attn(query, key, value.contiguous()))
        return output

    def _visual_key_value(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key_value, _ = self.visual_kv_proj(hidden_states)
        return key_value


class Owl2DecoderLayer(LlamaDecoderLayer):
    """vLLM's layer with norms for each modality."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=Owl2Attention)
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


# What vLLM compiles, it compiles once, for steps of all kinds: it could not leave out the visual
# weights where there is no image.
@ignore_torch_compile
class Owl2LlamaModel(LlamaModel):
    """vLLM's LLaMA without its head; weights by the released names (SPEC 1.4)."""

    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_stacked={
                ".k_proj.multiway.0": (".qkv_proj", "k"),
                ".v_proj.multiway.0": (".qkv_proj", "v"),
                ".k_proj.multiway.1": (".visual_kv_proj", 0),
                ".v_proj.multiway.1": (".visual_kv_proj", 1),
            }
        )
        | LlamaModel.hf_to_vllm_mapper
    )


class Owl2LlamaForCausalLM(LlamaForCausalLM):
    """The decoder with its head; with ``use_mam: false``, LLaMA's own layers."""

    hf_to_vllm_mapper = Owl2LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        use_mam = vllm_config.model_config.hf_config.use_mam
        layer = Owl2DecoderLayer if use_mam else LlamaDecoderLayer
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = Owl2DecoderLayer
    ) -> Owl2LlamaModel:
        return Owl2LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
