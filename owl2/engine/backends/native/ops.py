"""The CPU kernels for tensors, without gradients. `kernels.cpp` explains how they work.

Shapes: M tokens, K inputs and N outputs of a Linear, h key-value heads, d head width, R rows and C
capacity of the cache.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from owl2.engine.backends.native.build import library

MAX_TOKENS = 72  # for more, torch's matrix product is faster
MIN_PARALLEL_WORK = 2**18  # multiplications; below, one thread is faster than several
GROUP = 64  # 4-bit values that share a scale
WIDTH = 16  # values of a SIMD vector
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # K and d must be multiples

POINTER, COUNT, THREADS, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Matrix(ctypes.Structure):
    """The struct of `matmul.h`: the weight of a Linear, (N, K)."""

    _fields_ = [
        ("weight", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("bits", COUNT),
        ("rows", COUNT),
    ]


class CacheSlots(ctypes.Structure):
    """The struct of `attention.h`: positions of M tokens, and the keys and values of their rows."""

    _fields_ = [
        *((name, POINTER) for name in ("cos", "sin", "rows", "positions", "keys", "values")),
        *((name, COUNT) for name in ("M", "h", "C", "d")),
    ]


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class Layer(ctypes.Structure):
    """The struct of `kernels.cpp`: a decoder layer and the positions of its tokens."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        ("norm", POINTER),
        ("second_norm", POINTER),
        ("slots", CacheSlots),
        ("D", COUNT),
        ("heads", COUNT),
        ("epsilon", FLOAT),
        ("second_epsilon", FLOAT),
        ("scaling", FLOAT),
    ]


ARGUMENTS = {
    "linear": [*[POINTER] * 3, *[COUNT] * 2, THREADS],
    "dequantize": [*[POINTER] * 2, COUNT, THREADS],
    "rms_norm": [*[POINTER] * 3, *[COUNT] * 2, FLOAT, THREADS],
    "swiglu": [*[POINTER] * 2, COUNT, THREADS],
    "write_kv": [*[POINTER] * 3, THREADS],
    "attention": [*[POINTER] * 3, COUNT, FLOAT, THREADS],
    "decoder_layers": [POINTER, COUNT, POINTER, THREADS],
}


@cache
def function(name: str, dtype: torch.dtype) -> Any:
    """A kernel for a dtype.

    Raises:
        BuildError: See `build.library`.
    """
    kernel = getattr(library(), f"{name}_{DTYPES[dtype]}")
    kernel.argtypes, kernel.restype = ARGUMENTS[name], None
    return kernel


def supports(weight: torch.Tensor) -> bool:
    """Whether `linear` supports this (N, K) weight without quantization."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % STEPS[weight.dtype] == 0
    )


def matrix(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
) -> Matrix:
    """A Linear for `decoder_layers`; see `linear`.

    Raises:
        TypeError: The scale is not float32.
    """
    if scale is not None and scale.dtype != torch.float32:
        raise TypeError(f"the scale is {scale.dtype}; the kernels read float32")
    return Matrix(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        bits,
        len(weight),
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for few tokens: (M, K), contiguous, to (M, N).

    Args:
        weight: (N, K) in the dtype of x; with `bits`, uint8: (N, K) of 8 or (N, K / 2) of 4 bits.
        scale: With `bits`, float32: (N,) for 8 bits, (N, K / 64) for 4.
    """
    y = x.new_empty(len(x), len(weight))
    own = matrix(weight, bias, scale, bits)
    call(
        "linear",
        x.dtype,
        y.numel() * x.shape[1],
        ctypes.byref(own),
        x.data_ptr(),
        y.data_ptr(),
        *x.shape,
    )
    return y


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """A quantized weight, see `linear`, as an (N, K) matrix of `dtype`; `width` is K."""
    out = torch.empty(len(weight), width, dtype=dtype)
    own = matrix(weight, None, scale, bits)
    call("dequantize", dtype, out.numel(), ctypes.byref(own), out.data_ptr(), width)
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The RMSNorm of (M, K), contiguous; K is a multiple of 16."""
    y = torch.empty_like(x) if out is None else out
    call(
        "rms_norm",
        x.dtype,
        4 * x.numel(),
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        *x.shape,
        epsilon,
    )
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in place of `gate`; both are contiguous and have the same shape."""
    call("swiglu", gate.dtype, 8 * gate.numel(), gate.data_ptr(), up.data_ptr(), gate.numel())
    return gate


def cache_slots(
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> CacheSlots:
    """Where M tokens are in one layer of the cache.

    Args:
        cos, sin: (M, d) the rotary embeddings of the positions, contiguous.
        rows, positions: (M,), int64; several tokens may be in the same row.
        keys, values: (R, h, C, d).
    """
    tensors = (cos, sin, rows, positions, keys, values)
    return CacheSlots(*(tensor.data_ptr() for tensor in tensors), len(rows), *keys.shape[1:])


def write_kv(slots: CacheSlots, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write keys, after rotating them to their positions, and values to the cache: (M, h, d)."""
    pointers = ctypes.byref(slots), key.data_ptr(), value.data_ptr()
    call("write_kv", key.dtype, 4 * key.numel(), *pointers)


def attention(slots: CacheSlots, query: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """Causal attention of queries (M, heads, d), which are overwritten, over their rows."""
    out = torch.empty_like(query)
    work = 64 * query.numel()  # a lower bound: the numbers of keys are not known here
    pointers = ctypes.byref(slots), query.data_ptr(), out.data_ptr()
    call("attention", query.dtype, work, *pointers, heads, scaling)
    return out


def layer(
    width: int,
    matrices: Sequence[Matrix],
    norms: Sequence[tuple[torch.Tensor, float]],
    slots: CacheSlots,
    heads: int,
    scaling: float,
) -> Layer:
    """A decoder layer for `decoder_layers`.

    Args:
        width: D.
        matrices: In the order of `MATRICES`.
        norms: Weight (D,) and epsilon of the two RMSNorms.
        heads: Query heads.
    """
    (norm, epsilon), (second, second_epsilon) = norms
    pointers = norm.data_ptr(), second.data_ptr()
    return Layer(*matrices, *pointers, slots, width, heads, epsilon, second_epsilon, scaling)


def decoder_layers(hidden: torch.Tensor, layers: Sequence[Layer]) -> None:
    """Decoder layers of the same shape, one after the other, for hidden (M, D) in place."""
    first = layers[0]
    work = sum(getattr(first, name).rows for name in MATRICES) * hidden.numel()  # of one layer
    arguments = (Layer * len(layers))(*layers)
    call("decoder_layers", hidden.dtype, work, arguments, len(layers), hidden.data_ptr())


def call(name: str, dtype: torch.dtype, work: int, *arguments: Any) -> None:
    """Run a kernel with torch's number of threads, or with one if there is little work."""
    num_threads = 1 if work < MIN_PARALLEL_WORK else torch.get_num_threads()
    function(name, dtype)(*arguments, num_threads)
