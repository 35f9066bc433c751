"""The decoder layers with CPU kernels, over the static cache.

Text tokens through plain or quantized Linears are one call for all layers, where the kernels are
faster than torch (`ops.is_fast`). Everything else runs operation by operation. The weights are read
in place; a Linear that the kernels do not support is called as a module. Image tokens come last, so
that each modality is a slice of the tokens. If adapters are served beside the base model, the
products with the base weights are computed for all tokens, and each adapter adds those with its
matrices to its tokens.

Shapes: M tokens, D width, h key-value heads, d head width, R rows and C capacity of the cache.
"""

import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from owl2.engine.backends.cpu_products import linear_in_float32
from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.model.modality import module_pair
from owl2.runtime import multiplies_in_float32

if TYPE_CHECKING:
    from owl2.engine.lora import AdapterTokens

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class TokenPositions(NamedTuple):
    """Where M tokens are in the cache.

    Attributes:
        rows: (M,) int64, their sequences; several tokens may be in the same row.
        positions: (M,) int64, their positions; all before them are filled, or are among the tokens.
        cos, sin: (M, d) the rotary embeddings of the positions, contiguous.
        num_visual: How many of the tokens, the last ones, belong to images.
        adapters: Those that tokens use; the others use the base model. None if the layers serve no
            adapters: Linears with LoRA are then called as modules.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    num_visual: int = 0
    adapters: "Sequence[AdapterTokens] | None" = None

    def slots(self, layer: torch.Tensor) -> ops.CacheSlots:
        """The tokens in one layer of the cache, (2, R, h, C, d), contiguous."""
        tensors = self.cos, self.sin, self.rows, self.positions, layer
        pointers = [tensor.data_ptr() for tensor in tensors]
        return ops.CacheSlots(*pointers, _values(layer), len(self.rows), *layer.shape[2:])


def _values(layer: torch.Tensor) -> int:
    """The address of the values in one layer of the cache."""
    return layer.data_ptr() + layer.nbytes // 2


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


class DecoderLayers:
    """The decoder layers of a model with CPU kernels.

    Args:
        layers: Their weights are read in place. Layers, modules and weights can be replaced.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._prepared: _PreparedLayers | None = None

    def run(
        self, hidden: torch.Tensor, cache: Sequence[torch.Tensor], tokens: TokenPositions
    ) -> torch.Tensor:
        """(M, D), which may be overwritten, through all layers; adds keys and values to the cache.

        Args:
            cache: (2, R, h, C, d) for each layer.
        """
        if not tokens.num_visual and _is_one_call(hidden, tokens):
            prepared = self._prepare(hidden.dtype, tokens)
            if prepared is not None:
                for arguments, layer_cache in zip(prepared.arguments, cache, strict=True):
                    arguments.keys, arguments.values = layer_cache.data_ptr(), _values(layer_cache)
                bits = prepared.quantized.activation_bits if prepared.quantized else 16
                ops.decoder_layers(hidden, prepared.arguments, tokens.slots(cache[0]), bits)
                return hidden
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            hidden = _run_layer(layer, hidden, layer_cache, tokens)
        return hidden

    def _prepare(self, dtype: torch.dtype, tokens: TokenPositions) -> "_PreparedLayers | None":
        """None if the kernels do not support all modules for tokens of this dtype.

        Reading the modules takes as long as a layer of a small model, so the result is kept. With
        adapters, it depends on the tokens.
        """
        if tokens.adapters is not None:
            return _PreparedLayers.of(self._layers, dtype, tokens)
        if self._prepared is None or not self._prepared.is_current(dtype):
            self._prepared = _PreparedLayers.of(self._layers, dtype, tokens)
        return self._prepared


def _is_one_call(hidden: torch.Tensor, tokens: TokenPositions) -> bool:
    """Whether one call for all layers is faster; its LoRA is designed for few tokens."""
    if tokens.adapters is not None and len(hidden) > ops.MAX_TOKENS:
        return False
    return ops.is_fast(len(hidden), hidden.dtype)


class _PreparedLayers(NamedTuple):
    """Arguments of `ops.decoder_layers`, and what they were read from.

    Attributes:
        arguments: For each layer. Their keys and values are those of the last call.
        quantized: One of the Linears that are quantized; None without any.
        owners, names, values: Each module and tensor in the layers, the dictionary of a module that
            has it, and its key there.
        tensors, addresses: All tensors among `values`, and their addresses.
    """

    arguments: "ctypes.Array[ops.Layer]"
    quantized: QuantizedLinear | None
    dtype: torch.dtype
    owners: list[dict[str, Any]]
    names: list[str]
    values: list[Any]
    tensors: list[torch.Tensor]
    addresses: list[int]

    @classmethod
    def of(
        cls, layers: nn.ModuleList, dtype: torch.dtype, tokens: TokenPositions
    ) -> "_PreparedLayers | None":
        linears = [_text_linears(layer) for layer in layers]
        if not all(map(partial(_is_supported, tokens=tokens, dtype=dtype), layers, linears)):
            return None
        arguments = [_arguments(*own, tokens) for own in zip(layers, linears, strict=True)]
        array = (ops.Layer * len(arguments))(*arguments)
        # With adapters, the result is used once, and nothing is checked later.
        modules = layers.modules() if tokens.adapters is None else ()
        entries = [
            (owner, name, value)
            for module in modules
            for owner in (module._modules, module._parameters, module._buffers)
            for name, value in owner.items()
        ]
        owners = [owner for owner, _, _ in entries]
        names = [name for _, name, _ in entries]
        values = [value for _, _, value in entries]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        bases = (_base_linear(linear, tokens) for own in linears for linear in own)
        quantized = next((base for base in bases if type(base) is QuantizedLinear), None)
        return cls(array, quantized, dtype, owners, names, values, tensors, addresses)

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether all modules and tensors are where they were, and the tokens have this dtype.

        `map` without Python functions, because every decode step calls this.
        """
        found = map(dict.get, self.owners, self.names)
        return (
            dtype == self.dtype
            and all(map(operator.is_, found, self.values))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, self.tensors), self.addresses))
        )


def _arguments(layer: Any, linears: Sequence[Any], tokens: TokenPositions) -> ops.Layer:
    """A layer for `ops.decoder_layers`, without its keys and values."""
    attention, first, second = layer.self_attn, *_text_norms(layer)
    query = _base_linear(attention.q_proj, tokens)
    return ops.Layer(
        *(_matrix(linear, tokens) for linear in linears),
        first.weight.data_ptr(),
        second.weight.data_ptr(),
        None,
        None,
        query.in_features,
        query.out_features // attention.head_dim,
        first.variance_epsilon,
        second.variance_epsilon,
        attention.scaling,
    )


def _matrix(module: Any, tokens: TokenPositions) -> ops.Matrix:
    """A Linear with what the adapters of text tokens add to it."""
    base = _base_linear(module, tokens)
    loras = [
        ops.lora(down.weight, up.weight, module.scaling[name], indices)
        for name, indices, down, up in _lora_pairs(module, tokens)
    ]
    if type(base) is QuantizedLinear:
        rows = base.out_features
        return ops.matrix(base.weight, base.bias, base.scale, base.bits, loras, rows)
    return ops.matrix(base.weight, base.bias, loras=loras)


def _lora_pairs(
    module: Any, tokens: TokenPositions
) -> Iterator[tuple[str, torch.Tensor, nn.Linear, nn.Linear]]:
    """The name of each adapter of a Linear, its text tokens, and its two Linears."""
    for adapter in tokens.adapters or ():
        if adapter.name in getattr(module, "lora_A", ()):
            pair = module.lora_A[adapter.name], module.lora_B[adapter.name]
            yield adapter.name, adapter.text, *pair


def _run_layer(
    layer: Any, hidden: torch.Tensor, cache: torch.Tensor, tokens: TokenPositions
) -> torch.Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    num_text = len(hidden) - tokens.num_visual
    normed = _by_modality(rms_norm, module_pair(layer, "input_layernorm"), hidden, num_text)
    query = _project(attention.q_proj, normed, tokens)
    key = _project(module_pair(attention, "k_proj"), normed, tokens)
    value = _project(module_pair(attention, "v_proj"), normed, tokens)
    heads = query.shape[1] // attention.head_dim
    attended = ops.attention(tokens.slots(cache), key, value, query, heads, attention.scaling)
    hidden = hidden + _project(attention.o_proj, attended, tokens)
    normed = _by_modality(
        rms_norm, module_pair(layer, "post_attention_layernorm"), hidden, num_text
    )
    gate, up = _project(mlp.gate_proj, normed, tokens), _project(mlp.up_proj, normed, tokens)
    return hidden.add_(_project(mlp.down_proj, ops.swiglu(gate, up), tokens))


def rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """An RMSNorm of (M, D)."""
    if module.weight.dtype == hidden.dtype and hidden.shape[1] % ops.WIDTH == 0:
        return ops.rms_norm(hidden.contiguous(), module.weight, module.variance_epsilon)
    return module(hidden)


def linear(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A Linear, or a module in its place: (M, K) to (M, N)."""
    is_plain = type(module) is nn.Linear and _has_kernel(module, hidden.dtype)
    if is_plain and ops.is_fast(len(hidden), hidden.dtype):
        return ops.linear(hidden.contiguous(), module.weight, module.bias)
    if is_plain and multiplies_in_float32(hidden):
        return linear_in_float32(hidden, module.weight, module.bias)
    return module(hidden).to(hidden.dtype).contiguous()


def _project(modules: Any, hidden: torch.Tensor, tokens: TokenPositions) -> torch.Tensor:
    """(M, K) to (M, N) by a Linear, or by a pair for text and images, with the tokens' adapters."""
    text, visual = modules if isinstance(modules, tuple) else (modules, modules)
    pair = _base_linear(text, tokens), _base_linear(visual, tokens)
    output = _by_modality(linear, pair, hidden, len(hidden) - tokens.num_visual)
    for adapter in tokens.adapters or ():
        if text is visual:
            _add_lora(output, text, hidden, adapter.name, adapter.all)
        else:
            _add_lora(output, text, hidden, adapter.name, adapter.text)
            _add_lora(output, visual, hidden, adapter.name, adapter.visual)
    return output


def _add_lora(
    output: torch.Tensor, module: Any, hidden: torch.Tensor, name: str, indices: torch.Tensor
) -> None:
    """Add what an adapter adds to the output of a Linear, in place, for the tokens with indices."""
    if not len(indices) or name not in getattr(module, "lora_A", ()):
        return
    down, up = module.lora_A[name], module.lora_B[name]
    added = linear(up, linear(down, hidden[indices].to(down.weight.dtype)))  # (n, N)
    total = output[indices] + added * module.scaling[name]
    output.index_copy_(0, indices, total.to(output.dtype))


def _base_linear(module: Any, tokens: TokenPositions) -> Any:
    """The Linear in PEFT's layer, if the layers serve adapters."""
    return module if tokens.adapters is None else getattr(module, "base_layer", module)


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
    """In the order of `ops.Layer`, with adapters."""
    attention, mlp = layer.self_attn, layer.mlp
    key, value = (module_pair(attention, name)[0] for name in ("k_proj", "v_proj"))
    projections = [attention.q_proj, key, value, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_supported(
    layer: Any, linears: Sequence[Any], tokens: TokenPositions, dtype: torch.dtype
) -> bool:
    """Whether `ops.decoder_layers` supports all of a layer's modules for tokens of this dtype."""
    return (
        linears[0].in_features % ops.WIDTH == 0
        and all(norm.weight.dtype == dtype for norm in _text_norms(layer))
        and all(_has_kernel(_base_linear(linear, tokens), dtype) for linear in linears)
        and all(
            low_rank.weight.dtype == dtype
            and low_rank.weight.is_contiguous()
            and low_rank.bias is None
            for linear in linears
            for _, _, *pair in _lora_pairs(linear, tokens)
            for low_rank in pair
        )
    )


def _has_kernel(module: Any, dtype: torch.dtype) -> bool:
    if type(module) is QuantizedLinear:
        is_supported = not module.padding
    else:
        is_supported = type(module) is nn.Linear and module.weight.dtype == dtype
        is_supported = is_supported and ops.supports(module.weight)
    return is_supported and (module.bias is None or module.bias.dtype == dtype)
