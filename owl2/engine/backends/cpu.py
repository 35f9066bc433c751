"""The decoder layers with CPU kernels, over the static cache.

A few text tokens through plain or quantized Linears are one call for all layers. Everything else
runs operation by operation, with torch's matrix products. The weights are read in place; a Linear
that the kernels do not support, such as one with LoRA, is called as a module. Image tokens come
last, so that each modality is a slice of the tokens.

Shapes: M tokens, D width, h key-value heads, d head width, R rows and C capacity of the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.model.modality import module_pair

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class TokenPositions(NamedTuple):
    """Where M tokens are in the cache.

    Attributes:
        rows: (M,) int64, their sequences; several tokens may be in the same row.
        positions: (M,) int64, their positions; all before them are filled, or are among the tokens.
        cos, sin: (M, d) the rotary embeddings of the positions, contiguous.
        num_visual: How many of the tokens, the last ones, belong to images.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    num_visual: int = 0

    def slots(self, layer: torch.Tensor) -> ops.CacheSlots:
        """The tokens in one layer of the cache, (2, R, h, C, d), contiguous."""
        tensors = self.cos, self.sin, self.rows, self.positions, layer
        pointers = [tensor.data_ptr() for tensor in tensors]
        values = layer.data_ptr() + layer.nbytes // 2
        return ops.CacheSlots(*pointers, values, len(self.rows), *layer.shape[2:])


def supports(model: Any) -> bool:
    """Whether the kernels are available and support the model; single Linears may be of any kind.

    Prints on stderr why the kernels are not available.
    """
    config, dtype, decoder = model.config, model.dtype, model.model
    if not all(hasattr(layer, "self_attn") for layer in decoder.layers):  # not those of a LLaMA
        return False
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
    cache: Sequence[torch.Tensor],
    tokens: TokenPositions,
) -> torch.Tensor:
    """(M, D), which may be overwritten, through all layers; writes keys and values to the cache.

    Args:
        cache: (2, R, h, C, d) for each layer.
    """
    is_short = len(hidden) <= ops.MAX_TOKENS and not tokens.num_visual
    if is_short and all(_is_supported(layer, hidden.dtype) for layer in layers):
        pairs = zip(layers, cache, strict=True)
        bits = getattr(layers[0].mlp.down_proj, "activation_bits", 16)
        ops.decoder_layers(hidden, [_arguments(*pair, tokens) for pair in pairs], bits)
        return hidden
    for layer, own_cache in zip(layers, cache, strict=True):
        hidden = _run_layer(layer, hidden, own_cache, tokens)
    return hidden


def _arguments(layer: Any, cache: torch.Tensor, tokens: TokenPositions) -> ops.Layer:
    """A layer for `ops.decoder_layers`."""
    attention, first, second = layer.self_attn, *_text_norms(layer)
    matrices = [
        ops.matrix(linear.weight, linear.bias, linear.scale, linear.bits)
        if type(linear) is QuantizedLinear
        else ops.matrix(linear.weight, linear.bias)
        for linear in _text_linears(layer)
    ]
    return ops.Layer(
        *matrices,
        first.weight.data_ptr(),
        second.weight.data_ptr(),
        tokens.slots(cache),
        attention.q_proj.in_features,
        attention.q_proj.out_features // attention.head_dim,
        first.variance_epsilon,
        second.variance_epsilon,
        attention.scaling,
    )


def _run_layer(
    layer: Any, hidden: torch.Tensor, cache: torch.Tensor, tokens: TokenPositions
) -> torch.Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    num_text = len(hidden) - tokens.num_visual
    normed = _by_modality(rms_norm, module_pair(layer, "input_layernorm"), hidden, num_text)
    query = linear(attention.q_proj, normed)
    key = _by_modality(linear, module_pair(attention, "k_proj"), normed, num_text)
    value = _by_modality(linear, module_pair(attention, "v_proj"), normed, num_text)
    heads = query.shape[1] // attention.head_dim
    attended = ops.attention(tokens.slots(cache), key, value, query, heads, attention.scaling)
    hidden = hidden + linear(attention.o_proj, attended)
    normed = _by_modality(
        rms_norm, module_pair(layer, "post_attention_layernorm"), hidden, num_text
    )
    gate, up = linear(mlp.gate_proj, normed), linear(mlp.up_proj, normed)
    return hidden.add_(linear(mlp.down_proj, ops.swiglu(gate, up)))


def rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """An RMSNorm of (M, D)."""
    if module.weight.dtype == hidden.dtype and hidden.shape[1] % ops.WIDTH == 0:
        return ops.rms_norm(hidden.contiguous(), module.weight, module.variance_epsilon)
    return module(hidden)


def linear(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A Linear, or a module in its place: (M, K) to (M, N)."""
    is_plain = type(module) is nn.Linear and _has_kernel(module, hidden.dtype)
    if len(hidden) <= ops.MAX_TOKENS and is_plain:
        return ops.linear(hidden.contiguous(), module.weight, module.bias)
    return module(hidden).to(hidden.dtype).contiguous()


def _by_modality(
    function: Callable[[Any, torch.Tensor], torch.Tensor],
    modules: tuple[Any, Any],
    hidden: torch.Tensor,
    num_text: int,
) -> torch.Tensor:
    """(M, D) to (M, N) by the modules for text and images; the first `num_text` tokens are text."""
    text, visual = modules
    if text is visual or num_text == len(hidden):
        return function(text, hidden)
    if not num_text:
        return function(visual, hidden)
    return torch.cat([function(text, hidden[:num_text]), function(visual, hidden[num_text:])])


def _text_norms(layer: Any) -> list[Any]:
    return [module_pair(layer, name)[0] for name in ("input_layernorm", "post_attention_layernorm")]


def _text_linears(layer: Any) -> list[Any]:
    """In the order of `ops.Layer`."""
    attention, mlp = layer.self_attn, layer.mlp
    key, value = (module_pair(attention, name)[0] for name in ("k_proj", "v_proj"))
    projections = [attention.q_proj, key, value, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_supported(layer: Any, dtype: torch.dtype) -> bool:
    """Whether `ops.decoder_layers` supports all of a layer's modules for tokens of this dtype."""
    return (
        layer.self_attn.q_proj.in_features % ops.WIDTH == 0
        and all(norm.weight.dtype == dtype for norm in _text_norms(layer))
        and all(_has_kernel(linear, dtype) for linear in _text_linears(layer))
    )


def _has_kernel(module: Any, dtype: torch.dtype) -> bool:
    if type(module) is QuantizedLinear:
        is_supported = not module.padding
    else:
        is_supported = type(module) is nn.Linear and module.weight.dtype == dtype
        is_supported = is_supported and ops.supports(module.weight)
    return is_supported and (module.bias is None or module.bias.dtype == dtype)
