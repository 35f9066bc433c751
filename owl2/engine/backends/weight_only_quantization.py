"""Weight-only quantization to 8 or 4 bits for inference: the decoder's Linears, after loading.

Each generated token reads every weight once, so half the bytes give nearly twice the speed.
Weights of 8 bits have one scale for each row. Weights of 4 bits have a scale and a shift for each
64 values of a row, its groups: ``weight = integer * scale + shift``.
The CPU kernels multiply integers: they convert the inputs of a Linear to 16 bits, or to 8 bits on
request, with one scale for each 64 values. The vision encoder and the abstractor are not quantized,
and the head has 8 bits in either case: they have few of the weights, but a large effect on the
answer.

Weights and scales of groups are stored in blocks of 16 rows, as the vectors of the kernels need
them: the first four bytes of each row, then the next four bytes of each row, and so on
(`to_blocks`).

Shapes: N outputs and K inputs of a Linear.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available

BITS = {"8bit": 8, "4bit": 4}
ACTIVATION_BITS = (16, 8)
GROUP = ops.GROUP
BLOCK_ROWS = 16
# Weights that are quantized at a time, so that temporary tensors stay in the caches.
WEIGHTS_AT_A_TIME = 2**20


class QuantizedLinear(nn.Module):
    """A Linear with an integer weight and scales. The weight is constant; the input has gradients.

    Args:
        linear: With floating-point weights; on the meta device for a module without values.
        bits: 8 or 4.

    Attributes:
        bits: 8 or 4.
        activation_bits: 16 or 8, of the integers to which the CPU kernels convert inputs; it is not
            part of a checkpoint. 16 is at least as precise as bfloat16.
        weight: Rows in blocks (N / 16, K / 4, 64) or, for 4 bits, (N / 16, K / 8, 64), uint8. N and
            K are rounded up to multiples of 16 and 64. A row has for 8 bits K bytes, the value +
            128, and for 4 bits K / 2 bytes, the value + 8: byte i of a group of 64 has the values i
            and i + 32.
        scale: For 8 bits float32 (N,). For 4 bits the scale and the shift of each group, bfloat16
            in blocks (N / 16, K / 64, 32).
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.activation_bits = 16
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.padding = -self.in_features % GROUP  # zeros at the end of each row
        weight, scale = quantize_linear(linear.weight.detach(), bits)
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Called by `to` and similar methods; the scale keeps its dtype."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N). Without the kernels, the weight is converted to the dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.forward_with_gradients(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not _has_kernels(x):
            return F.linear(x, self.dequantize(x.dtype), bias)
        tokens = F.pad(x.reshape(-1, self.in_features), (0, self.padding)).contiguous()
        quantized = self.weight, bias, self.scale, self.bits, self.activation_bits
        y = ops.linear(tokens, *quantized, rows=self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def forward_with_gradients(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` of an input whose gradient is needed; under autocast, in its dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: torch.Tensor = _ConstantLinear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype, use_kernels: bool = False) -> torch.Tensor:
        """The weight (N, K) in a floating-point dtype."""
        width = self.in_features
        if use_kernels:
            shape = self.out_features, width + self.padding
            return ops.dequantize(self.weight, self.scale, self.bits, shape, dtype)[:, :width]
        if self.bits == 8:
            return (self.groups()[:, :width] * self.scale[:, None]).to(dtype)
        scale, shift = split_scale(from_blocks(self.scale, self.out_features).unflatten(1, (-1, 2)))
        return (self.groups() * scale + shift).flatten(1)[:, :width].to(dtype)

    def groups(self) -> torch.Tensor:
        """The integers that share a scale, float32: (N, K / 64, 64) for 4 bits, (N, K) for 8."""
        rows = from_blocks(self.weight, self.out_features)
        if self.bits == 8:
            return rows.float() - 128
        pairs = rows.unflatten(1, (-1, GROUP // 2))  # (N, K / 64, 32)
        return torch.cat([pairs & 15, pairs >> 4], dim=2).float() - 8


def split_scale(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and shifts of groups (N, K / 64, 2) as float32 (N, K / 64, 1) each."""
    scales, shifts = scale.float().split(1, dim=2)
    return scales, shifts


def to_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, U) of a multiple of four bytes in blocks of 16: (N / 16, U / 4 bytes, 64 bytes).

    N is rounded up with rows of zeros.
    """
    units = rows.flatten().view(torch.int32).view(len(rows), -1)
    units = F.pad(units, (0, 0, 0, -len(units) % BLOCK_ROWS)).unflatten(0, (-1, BLOCK_ROWS))
    blocks = units.transpose(1, 2)  # (N / 16, U, 16)
    return blocks.flatten().view(rows.dtype).view(*blocks.shape[:2], -1)


def from_blocks(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows (N, U) that `to_blocks` arranged."""
    units = blocks.view(torch.int32).transpose(1, 2).flatten(0, 1)[:rows]
    units = units.clone(memory_format=torch.contiguous_format)  # the view of one row has strides
    return units.view(blocks.dtype)


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Set the `activation_bits` of a model's quantized Linears to one of `ACTIVATION_BITS`."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activation_bits = bits


class _ConstantLinear(torch.autograd.Function):
    """A product with a quantized weight; the backward pass dequantizes the weight again.

    Autograd would save the dequantized weight of every layer until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: QuantizedLinear) -> torch.Tensor:
        ctx.module = module
        return F.linear(x, module.dequantize(x.dtype, _has_kernels(x)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.dequantize(gradient.dtype, _has_kernels(gradient)), None


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether the CPU kernels support tokens like these."""
    return x.device.type == "cpu" and x.dtype in ops.DTYPES and available()


def quantize_linear(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `weight` and the `scale` of a `QuantizedLinear`.

    Args:
        weight: (N, K), floating-point; on the meta device for results without values.
        bits: 8 or 4.
    """
    if weight.is_meta:
        blocks, groups = -(-len(weight) // BLOCK_ROWS), -(-weight.shape[1] // GROUP)
        packed = weight.new_empty(blocks, groups * GROUP * bits // 32, 64, dtype=torch.uint8)
        if bits == 8:
            return packed, weight.new_empty(len(weight), dtype=torch.float32)
        return packed, weight.new_empty(blocks, groups, 2 * BLOCK_ROWS, dtype=torch.bfloat16)
    quantize_rows = quantize_to_8_bits if bits == 8 else quantize_to_4_bits
    padding = -weight.shape[1] % GROUP
    parts = weight.split(BLOCK_ROWS * max(1, WEIGHTS_AT_A_TIME // BLOCK_ROWS // weight.shape[1]))
    weights, scales = zip(*(quantize_rows(F.pad(p, (0, padding))) for p in parts), strict=True)
    return torch.cat(weights), torch.cat(scales)


def quantize_to_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to the `weight` and the `scale` of a `QuantizedLinear`."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return pack((weight / scale[:, None]).round(), scale, 8)


def quantize_to_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to the `weight` and the `scale` of a `QuantizedLinear`.

    The range is -8 to 7; its ends are the smallest and the largest value of a group.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K / 64, 64)
    scale = scales_of_range(groups.amin(2), groups.amax(2))
    scales, shifts = split_scale(scale)
    values = ((groups - shifts) / scales).round().clamp(-8, 7)
    return pack(values.flatten(1), scale, 4)


def scales_of_range(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The scales and shifts (N, K / 64, 2) that map the ends of a range (N, K / 64) to -8 and 7."""
    scale = ((high - low) / 15).bfloat16()
    shift = (low + high) / 2 + scale.float() / 2
    # A group of equal values is 0 times a scale, plus a shift.
    return torch.stack([torch.where(scale == 0, 1, scale), shift.bfloat16()], -1)


def pack(values: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `weight` and the `scale` of a `QuantizedLinear`.

    Args:
        values: (N, K) integers of any dtype, -128 to 127 or -8 to 7; K is a multiple of 64.
        scale: (N,), or (N, K / 64, 2) for 4 bits.
    """
    if bits == 8:
        return to_blocks((values + 128).to(torch.uint8)), scale
    low, high = (values + 8).to(torch.uint8).unflatten(1, (-1, GROUP)).chunk(2, dim=2)
    return to_blocks((low | high << 4).flatten(1)), to_blocks(scale.flatten(1))
