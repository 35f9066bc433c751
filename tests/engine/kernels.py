"""Shared by the tests of the CPU kernels."""

import pytest
import torch
from torch.nn import functional as F

from owl2.engine.backends.native import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", ops.DTYPES)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(ours, theirs, dtype):
    assert ours.dtype == dtype
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert error < TOLERANCE[dtype]


def exact_product(x, quantized, activation_bits):
    """What the kernels compute, except for rounding in float: integers times integers."""
    limit = 127 if activation_bits == 8 else 32767
    groups = F.pad(x, (0, quantized.padding)).float().unflatten(1, (-1, 64))
    maxima = groups.abs().amax(2, keepdim=True)
    integers = (groups.double() * (limit / maxima.clamp(min=1e-30)).double()).round()
    tokens = (integers * (maxima / limit).double()).flatten(1)[:, : x.shape[1]]
    y = F.linear(tokens, quantized.dequantize(torch.float64))
    return y if quantized.bias is None else y + quantized.bias.double()
