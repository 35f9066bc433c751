"""The CPU kernels for tensors. No gradients; `kernels.cpp` says how they work.

Shapes: M tokens, K numbers in and N out of a Linear; B sequences, h key-value heads of width d.
"""

import ctypes
from collections.abc import Sequence
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
    "step": [POINTER, POINTER],
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


class Matrix(ctypes.Structure):
    """`kernels.cpp`'s: a Linear's weight, (N, K)."""

    _fields_ = [
        ("weight", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("bits", COUNT),
        ("rows", COUNT),
    ]


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class Layer(ctypes.Structure):
    """`kernels.cpp`'s: a decoder layer, and where its tokens are."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, POINTER) for name in ("norm", "second_norm", "cos", "sin", "rows", "positions")),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, COUNT) for name in ("B", "D", "heads", "h", "C", "d")),
        ("epsilon", NUMBER),
        ("second_epsilon", NUMBER),
        ("scaling", NUMBER),
        ("threads", THREADS),
    ]


def matrix(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
) -> Matrix:
    """A Linear for `step`; see `linear`."""
    return Matrix(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        bits,
        len(weight),
    )


def step(
    hidden: torch.Tensor,
    matrices: Sequence[Matrix],
    norms: Sequence[tuple[torch.Tensor, float]],
    turn: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
    scaling: float,
) -> None:
    """A decoder layer for B tokens, hidden (B, D) in place.

    Args:
        matrices: in the order of `MATRICES`.
        norms: weight (D,) and epsilon of the two RMSNorms.
        turn: cosines and sines of the positions, (B, d) each, contiguous.
        rows, positions: (B,), int64: where in the cache; several may be of one row.
        keys, values: the cache, (R, h, C, d), a row a sequence; written to.
        heads: of the queries.
    """
    (norm, epsilon), (second, second_epsilon) = norms
    tensors = (norm, second, *turn, rows, positions, keys, values)
    layer = Layer(
        *matrices,
        *(tensor.data_ptr() for tensor in tensors),
        *hidden.shape,
        heads,
        *keys.shape[1:],
        epsilon,
        second_epsilon,
        scaling,
        torch.get_num_threads(),
    )
    function("step", hidden.dtype)(ctypes.byref(layer), hidden.data_ptr())
