"""Matrix products of a model's own modules on a CPU: in float32, or by the CPU kernels.

Products are in float32 for weights with 16 bits on CPUs without instructions for them.

Shapes: M tokens, K input and N output features.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available
from owl2.runtime import multiplies_in_float32

WEIGHT_ROWS = 1024  # of a weight that are converted at a time
# With fewer tokens the conversion of the weight takes longer than the products in 16 bits.
MIN_TOKENS = 8
PLAIN = torch.Tensor, nn.Parameter  # weights, in contrast to quantized ones


def linear_in_float32(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A Linear (..., K) to (..., N) with a weight in 16 bits, rounded once from float32.

    The weight is converted in blocks of rows, so that a large one needs little memory.
    """
    tokens = hidden.float()
    output = hidden.new_empty(*hidden.shape[:-1], len(weight))
    for start in range(0, len(weight), WEIGHT_ROWS):
        rows = slice(start, start + WEIGHT_ROWS)
        own = None if bias is None else bias[rows].float()
        output[..., rows] = F.linear(tokens, weight[rows].float(), own)
    return output


def cpu_products(hidden: torch.Tensor) -> AbstractContextManager:
    """A context in which Linears of many tokens like `hidden` are computed in the fastest way.

    They, and attention, are in float32 where `multiplies_in_float32`. Otherwise the CPU kernels
    compute the Linears if they are faster than torch. The results keep the dtype. Gradients cannot
    be computed.
    """
    if multiplies_in_float32(hidden):
        return _Float32Products()
    has_kernels = hidden.device.type == "cpu" and hidden.dtype in ops.DTYPES and available()
    if torch.is_grad_enabled() or not has_kernels:
        return nullcontext()
    is_fast = ops.is_fast(ops.MAX_TOKENS + 1, hidden.dtype)
    return _KernelProducts() if is_fast else nullcontext()


class _KernelProducts(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and not kwargs and _is_supported(*args):
            return _linear(*args)
        return function(*args, **(kwargs or {}))


def _is_supported(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> bool:
    """Whether the CPU kernels support a Linear."""
    return (
        type(weight) in PLAIN
        and weight.dtype == hidden.dtype
        and ops.supports(weight)
        and (bias is None or bias.dtype == hidden.dtype)
    )


def _linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A Linear (..., K) to (..., N) by the CPU kernels."""
    tokens = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    return ops.linear(tokens, weight, bias).view(*hidden.shape[:-1], len(weight))


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if function is F.linear and _has_many(args[0]) and type(args[1]) in PLAIN:
            return linear_in_float32(*args, **options)
        if function is F.scaled_dot_product_attention and _has_many(args[0]):
            to_float = partial(_to_float, dtype=args[0].dtype)
            wide, wide_options = pytree.tree_map(to_float, (args, options))
            return function(*wide, **wide_options).to(args[0].dtype)
        return function(*args, **options)


def _has_many(hidden: torch.Tensor) -> bool:
    """Whether (..., K) are many tokens in 16 bits."""
    return multiplies_in_float32(hidden) and hidden.numel() >= MIN_TOKENS * hidden.shape[-1]


def _to_float(value: Any, dtype: torch.dtype) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype == dtype
    return value.float() if is_narrow else value
