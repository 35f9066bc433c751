"""Weights of 8 or 4 bits for answering: the decoder's Linears, rounded after loading.

One token reads every weight once, so half the bytes are nearly twice the speed. Only weights are
rounded, activations are not: 8 bits with a scale for each row (the largest weight is 127 steps),
4 bits with a scale for each 64 numbers of a row. Vision encoder and abstractor stay whole, as does
the head in 8 bits where the rest has 4: they are few of the weights, and what they get wrong all
the rest has to live with.

Shapes: N outputs, K inputs of a Linear.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from owl2.engine.backends.native import ops
from owl2.engine.backends.native.build import available
from owl2.errors import InputError

BITS = {"8bit": 8, "4bit": 4}
GROUP = ops.GROUP


class QuantisedLinear(nn.Module):
    """A Linear whose weight is whole numbers and scales; for answering only.

    Attributes:
        bits: 8 or 4.
        weight: uint8, (N, K) of 8 bits, the number + 128; (N, K / 2) of 4 bits, the number + 8:
            byte i of a group of 64 has the numbers i and i + 32. K is rounded up to 64s.
        scale: float32, (N,) for 8 bits, (N, K / 64) for 4.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.padding = -self.in_features % GROUP  # zeros behind a row, which the kernels need
        rounding = round_to_8_bits if bits == 8 else round_to_4_bits
        weight, scale = rounding(F.pad(linear.weight.detach(), (0, self.padding)))
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """torch's, which `to` and its kin call; the scale stays float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N). Many tokens go through the weight written out in their dtype."""
        native = x.device.type == "cpu" and x.dtype in ops.DTYPES and available()
        if native and x.numel() <= ops.MOST_TOKENS * self.in_features:
            tokens = F.pad(x.reshape(-1, self.in_features), (0, self.padding)).contiguous()
            y = ops.linear(tokens, self.weight, self.bias, self.scale, self.bits)
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.written_out(x.dtype, native), self.bias)

    def written_out(self, dtype: torch.dtype, native: bool = False) -> torch.Tensor:
        """The weight (N, K) that the numbers stand for."""
        width = self.in_features
        if native:
            padded = width + self.padding
            return ops.expand(self.weight, self.scale, self.bits, padded, dtype)[:, :width]
        if self.bits == 8:
            return ((self.weight[:, :width].float() - 128) * self.scale[:, None]).to(dtype)
        pairs = self.weight.unflatten(1, (-1, GROUP // 2))  # (N, K / 64, 32)
        numbers = torch.cat([pairs & 15, pairs >> 4], dim=2).float() - 8
        return (numbers * self.scale[..., None]).flatten(1)[:, :width].to(dtype)


def round_to_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to the numbers + 128, uint8 (N, K), and the scales (N,)."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((weight / scale[:, None]).round() + 128).to(torch.uint8), scale


def round_to_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to the numbers + 8, two a byte, uint8 (N, K / 2), and the scales (N, K / 64).

    There are 8 steps below 0 and 7 above: of the two scales that use them for the largest number,
    one negative to turn a positive one round, each group takes the one that errs less.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K / 64, 64)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (N, K / 64, 1)
    scales = torch.stack([extreme / -8, extreme.abs() / 7])  # (2, N, K / 64, 1)
    scales = torch.where(scales == 0, 1.0, scales)
    numbers = (groups / scales).round().clamp(-8, 7)  # (2, N, K / 64, 64)
    errors = (numbers * scales - groups).square().sum(-1, keepdim=True)
    first = errors[0] <= errors[1]
    scale = torch.where(first, scales[0], scales[1])[..., 0]
    chosen = (torch.where(first, numbers[0], numbers[1]) + 8).to(torch.uint8)
    low, high = chosen.chunk(2, dim=2)
    return (low | high << 4).flatten(1), scale.contiguous()


def require_bits(name: str) -> None:
    """Raise an InputError unless `name` is one of `BITS`."""
    if name not in BITS:
        raise InputError(f"quantize is {name!r}; it must be one of {', '.join(BITS)}")


@torch.no_grad()
def quantise(model: Any, name: str) -> None:
    """Round the Linears of a model's decoder layers and its head, one after the other, in place.

    Args:
        model: an `Owl2ForConditionalGeneration`; not to be trained afterwards.
        name: one of `BITS`.

    Raises:
        InputError: no such number of bits.
    """
    require_bits(name)
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for child_name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, child_name, QuantisedLinear(child, BITS[name]))
    model.lm_head = QuantisedLinear(model.lm_head, 8)
