"""GPTQ: rounding of a Linear's weight that keeps its output on calibration inputs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with columns in the order of their effect and scales that are chosen before
the first column is rounded, so that groups remain contiguous. Three additions:

- The target is the output on the inputs of the model before quantization, not on those that
  the quantized layers before it compute (arXiv 2504.09629, "Quantization Error Propagation").
- The scales are fitted to the rounded values by least squares.
- The values are rounded again one column at a time, with all others fixed (arXiv 2309.01885,
  "QuantEase").

Shapes: N outputs and K inputs of a Linear, G groups of a row, T calibration tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

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
    weight: torch.Tensor, statistics: InputStatistics, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (N, K). Without calibration tokens, the error of the weight is minimized.

    Args:
        group: Columns that share a scale; it divides K.

    Returns:
        The values, float32 (N, K) with integers in `LIMITS[bits]`, and their scales (N, K / group).
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
    scale = search_scales(weight, importance, bits, group)
    values = _round_columns(weight, hessian, scale, bits, group)
    for _ in range(ROUNDS):
        scale = _fit_scales(weight, hessian, values, group)
        values = _descend(weight, hessian, values, scale, bits, group)
    return values, scale


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """The scales (N, G) with the smallest squared error, among several of each sign.

    Args:
        importance: (K,), the weight of the error of each column.
    """
    low, high = LIMITS[bits]
    groups = weight.unflatten(1, (-1, group))  # (N, G, group)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (N, G, 1)
    importance = importance.unflatten(0, (-1, group))  # (G, group)
    best = torch.full_like(extreme, torch.inf)
    scale = torch.ones_like(extreme)
    # A negative scale maps the largest value to the longer end of the range.
    starts = (extreme / low, extreme.abs() / high) if -low > high else (extreme.abs() / high,)
    for start in starts:
        for shrink in SHRINKS:
            candidate = torch.where(start == 0, 1.0, start * shrink)
            rounded = (groups / candidate).round_().clamp_(low, high).mul_(candidate)
            error = (rounded.sub_(groups).square_() * importance).sum(2, keepdim=True)
            scale = torch.where(error < best, candidate, scale)
            best = torch.minimum(error, best)
    return scale[..., 0]


def _round_columns(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """GPTQ with fixed scales: each column's error is compensated by the following columns."""
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest = weight.T[order].contiguous()  # (K, N)
    scales = scale.T[order // group]  # (K, N)
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
    weight: torch.Tensor, hessian: torch.Tensor, values: torch.Tensor, group: int
) -> torch.Tensor:
    """The scales (N, G) with the smallest output error for given values: least squares per row."""
    rows, width = values.shape
    num_groups = width // group
    gram = torch.zeros(rows, num_groups, num_groups)
    split = values.unflatten(1, (-1, group))  # (N, G, group)
    for g in range(num_groups):
        products = split[:, g] @ hessian[g * group : (g + 1) * group]  # (N, K)
        gram[:, g] = (products.unflatten(1, (-1, group)) * split).sum(2)
    target = ((weight @ hessian).unflatten(1, (-1, group)) * split).sum(2)  # (N, G)
    # A group of zeros has no scale: any does.
    gram.diagonal(dim1=1, dim2=2).add_(1e-6 * hessian.diagonal().mean())
    return torch.linalg.solve(gram, target)


def _descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Coordinate descent: each column is set to its best values while the others are fixed."""
    values, scales = values.T.contiguous(), scale.T.repeat_interleave(group, 0)  # (K, N)
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
