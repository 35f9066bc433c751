"""The CPU kernels for tensors, without gradients. `kernels.cpp` explains how they work.

Shapes: M tokens, K inputs and N outputs of a Linear, h key-value heads, d head width, R rows and C
capacity of the cache.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from owl2.engine.backends.native.build import kernels, library
from owl2.runtime import cpu_supports_amx

MAX_TOKENS = 72  # for more, see `is_fast`
MIN_PARALLEL_WORK = 2**18  # multiplications; below, one thread is faster than several
GROUP = 64  # 4-bit values that share a scale
WIDTH = 16  # values of a SIMD vector
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # K and d must be multiples


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Lora(ctypes.Structure):
    """The struct of `matmul.h`: LoRA of one adapter for a Linear and some of the tokens."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "down up tokens"),
        *_fields(ctypes.c_int64, "num_tokens rank"),
        *_fields(ctypes.c_float, "scaling"),
    ]


class Matrix(ctypes.Structure):
    """The struct of `matmul.h`: the weight of a Linear, (N, K), with LoRA of adapters."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "weight scale bias"),
        *_fields(ctypes.c_int64, "bits rows"),
        *_fields(ctypes.POINTER(Lora), "loras"),
        *_fields(ctypes.c_int64, "num_loras"),
    ]


class CacheSlots(ctypes.Structure):
    """The struct of `attention.h`: positions of M tokens, and the keys and values of their rows."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "cos sin rows positions keys values"),
        *_fields(ctypes.c_int64, "M h C d"),
    ]


class Layer(ctypes.Structure):
    """The struct of `kernels.cpp`: a decoder layer with its keys and values.

    The norms are two (D,) weights, D is `width`, and `heads` are those of the queries.
    """

    _fields_ = [
        *_fields(Matrix, "query key value output gate up down"),
        *_fields(ctypes.c_void_p, "norm second_norm keys values"),
        *_fields(ctypes.c_int64, "width heads"),
        *_fields(ctypes.c_float, "epsilon second_epsilon scaling"),
    ]


def supports(weight: torch.Tensor) -> bool:
    """Whether `linear` supports this (N, K) weight without quantization."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % STEPS[weight.dtype] == 0
        and weight.shape[1] > 0
    )


def is_fast(num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether `linear` without quantization is faster than torch's matrix product.

    torch is faster for many tokens where it uses AMX, and where the kernels have no instructions
    for bfloat16.
    """
    if num_tokens <= MAX_TOKENS:
        return True
    has_bf16 = dtype == torch.bfloat16 and kernels().instructions.endswith("BF16")
    return has_bf16 and not cpu_supports_amx()


def matrix(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
    loras: Sequence[Lora] = (),
    rows: int | None = None,
) -> Matrix:
    """A Linear for `decoder_layers`; see `linear`. Only `decoder_layers` computes `loras`.

    Raises:
        TypeError: The scale has another dtype.
    """
    if scale is not None and scale.dtype != (torch.float32 if bits == 8 else torch.bfloat16):
        raise TypeError(f"the kernels do not read a {scale.dtype} scale of {bits}-bit weights")
    tensors = (weight, scale, bias)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    array = (Lora * len(loras))(*loras) if loras else None
    return Matrix(*pointers, bits, rows or len(weight), array, len(loras))


def lora(down: torch.Tensor, up: torch.Tensor, scaling: float, tokens: torch.Tensor) -> Lora:
    """LoRA for a `Matrix`, without copies: (R, K) and (N, R) in the dtype of the tokens.

    Args:
        tokens: (n,) int64, the indices of the adapter's tokens.
    """
    pointers = [tensor.data_ptr() for tensor in (down, up, tokens)]
    return Lora(*pointers, len(tokens), len(down), scaling)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
    activation_bits: int = 16,
    rows: int | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``: (M, K), contiguous, to (M, N). See `is_fast`.

    Args:
        weight: (N, K) in the dtype of x; with `bits`, integers in blocks, see `QuantizedLinear`.
        scale: With `bits`, see `QuantizedLinear`.
        activation_bits: With `bits`, 16 or 8: of the integers to which x is converted.
        rows: N; with `bits`, `weight` has more rows if N is not a multiple of 16.
    """
    matrix_ = matrix(weight, bias, scale, bits, rows=rows)
    y = x.new_empty(len(x), matrix_.rows)
    _call("linear", y, y.numel() * x.shape[1], matrix_, x, y, *x.shape, activation_bits)
    return y


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """A quantized weight, see `linear`, as a matrix of `dtype` with this shape, (N, K)."""
    out = torch.empty(shape, dtype=dtype)
    matrix_ = matrix(weight, None, scale, bits, rows=shape[0])
    _call("dequantize", out, out.numel(), matrix_, out, shape[1])
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The RMSNorm of (M, K), contiguous; K is a multiple of 16."""
    y = torch.empty_like(x)
    _call("rms_norm", x, 4 * x.numel(), x, weight, y, *x.shape, epsilon)
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in place of `gate`; both are contiguous and have the same shape."""
    _call("swiglu", gate, 8 * gate.numel(), gate, up, gate.numel())
    return gate


def attention(
    slots: CacheSlots,
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor,
    heads: int,
    scaling: float,
) -> torch.Tensor:
    """Write keys and values (M, h * d) to the cache, and attend to rows up to each position.

    Keys and queries are rotated to their positions, queries in place.

    Args:
        query: (M, heads * d).

    Returns:
        (M, heads * d).
    """
    out = torch.empty_like(query)
    work = 64 * query.numel()  # a lower bound: the numbers of keys are not known here
    _call("attention", query, work, slots, key, value, query, out, heads, scaling)
    return out


def decoder_layers(
    hidden: torch.Tensor,
    layers: "ctypes.Array[Layer]",
    slots: CacheSlots,
    activation_bits: int = 16,
) -> None:
    """Decoder layers of the same shape, one after the other, for hidden (M, D) in place.

    Args:
        slots: Of the first layer; the layers have their own keys and values.
        activation_bits: For quantized weights, see `linear`.
    """
    first = layers[0]
    matrices = (first.query, first.key, first.value, first.output, first.gate, first.up, first.down)
    work = sum(matrix.rows for matrix in matrices) * hidden.numel()  # of one layer
    _call(
        "decoder_layers",
        hidden,
        work,
        layers,
        len(layers),
        slots,
        hidden,
        activation_bits,
    )


def _call(name: str, typed: torch.Tensor, work: int, *arguments: Any) -> None:
    """Run a kernel for a dtype with torch's number of threads, or with one for little work."""
    threads = 1 if work < MIN_PARALLEL_WORK else torch.get_num_threads()
    kernel = getattr(library(), f"{name}_{DTYPES[typed.dtype]}")
    kernel(*map(_as_c, (*arguments, threads)))


def _as_c(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    kinds: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
    return kinds.get(type(argument), ctypes.byref)(argument)
