"""One token of each of several sequences through one decoder layer, in two ways.

`TorchStep` is made of torch's operations: for GPUs, where it is compiled, and for CPUs without a
compiler. `NativeStep` has kernels of its own for CPUs. Both read a model's modules as they are; a
Linear that is none of torch's own (LoRA, fewer bits) is called.

Shapes: B sequences, D width, h key-value heads, d head width, C the cache's capacity.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from owl2.inference.native import ops
from owl2.inference.quantised import QuantisedLinear
from owl2.model.modality import TEXT, Multiway

MOST_AT_ONCE = 128  # sequences; beyond, products by torch gain more than one call saves
SILU = (nn.SiLU, type(ACT2FN["silu"]))


def text(module: nn.Module) -> Any:
    """The module that text goes through."""
    return module.multiway[TEXT] if isinstance(module, Multiway) else module


class TorchStep:
    """A layer's step by torch's operations."""

    def several(self, layers: Iterable[Any]) -> int:
        """How many tokens of one sequence a step through these layers takes."""
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
        """(B, D) to (B, D), which may be written over; writes into the cache.

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
        return self.linear(module.down_proj, module.act_fn(gate) * up)

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
    """The same by CPU kernels, for models in float32 or bfloat16 (`supports`).

    A layer of plain Linears is one call; others go part by part.
    """

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels take such a model at all."""
        return device.type == "cpu" and dtype in ops.DTYPES

    def several(self, layers: Iterable[Any]) -> int:
        return ops.MOST_TOKENS if all(_is_whole(layer) for layer in layers) else 1

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
        if len(hidden) > MOST_AT_ONCE or not _is_whole(layer):
            return super().layer(layer, hidden, keys, values, rows, positions, length, turn)
        attention = layer.self_attn
        norms = [text(layer.input_layernorm), text(layer.post_attention_layernorm)]
        ops.step(
            hidden,
            [_matrix(linear) for linear in _linears(layer)],
            [(norm.weight, norm.variance_epsilon) for norm in norms],
            turn,
            rows,
            positions,
            keys,
            values,
            attention.q_proj.out_features // attention.head_dim,
            attention.scaling,
        )
        return hidden

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        if module.weight.dtype != hidden.dtype:
            return module(hidden)
        return ops.rms_norm(hidden, module.weight, module.variance_epsilon)

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        few = len(hidden) <= ops.MOST_TOKENS
        if few and _is_plain(module, hidden.dtype):
            return ops.linear(hidden.contiguous(), module.weight, module.bias)
        return module(hidden)


def _linears(layer: Any) -> list[Any]:
    """In the order of `ops.MATRICES`."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return [*map(text, projections), mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_whole(layer: Any) -> bool:
    """Whether a layer is what `ops.step` takes."""
    norms = text(layer.input_layernorm), text(layer.post_attention_layernorm)
    dtypes = {norm.weight.dtype for norm in norms}
    dtype = dtypes.pop()
    return (
        not dtypes  # kernels read all as of one dtype
        and dtype in ops.DTYPES
        and isinstance(layer.mlp.act_fn, SILU)
        and layer.self_attn.head_dim % ops.STEPS[dtype] == 0
        and all(_is_plain(linear, dtype) or _is_quantised(linear) for linear in _linears(layer))
    )


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    return type(linear) is nn.Linear and linear.weight.dtype == dtype and ops.fits(linear.weight)


def _is_quantised(linear: Any) -> bool:
    return type(linear) is QuantisedLinear and not linear.padding


def _matrix(linear: Any) -> ops.Matrix:
    if type(linear) is QuantisedLinear:
        return ops.matrix(linear.weight, linear.bias, linear.scale, linear.bits)
    return ops.matrix(linear.weight, linear.bias)
