"""The CPU kernels for tensors. No gradients; `kernels.cpp` says how they work.

Shapes: M tokens, K numbers in and N out of a Linear; B tokens of sequences, h key-value heads, d
head width.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from owl2.engine.backends.native.build import library

MOST_TOKENS = 72  # beyond, torch's own matrix product is faster
ALONE = 2**18  # multiplications that one thread does sooner than several meet
GROUP = 64  # numbers of 4 bits that share a scale
WIDE = 16  # numbers that are computed at once
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # what K and d must be multiples of


POINTER, COUNT, THREADS, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Matrix(ctypes.Structure):
    """`products.h`'s: a Linear's weight, (N, K)."""

    _fields_ = [
        ("weight", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("bits", COUNT),
        ("rows", COUNT),
    ]


class Places(ctypes.Structure):
    """`attention.h`'s: where B tokens stand, and their sequences' keys and values."""

    _fields_ = [
        *((name, POINTER) for name in ("cos", "sin", "rows", "positions", "keys", "values")),
        *((name, COUNT) for name in ("B", "h", "C", "d")),
    ]


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class Layer(ctypes.Structure):
    """`kernels.cpp`'s: a decoder layer, and where its tokens are."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        ("norm", POINTER),
        ("second_norm", POINTER),
        ("places", Places),
        ("D", COUNT),
        ("heads", COUNT),
        ("epsilon", NUMBER),
        ("second_epsilon", NUMBER),
        ("scaling", NUMBER),
    ]


ARGUMENTS = {
    "linear": [*[POINTER] * 3, *[COUNT] * 2, THREADS],
    "expand": [*[POINTER] * 2, COUNT, THREADS],
    "rms_norm": [*[POINTER] * 3, *[COUNT] * 2, NUMBER, THREADS],
    "swiglu": [*[POINTER] * 2, COUNT, THREADS],
    "keep": [*[POINTER] * 3, THREADS],
    "attend": [*[POINTER] * 3, COUNT, NUMBER, THREADS],
    "steps": [POINTER, COUNT, POINTER, THREADS],
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


def matrix(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bits: int = 0,
) -> Matrix:
    """A Linear for `steps`; see `linear`.

    Raises:
        TypeError: a scale that is not float32.
    """
    if scale is not None and scale.dtype != torch.float32:
        raise TypeError(f"scale is {scale.dtype}; the kernels read float32")
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
    """``x @ weight.T + bias`` for few tokens, contiguous: (M, K) to (M, N).

    Args:
        weight: (N, K) of x's dtype; or with `bits` uint8, (N, K) of 8 or (N, K / 2) of 4 bits.
        scale: of whole numbers, float32: (N,) for 8 bits, (N, K / 64) for 4.
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


def expand(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Whole numbers, see `linear`, as an (N, K) matrix of `dtype`; `width` is K."""
    out = torch.empty(len(weight), width, dtype=dtype)
    own = matrix(weight, None, scale, bits)
    call("expand", dtype, out.numel(), ctypes.byref(own), out.data_ptr(), width)
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """LLaMA's norm of (M, K), contiguous; K is a multiple of 16."""
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
    """``silu(gate) * up`` in place of `gate`; both contiguous and of one shape."""
    call("swiglu", gate.dtype, 8 * gate.numel(), gate.data_ptr(), up.data_ptr(), gate.numel())
    return gate


def places(
    turn: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Places:
    """Where B tokens are.

    Args:
        turn: cosines and sines of the positions, (B, d) each, contiguous.
        rows, positions: (B,), int64: where in the cache; several may be of one row.
        keys, values: the cache, (R, h, C, d), a row a sequence.
    """
    tensors = (*turn, rows, positions, keys, values)
    return Places(*(tensor.data_ptr() for tensor in tensors), len(rows), *keys.shape[1:])


def keep(at: Places, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write keys, turned to their positions, and values into the cache: (B, h, d) each."""
    call("keep", key.dtype, 4 * key.numel(), ctypes.byref(at), key.data_ptr(), value.data_ptr())


def attend(at: Places, query: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """Queries (B, heads, d), written over, each over its row of the cache up to its position."""
    out = torch.empty_like(query)
    work = 64 * query.numel()  # at least: how many positions each looks at is not known here
    pointers = ctypes.byref(at), query.data_ptr(), out.data_ptr()
    call("attend", query.dtype, work, *pointers, heads, scaling)
    return out


def layer(
    width: int,
    matrices: Sequence[Matrix],
    norms: Sequence[tuple[torch.Tensor, float]],
    at: Places,
    heads: int,
    scaling: float,
) -> Layer:
    """A decoder layer for `steps`.

    Args:
        width: D.
        matrices: in the order of `MATRICES`.
        norms: weight (D,) and epsilon of the two RMSNorms.
        heads: of the queries.
    """
    (norm, epsilon), (second, second_epsilon) = norms
    pointers = norm.data_ptr(), second.data_ptr()
    return Layer(*matrices, *pointers, at, width, heads, epsilon, second_epsilon, scaling)


def steps(hidden: torch.Tensor, layers: Sequence[Layer]) -> None:
    """Decoder layers of one shape, one after the other, for B tokens, hidden (B, D) in place."""
    first = layers[0]
    work = sum(getattr(first, name).rows for name in MATRICES) * hidden.numel()  # a layer's, about
    all_layers = (Layer * len(layers))(*layers)
    call("steps", hidden.dtype, work, all_layers, len(layers), hidden.data_ptr())


def call(name: str, dtype: torch.dtype, work: int, *arguments: Any) -> None:
    """A kernel with as many threads as torch uses; with one for little work."""
    function(name, dtype)(*arguments, 1 if work < ALONE else torch.get_num_threads())
