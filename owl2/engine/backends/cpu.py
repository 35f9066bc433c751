"""The decoder layers with CPU kernels, over the static cache.

A few text tokens through plain or quantized Linears are one call for all layers. Everything else
runs operation by operation, with torch's matrix products. The weights are read in place; a Linear
that the kernels do not support, such as one with LoRA, is called as a module. Image tokens come
last, so that each modality is a slice of the tokens.

Shapes: M tokens, D width, h key-value heads, d head width, R rows and C capacity of the cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.model.modality import TEXT, VISUAL, Multiway

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class TokenPositions(NamedTuple):
    """Where M tokens are in the cache.

    Attributes:
        rows: (M,) their sequences.
        positions: (M,) their positions; all before them are filled, or are among the tokens.
        cos, sin: (M, d) the rotary embeddings of the positions.
        num_visual: How many of the tokens, the last ones, belong to images.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    num_visual: int = 0

    def slots(
        self, keys: torch.Tensor, values: torch.Tensor, part: slice = slice(None)
    ) -> ops.CacheSlots:
        """A part of the tokens in one layer of the cache, (R, h, C, d) each."""
        cos, sin, rows, positions = self.cos, self.sin, self.rows, self.positions
        return ops.cache_slots(cos[part], sin[part], rows[part], positions[part], keys, values)


def supports(model: Any) -> bool:
    """Whether the kernels are available and support the model; single Linears may be of any kind.

    Prints on stderr why the kernels are not available.
    """
    config, dtype, decoder = model.config, model.dtype, model.model
    modules = [decoder.embed_tokens, decoder.norm]
    modules += [norm for layer in decoder.layers for norm in _text_norms(layer)]
    return (
        model.device.type == "cpu"
        and dtype in ops.DTYPES
        and config.head_dim % ops.STEPS[dtype] == 0
        and isinstance(ACT2FN[config.hidden_act], _SILU)
        and all(module.weight.dtype == dtype for module in modules)
        and available()
    )


def run_layers(
    layers: Sequence[Any],
    hidden: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    tokens: TokenPositions,
) -> torch.Tensor:
    """(M, D), which may be overwritten, through all layers; writes keys and values to the cache.

    Args:
        keys, values: (R, h, C, d) for each layer.
    """
    is_short = len(hidden) <= ops.MAX_TOKENS and not tokens.num_visual
    if is_short and all(_is_supported(layer, hidden.dtype) for layer in layers):
        arguments = [
            ops.layer(
                hidden.shape[1],
                [_matrix(linear) for linear in _text_linears(layer)],
                [(norm.weight, norm.variance_epsilon) for norm in _text_norms(layer)],
                tokens.slots(own_keys, own_values),
                layer.self_attn.q_proj.out_features // layer.self_attn.head_dim,
                layer.self_attn.scaling,
            )
            for layer, own_keys, own_values in zip(layers, keys, values, strict=True)
        ]
        ops.decoder_layers(hidden, arguments)
        return hidden
    for layer, own_keys, own_values in zip(layers, keys, values, strict=True):
        hidden = _run_layer(layer, hidden, own_keys, own_values, tokens)
    return hidden


def _run_layer(
    layer: Any,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: TokenPositions,
) -> torch.Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    num_text = len(hidden) - tokens.num_visual
    normed = _norm_by_modality(layer.input_layernorm, hidden, num_text)
    query = linear(attention.q_proj, normed)
    parts = slice(None, num_text), slice(num_text, None)
    projections = _by_modality(attention.k_proj), _by_modality(attention.v_proj)
    for part, to_key, to_value in zip(parts, *projections, strict=True):
        if len(own := normed[part]):
            slots = tokens.slots(keys, values, part)
            ops.write_kv(slots, linear(to_key, own), linear(to_value, own))
    heads = query.shape[1] // attention.head_dim
    attended = ops.attention(tokens.slots(keys, values), query, heads, attention.scaling)
    hidden = hidden + linear(attention.o_proj, attended)
    normed = _norm_by_modality(layer.post_attention_layernorm, hidden, num_text)
    gate, up = linear(mlp.gate_proj, normed), linear(mlp.up_proj, normed)
    return hidden.add_(linear(mlp.down_proj, ops.swiglu(gate, up)))


def rms_norm(module: Any, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """An RMSNorm of (M, D)."""
    if module.weight.dtype == hidden.dtype and hidden.shape[1] % ops.WIDTH == 0:
        return ops.rms_norm(hidden.contiguous(), module.weight, module.variance_epsilon, out)
    return module(hidden) if out is None else out.copy_(module(hidden))


def linear(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A Linear, or a module in its place: (M, K) to (M, N)."""
    if len(hidden) <= ops.MAX_TOKENS and _is_plain(module, hidden.dtype):
        return ops.linear(hidden.contiguous(), module.weight, module.bias)
    return module(hidden).to(hidden.dtype).contiguous()


def _norm_by_modality(module: nn.Module, hidden: torch.Tensor, num_text: int) -> torch.Tensor:
    """(M, D) to (M, D), the first `num_text` tokens as text, the others as images."""
    text_norm, visual_norm = _by_modality(module)
    if num_text == len(hidden) or text_norm is visual_norm:
        return rms_norm(text_norm, hidden)
    normed = torch.empty_like(hidden)
    rms_norm(text_norm, hidden[:num_text], normed[:num_text])
    rms_norm(visual_norm, hidden[num_text:], normed[num_text:])
    return normed


def _by_modality(module: nn.Module) -> tuple[Any, Any]:
    """The modules for text and for images."""
    if isinstance(module, Multiway):
        return module.multiway[TEXT], module.multiway[VISUAL]
    return module, module


def _text_norms(layer: Any) -> list[Any]:
    return [
        _by_modality(norm)[0] for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]


def _text_linears(layer: Any) -> list[Any]:
    """In the order of `ops.MATRICES`."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    text = [_by_modality(projection)[0] for projection in projections]
    return [*text, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_supported(layer: Any, dtype: torch.dtype) -> bool:
    """Whether `ops.decoder_layers` supports all of a layer's modules for tokens of this dtype."""
    return (
        layer.self_attn.q_proj.in_features % ops.WIDTH == 0
        and all(norm.weight.dtype == dtype for norm in _text_norms(layer))
        and all(_is_plain(m, dtype) or _is_quantized(m, dtype) for m in _text_linears(layer))
    )


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == dtype
        and ops.supports(module.weight)
        and _has_bias_of(module, dtype)
    )


def _is_quantized(module: Any, dtype: torch.dtype) -> bool:
    return type(module) is QuantizedLinear and not module.padding and _has_bias_of(module, dtype)


def _has_bias_of(module: Any, dtype: torch.dtype) -> bool:
    return module.bias is None or module.bias.dtype == dtype


def _matrix(module: Any) -> ops.Matrix:
    if type(module) is QuantizedLinear:
        return ops.matrix(module.weight, module.bias, module.scale, module.bits)
    return ops.matrix(module.weight, module.bias)
