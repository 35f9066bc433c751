"""One token of each of several sequences through one decoder layer, in two ways.

`TorchStep` is made of torch's operations: for GPUs, where it is compiled, and for CPUs without a
compiler. `NativeStep` has kernels of its own for CPUs. Both read a model's modules as they are; a
Linear that is none of torch's own (LoRA, fewer bits) is called.

Shapes: B sequences, D width, h key-value heads, d head width, C the cache's capacity.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from owl2.inference.native import ops
from owl2.model.modality import TEXT, Multiway

SILU = (nn.SiLU, type(ACT2FN["silu"]))


def text(module: nn.Module) -> Any:
    """The module that text goes through."""
    return module.multiway[TEXT] if isinstance(module, Multiway) else module


class TorchStep:
    """A layer's step by torch's operations."""

    def several(self, head_width: int, dtype: torch.dtype) -> int:
        """How many tokens of one sequence a step takes."""
        return 1

    def layer(
        self,
        layer: Any,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        turn: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """(B, D) to (B, D); writes into the cache.

        Args:
            keys, values: the cache, (R, h, C, d), a row a sequence.
            rows: (B,) the tokens' sequences: 0 … B-1, but for kernels any (`several`).
            positions: (B,) where the tokens stand; all before them are filled, or of the step.
            length: the largest of them + 1.
            turn: cosines and sines of the positions, (B, d) each.
        """
        attention = layer.self_attn
        heads = (len(hidden), -1, attention.head_dim)
        normed = self.norm(text(layer.input_layernorm), hidden)
        query = self.linear(attention.q_proj, normed).view(heads)  # (B, heads, d)
        key = self.linear(text(attention.k_proj), normed).view(heads)  # (B, h, d)
        value = self.linear(text(attention.v_proj), normed).view(heads)
        attended = self.attend(
            query, key, value, keys, values, rows, positions, length, turn, attention.scaling
        )
        hidden = hidden + self.linear(attention.o_proj, attended.flatten(1))
        normed = self.norm(text(layer.post_attention_layernorm), hidden)
        return hidden + self.mlp(layer.mlp, normed)

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """An RMSNorm of (B, D)."""
        return module(hidden)

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A Linear, or what stands for one: (B, K) to (B, N)."""
        return module(hidden)

    def mlp(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The gated MLP of (B, D)."""
        gate, up = self.linear(module.gate_proj, hidden), self.linear(module.up_proj, hidden)
        return self.linear(module.down_proj, self.gated(module.act_fn, gate, up))

    def gated(self, activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up."""
        return activation(gate) * up

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        turn: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
    ) -> torch.Tensor:
        """Each sequence's query (B, heads, d) over its row of the cache, its own token included."""
        batch = len(query)
        query, key = apply_rotary_pos_emb(query, key, *turn)
        keys[rows, :, positions] = key
        values[rows, :, positions] = value
        seen = torch.arange(length, device=query.device) <= positions[:, None]  # (B, length)
        return F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:batch, :, :length],
            values[:batch, :, :length],
            attn_mask=seen[:, None, None],
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )[:, :, 0]


class NativeStep(TorchStep):
    """The same by CPU kernels, for models in float32 or bfloat16 (`supports`)."""

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels take such a model at all."""
        return device.type == "cpu" and dtype in ops.DTYPES

    def several(self, head_width: int, dtype: torch.dtype) -> int:
        return 1 if head_width % ops.STEPS[dtype] else ops.MOST_TOKENS

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(hidden, module.weight, module.variance_epsilon)

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        few = len(hidden) <= ops.MOST_TOKENS
        if few and type(module) is nn.Linear and ops.fits(module.weight):
            return ops.linear(hidden, module.weight, module.bias)
        return module(hidden)

    def gated(self, activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if isinstance(activation, SILU):
            return ops.swiglu(gate, up)
        return activation(gate) * up

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        turn: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
    ) -> torch.Tensor:
        if query.shape[2] % ops.STEPS[query.dtype]:  # narrower than a vector
            return super().attend(
                query, key, value, keys, values, rows, positions, length, turn, scaling
            )
        return ops.attend(query, key, value, turn, rows, positions, keys, values, scaling)
