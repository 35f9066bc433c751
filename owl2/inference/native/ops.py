"""The CPU kernels for tensors. No gradients; `kernels.cpp` says how they work.

Shapes: M tokens, K numbers in and N out of a Linear; B sequences, h key-value heads of width d.
"""

import ctypes
from functools import cache
from typing import Any

import torch

from owl2.inference.native.build import library

MOST_TOKENS = 32  # beyond, torch's own matrix product is faster
GROUP = 64  # numbers of 4 bits that share a scale
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # what K and d must be multiples of


POINTER, COUNT, THREADS, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS = {
    "linear": [ctypes.c_int, *[POINTER] * 5, *[COUNT] * 3, THREADS],
    "expand": [ctypes.c_int, *[POINTER] * 3, *[COUNT] * 2, THREADS],
    "rms_norm": [*[POINTER] * 3, *[COUNT] * 2, NUMBER],
    "swiglu": [*[POINTER] * 3, COUNT],
    "attend": [*[POINTER] * 10, *[COUNT] * 5, NUMBER, THREADS],
}


@cache
def function(name: str, dtype: torch.dtype) -> Any:
    """A kernel for a dtype.

    Raises:
        NotBuilt: see `build.library`.
    """
    kernel = getattr(library(), f"{name}_{DTYPES[dtype]}")
    kernel.argtypes, kernel.restype = ARGUMENTS[name], None
    return kernel


def fits(weight: torch.Tensor) -> bool:
    """Whether `linear` takes this (N, K) weight of floats."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % STEPS[weight.dtype] == 0
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for few tokens, contiguous: (M, K) to (M, N).

    Args:
        weight: (N, K) of x's dtype; or with `bits` uint8, (N, K) of 8 or (N, K / 2) of 4 bits.
        scale: of whole numbers, float32: (N,) for 8 bits, (N, K / 64) for 4.
    """
    tokens, width = x.shape
    rows = weight.shape[0]
    y = x.new_empty(tokens, rows)
    function("linear", x.dtype)(
        bits,
        x.data_ptr(),
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        rows,
        width,
        torch.get_num_threads(),
    )
    return y


def expand(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Whole numbers, see `linear`, as an (N, K) matrix of `dtype`; `width` is K."""
    out = torch.empty(len(weight), width, dtype=dtype)
    function("expand", dtype)(
        bits,
        weight.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        *out.shape,
        torch.get_num_threads(),
    )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """LLaMA's norm of (M, K), contiguous."""
    y = torch.empty_like(x)
    function("rms_norm", x.dtype)(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, epsilon)
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, of the same shape, contiguous."""
    y = torch.empty_like(gate)
    function("swiglu", gate.dtype)(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
    return y


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """B tokens, turned to their positions, kept, and each attending to its sequence up to there.

    Args:
        query: (B, heads, d), written over.
        key, value: (B, h, d).
        turn: cosines and sines of the positions, (B, d) each.
        rows, positions: (B,), int64: of the cache; several may be of one row.
        keys, values: the cache, (R, h, C, d), a row a sequence.

    Returns:
        (B, heads, d)
    """
    out = torch.empty_like(query)
    tensors = (query, key, value, *turn, rows, positions, keys, values, out)
    function("attend", query.dtype)(
        *(tensor.data_ptr() for tensor in tensors),
        *query.shape[:2],
        *keys.shape[1:],
        scaling,
        torch.get_num_threads(),
    )
    return out
