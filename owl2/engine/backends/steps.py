"""Tokens through the decoder's layers, over a cache that stays where it is, in two ways.

`TorchStep` is made of torch's operations, one token a sequence: for GPUs, where it is compiled, and
for CPUs without a compiler. `NativeStep` has kernels of its own for CPUs, and takes whole prompts,
too. Both read a model's modules as they are; a Linear that is none of torch's own (LoRA, fewer
bits) is called.

Shapes: B tokens, the last V of them of images, D width, h key-value heads, d head width, R rows
of a cache of capacity C.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from owl2.engine.backends.native import ops
from owl2.engine.backends.weight_only_quantization import QuantisedLinear
from owl2.model.modality import TEXT, VISUAL, Multiway

SILU = (nn.SiLU, type(ACT2FN["silu"]))


class Where(NamedTuple):
    """Tokens' places.

    Attributes:
        rows: (B,) the tokens' sequences; for `TorchStep` 0 … B-1, else any.
        positions: (B,) where they stand in them; all before is filled, or among the tokens.
        length: the largest of them + 1.
        turn: cosines and sines of the positions, (B, d) each.
        visual: V; only `NativeStep` takes any.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    length: int
    turn: tuple[torch.Tensor, torch.Tensor]
    visual: int = 0


def text(module: nn.Module) -> Any:
    """The module that text goes through."""
    return module.multiway[TEXT] if isinstance(module, Multiway) else module


def ways(module: nn.Module) -> tuple[Any, Any]:
    """The modules that text and images go through."""
    if isinstance(module, Multiway):
        return module.multiway[TEXT], module.multiway[VISUAL]
    return module, module


class TorchStep:
    """Layers by torch's operations, for a token of text a sequence."""

    def layers(
        self,
        layers: Sequence[Any],
        hidden: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        where: Where,
    ) -> torch.Tensor:
        """(B, D), which may be written over, through all layers; writes into the cache.

        Args:
            keys, values: the cache, (R, h, C, d) a layer, a row a sequence.
        """
        for layer, own_keys, own_values in zip(layers, keys, values, strict=True):
            hidden = self.layer(layer, hidden, own_keys, own_values, where)
        return hidden

    def layer(
        self,
        layer: Any,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        where: Where,
    ) -> torch.Tensor:
        """One layer of `layers`."""
        attention = layer.self_attn
        heads = (len(hidden), -1, attention.head_dim)
        normed = text(layer.input_layernorm)(hidden)
        query = attention.q_proj(normed).view(heads)  # (B, heads, d)
        key = text(attention.k_proj)(normed).view(heads)  # (B, h, d)
        value = text(attention.v_proj)(normed).view(heads)
        attended = self.attend(query, key, value, keys, values, where, attention.scaling)
        hidden = hidden + attention.o_proj(attended.flatten(1))
        return hidden + layer.mlp(text(layer.post_attention_layernorm)(hidden))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        where: Where,
        scaling: float,
    ) -> torch.Tensor:
        """Each sequence's query (B, heads, d) over its row of the cache, its own token included."""
        batch = len(query)
        query, key = apply_rotary_pos_emb(query, key, *where.turn)
        keys[where.rows, :, where.positions] = key
        values[where.rows, :, where.positions] = value
        places = torch.arange(where.length, device=query.device)
        seen = places <= where.positions[:, None]  # (B, length)
        return F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:batch, :, : where.length],
            values[:batch, :, : where.length],
            attn_mask=seen[:, None, None],
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )[:, :, 0]

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """An RMSNorm of (B, D)."""
        return module(hidden)

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A Linear, or what stands for one: (B, K) to (B, N)."""
        return module(hidden)


class NativeStep(TorchStep):
    """The same by CPU kernels, for models that `supports` names, and for any tokens.

    Few tokens of text through plain Linears are one call for all layers; else it goes part by part,
    with torch's matrix products. Tokens of images are the last ones, so that each modality is a
    slice, and nothing is gathered.
    """

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the kernels take such a model at all; single Linears may be anything."""
        config, dtype, decoder = model.config, model.dtype, model.model
        stream = [decoder.embed_tokens, decoder.norm]
        stream += [norm for layer in decoder.layers for norm in _norms(layer)]
        return (
            model.device.type == "cpu"
            and dtype in ops.DTYPES
            and config.head_dim % ops.STEPS[dtype] == 0
            and isinstance(ACT2FN[config.hidden_act], SILU)
            and all(module.weight.dtype == dtype for module in stream)
        )

    def layers(
        self,
        layers: Sequence[Any],
        hidden: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        where: Where,
    ) -> torch.Tensor:
        few = len(hidden) <= ops.MOST_TOKENS and not where.visual
        if not (few and all(_is_whole(layer, hidden.dtype) for layer in layers)):
            return super().layers(layers, hidden, keys, values, where)
        own = [
            ops.layer(
                hidden.shape[1],
                [_matrix(linear) for linear in _linears(layer)],
                [(norm.weight, norm.variance_epsilon) for norm in _norms(layer)],
                ops.places(where.turn, where.rows, where.positions, own_keys, own_values),
                layer.self_attn.q_proj.out_features // layer.self_attn.head_dim,
                layer.self_attn.scaling,
            )
            for layer, own_keys, own_values in zip(layers, keys, values, strict=True)
        ]
        ops.steps(hidden, own)
        return hidden

    def layer(
        self,
        layer: Any,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        where: Where,
    ) -> torch.Tensor:
        attention, width = layer.self_attn, layer.self_attn.head_dim
        border = len(hidden) - where.visual
        normed = self._norms(layer.input_layernorm, hidden, border)
        query = self.linear(attention.q_proj, normed)
        parts = slice(None, border), slice(border, None)
        for part, to_key, to_value in zip(
            parts, ways(attention.k_proj), ways(attention.v_proj), strict=True
        ):
            turn = where.turn[0][part], where.turn[1][part]
            at = ops.places(turn, where.rows[part], where.positions[part], keys, values)
            if len(turn[0]):
                own = normed[part]
                ops.keep(at, self.linear(to_key, own), self.linear(to_value, own))
        at = ops.places(where.turn, where.rows, where.positions, keys, values)
        attended = ops.attend(at, query, query.shape[1] // width, attention.scaling)
        hidden = hidden + self.linear(attention.o_proj, attended)
        normed = self._norms(layer.post_attention_layernorm, hidden, border)
        gate, up = self.linear(layer.mlp.gate_proj, normed), self.linear(layer.mlp.up_proj, normed)
        return hidden.add_(self.linear(layer.mlp.down_proj, ops.swiglu(gate, up)))

    def _norms(self, module: nn.Module, hidden: torch.Tensor, border: int) -> torch.Tensor:
        """The tokens before `border` as text, the others as images': (B, D) to (B, D)."""
        of_text, of_images = ways(module)
        if border == len(hidden) or of_text is of_images:
            return self.norm(of_text, hidden)
        normed = torch.empty_like(hidden)
        self.norm(of_text, hidden[:border], normed[:border])
        self.norm(of_images, hidden[border:], normed[border:])
        return normed

    def norm(
        self, module: Any, hidden: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if module.weight.dtype == hidden.dtype and hidden.shape[1] % ops.WIDE == 0:
            weight, epsilon = module.weight, module.variance_epsilon
            return ops.rms_norm(hidden.contiguous(), weight, epsilon, out)
        return module(hidden) if out is None else out.copy_(module(hidden))

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        few = len(hidden) <= ops.MOST_TOKENS
        if few and _is_plain(module, hidden.dtype):
            return ops.linear(hidden.contiguous(), module.weight, module.bias)
        return module(hidden).to(hidden.dtype).contiguous()


def _norms(layer: Any) -> list[Any]:
    return [text(layer.input_layernorm), text(layer.post_attention_layernorm)]


def _linears(layer: Any) -> list[Any]:
    """In the order of `ops.MATRICES`."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return [*map(text, projections), mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_whole(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is what `ops.steps` takes for tokens of this dtype, and of it all through."""
    width = layer.self_attn.q_proj.in_features
    return (
        width % ops.WIDE == 0
        and all(norm.weight.dtype == dtype for norm in _norms(layer))
        and all(
            _is_plain(linear, dtype) or _is_quantised(linear, dtype) for linear in _linears(layer)
        )
    )


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    return (
        type(linear) is nn.Linear
        and linear.weight.dtype == dtype
        and ops.fits(linear.weight)
        and _has_bias_of(linear, dtype)
    )


def _is_quantised(linear: Any, dtype: torch.dtype) -> bool:
    return type(linear) is QuantisedLinear and not linear.padding and _has_bias_of(linear, dtype)


def _has_bias_of(linear: Any, dtype: torch.dtype) -> bool:
    return linear.bias is None or linear.bias.dtype == dtype


def _matrix(linear: Any) -> ops.Matrix:
    if type(linear) is QuantisedLinear:
        return ops.matrix(linear.weight, linear.bias, linear.scale, linear.bits)
    return ops.matrix(linear.weight, linear.bias)
