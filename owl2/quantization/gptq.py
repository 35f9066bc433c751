"""GPTQ: rounding of a Linear's weight that keeps its output on calibration inputs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with columns in the order of their effect and scales that are chosen before
the first column is rounded, so that groups remain contiguous. Three additions:

- The target is the output on the inputs of the model before quantization, not on those that
  the quantized layers before it compute (arXiv 2504.09629, "Quantization Error Propagation").
- The scales and shifts are fitted to the rounded values by least squares.
- The values are rounded again one column at a time, with all others fixed (arXiv 2309.01885,
  "QuantEase").

Shapes: N outputs and K inputs of a Linear, G groups of a row, T calibration tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from owl2.engine.backends.weight_only_quantization import GROUP, scales_of_range

BLOCK = 64  # columns whose errors are propagated to the following columns together
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to the diagonal
PROPAGATION = 0.5  # share of the earlier layers' error that a layer corrects
SHRINKS = torch.linspace(1.0, 0.6, 21)  # of the scale that represents the largest value
ROUNDS = 2  # of least squares for the scales and coordinate descent for the values
LIMITS = {4: (-8, 7), 8: (-127, 127)}


@dataclass
class InputStatistics:
    """Sums over the calibration tokens of a Linear.

    Attributes:
        hessian: (K, K), the sum of x xᵀ; x are the inputs (K,) in the quantized model.
        shift: (K, K), the sum of (x' - x) xᵀ; x' are the inputs in the original model.
        tokens: T.
    """

    hessian: torch.Tensor
    shift: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> "InputStatistics":
        """Statistics of K inputs without tokens."""
        return cls(torch.zeros(width, width), torch.zeros(width, width))

    def padded(self, count: int) -> "InputStatistics":
        """Statistics with `count` further inputs that are 0."""
        pads = (0, count, 0, count)
        return InputStatistics(F.pad(self.hessian, pads), F.pad(self.shift, pads), self.tokens)

    def add(self, inputs: torch.Tensor, original: torch.Tensor) -> None:
        """Add tokens: inputs of the quantized and of the original model, (T, K) each."""
        inputs, original = inputs.float(), original.float()
        self.hessian.addmm_(inputs.T, inputs)
        self.shift.addmm_((original - inputs).T, inputs)
        self.tokens += len(inputs)


def gptq(
    weight: torch.Tensor, statistics: InputStatistics, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (N, K). Without calibration tokens, the error of the weight is minimized.

    Args:
        weight: K is a multiple of 64.
        bits: 8 or 4.

    Returns:
        The values, float32 (N, K) with integers in `LIMITS[bits]`, and the `scale` of a
        `QuantizedLinear`.
    """
    weight, hessian = weight.float(), torch.eye(weight.shape[1])
    energy = statistics.hessian.diagonal().mean()
    if energy > 0:
        hessian = statistics.hessian / energy + DAMPING * hessian
    factor = torch.linalg.cholesky(hessian)
    if energy > 0:
        change = weight @ (statistics.shift / energy)
        weight = weight + PROPAGATION * torch.cholesky_solve(change.T, factor).T
    importance = 1 / torch.cholesky_inverse(factor).diagonal()
    scales, shifts = search_scales(weight, importance, bits)
    values = _round_columns(weight - _columns(shifts, weight), hessian, scales, bits)
    for _ in range(ROUNDS):
        scales = _fit_scales(weight - _columns(shifts, weight), hessian, values, scales)
        if bits == 4:
            shifts = _fit_shifts(weight - values * _columns(scales, weight), hessian, shifts)
        values = _descend(weight - _columns(shifts, weight), hessian, values, scales, bits)
    scale = scales[:, 0] if bits == 8 else torch.stack([scales, shifts], -1).bfloat16()
    return values, scale


def _columns(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, G) to (N, K): the value of the group of each column."""
    return groups.repeat_interleave(weight.shape[1] // groups.shape[1], 1)


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and shifts (N, G) with the smallest squared error, among several ranges of each group.

    They have the precision of the stored ones. With 8 bits, a row is a group, and shifts are 0.

    Args:
        importance: (K,), the weight of the error of each column.
    """
    limits, group = LIMITS[bits], weight.shape[1] if bits == 8 else GROUP
    groups = weight.unflatten(1, (-1, group))  # (N, G, group)
    importance = importance.unflatten(0, (-1, group))  # (G, group)
    low, high = groups.amin(2), groups.amax(2)  # (N, G)
    if bits == 8:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(high, torch.inf)
    found = torch.stack([torch.ones_like(high), torch.zeros_like(high)])
    for shrink in SHRINKS:
        middle, half = (low + high) / 2, shrink * (high - low) / 2
        if bits == 8:
            scales = torch.where(half == 0, 1, half / limits[1])
            candidate = torch.stack([scales, torch.zeros_like(scales)])
        else:
            candidate = scales_of_range(middle - half, middle + half).float().movedim(2, 0)
        scales, shifts = candidate[..., None]
        rounded = ((groups - shifts) / scales).round_().clamp_(*limits).mul_(scales).add_(shifts)
        error = (rounded.sub_(groups).square_() * importance).sum(2)
        found = torch.where(error < best, candidate, found)
        best = torch.minimum(error, best)
    return found[0], found[1]


def _round_columns(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """GPTQ with fixed scales: each column's error is compensated by the following columns."""
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest = weight.T[order].contiguous()  # (K, N)
    scales = _columns(scales, weight).T[order]  # (K, N)
    values = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        block = slice(start, start + BLOCK)
        errors, own = rest[block].clone(), factor[block, block]
        for i in range(len(errors)):
            column, column_scale = errors[i], scales[start + i]
            rounded = (column / column_scale).round_().clamp_(*LIMITS[bits])
            values[start + i] = rounded
            error = (column - rounded * column_scale) / own[i, i]
            errors[i + 1 :].addr_(own[i, i + 1 :], error, alpha=-1)
            errors[i] = error
        rest[start + BLOCK :].addmm_(factor[block, start + BLOCK :].T, errors, alpha=-1)
    return values[order.argsort()].T.contiguous()


def _fit_scales(
    weight: torch.Tensor, hessian: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The scales (N, G) with the smallest output error for given values: least squares per row."""
    rows, num_groups = scales.shape
    group = weight.shape[1] // num_groups
    gram = torch.zeros(rows, num_groups, num_groups)
    split = values.unflatten(1, (-1, group))  # (N, G, group)
    for g in range(num_groups):
        products = split[:, g] @ hessian[g * group : (g + 1) * group]  # (N, K)
        gram[:, g] = (products.unflatten(1, (-1, group)) * split).sum(2)
    target = ((weight @ hessian).unflatten(1, (-1, group)) * split).sum(2)  # (N, G)
    # A group of zeros has no scale: any does.
    gram.diagonal(dim1=1, dim2=2).add_(1e-6 * hessian.diagonal().mean())
    fitted = torch.linalg.solve(gram, target)
    return fitted if num_groups == 1 else fitted.bfloat16().float()


def _fit_shifts(weight: torch.Tensor, hessian: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """The shifts (N, G) with the smallest output error, if `weight` is what they replace."""
    sums = hessian.unflatten(1, (shifts.shape[1], -1)).sum(2)  # (K, G)
    gram = sums.unflatten(0, (shifts.shape[1], -1)).sum(1)  # (G, G)
    gram.diagonal().add_(1e-6 * hessian.diagonal().mean())
    return torch.linalg.solve(gram, (weight @ sums).T).T.bfloat16().float()


def _descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Coordinate descent: each column is set to its best values while the others are fixed."""
    values, scales = values.T.contiguous(), _columns(scales, weight).T.contiguous()  # (K, N)
    scales = torch.where(scales == 0, 1.0, scales)
    gradient = hessian @ (values * scales - weight.T)  # (K, N)
    for start in range(0, len(values), BLOCK):
        block = slice(start, start + BLOCK)
        own, changes = gradient[block], torch.empty_like(gradient[block])
        for i in range(len(own)):
            k = start + i
            column = values[k] - own[i] / (hessian[k, k] * scales[k])
            rounded = column.round_().clamp_(*LIMITS[bits])
            changes[i] = (rounded - values[k]) * scales[k]
            values[k] = rounded
            own.addr_(hessian[k, block], changes[i])
        for others in (slice(0, start), slice(start + BLOCK, None)):
            gradient[others].addmm_(hessian[others, block], changes)
    return values.T.contiguous()
