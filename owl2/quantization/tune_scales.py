"""Training of the scales of a quantized decoder on the predictions of the original one.

::

    hidden states ──quantized layers──► norm, head ──► KL divergence to the original's tokens
    scales        ◄──gradients, one layer at a time──

The integers are constant. One layer at a time is dequantized, in the forward and in the backward
pass, so that the memory is that of the quantized layers and of the hidden states of a step. Chen et
al., "EfficientQAT" (arXiv 2407.11062), train the same parameters after calibrating the layers.

Shapes: S positions of a sample, D width, N outputs and K inputs of a Linear, G groups of a row.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.quantization.calibrate import Hidden

LEARNING_RATE = 1e-3  # relative to each scale
SHIFT_UNIT = 4  # scales: a scale moves the largest values of a group by 8 times its change
BATCH = 2  # samples of a step
WARMUP = 5  # steps
BETAS = (0.9, 0.95)
# Of a sample: the output (1, S, D) of the original model's last layer, and the positions (S,) whose
# predictions are compared.
Target = tuple[torch.Tensor, torch.Tensor]


@dataclass
class LayerWeights:
    """The weights of a layer by their names in it.

    Attributes:
        plain: Norms, biases and Linears that are not quantized.
        quantized: The quantized Linears; their scales are trained.
    """

    plain: Mapping[str, torch.Tensor]
    quantized: Mapping[str, QuantizedLinear]

    def load_into(self, layer: nn.Module) -> None:
        """Set the parameters of a layer in float32; those of quantized Linears need gradients."""
        for name, parameter in layer.named_parameters():
            module = self.quantized.get(name.removesuffix(".weight"))
            parameter.requires_grad_(module is not None).grad = None
            value = self.plain[name] if module is None else module.dequantize(parameter.dtype)
            parameter.data.copy_(value)

    def scale_gradients(self, layer: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each scale, and its gradient from that of its weight in `layer`."""
        for name, module in self.quantized.items():
            gradient = layer.get_parameter(f"{name}.weight").grad
            if gradient is not None:  # not of a modality without tokens
                yield module.scale, module.scale_gradient(gradient)


@torch.enable_grad()
def tune_scales(
    layer: nn.Module,
    layers: Sequence[LayerWeights],
    samples: Sequence[Hidden],
    targets: Sequence[Target],
    head: Callable[[torch.Tensor], torch.Tensor],
    num_steps: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Train the scales in place.

    Args:
        layer: A decoder layer in float32, for the weights of each layer.
        samples: See `calibrate_layers`.
        targets: Of each sample.
        head: The norm after the last layer and the head, (S, D) to logits.
        progress: Called after each step.
    """
    scales = [module.scale for weights in layers for module in weights.quantized.values()]
    start = [scale.to(torch.float32, copy=True) for scale in scales]
    # What is trained is a change in these units, so that all steps have the same relative size.
    units = [_unit(scale) for scale in start]
    changes = [nn.Parameter(torch.zeros_like(unit)) for unit in units]
    positions = {id(scale): i for i, scale in enumerate(scales)}
    optimizer = torch.optim.Adam(changes, LEARNING_RATE, BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        ),
    )
    for step in range(num_steps):
        chosen = [(step * BATCH + i) % len(samples) for i in range(min(BATCH, len(samples)))]
        batch = [(samples[i], targets[i]) for i in chosen]
        for scale, gradient in _gradients(layer, layers, batch, head):
            i = positions[id(scale)]
            changes[i].grad = gradient * units[i]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            for scale, value, change, unit in zip(scales, start, changes, units, strict=True):
                scale.copy_(value + change * unit)
        progress()


def _unit(scale: torch.Tensor) -> torch.Tensor:
    """Of changes: a scale for itself, and a multiple of it for the shift of the same group."""
    return (
        torch.stack([scale[..., 0], SHIFT_UNIT * scale[..., 0]], -1) if scale.dim() == 3 else scale
    )


def _gradients(
    layer: nn.Module,
    layers: Sequence[LayerWeights],
    batch: Sequence[tuple[Hidden, Target]],
    head: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The scales and their gradients, of one layer after the other from the last one on."""
    inputs = [[hidden for (hidden, _), _ in batch]]  # of each layer, then the output
    for weights in layers:
        weights.load_into(layer)
        with torch.no_grad():
            pairs = zip(inputs[-1], batch, strict=True)
            inputs.append([layer(hidden, **options) for hidden, ((_, options), _) in pairs])
    gradients = []
    for hidden, (_, (target, mask)) in zip(inputs.pop(), batch, strict=True):
        hidden.requires_grad_(True)
        divergence(head(hidden[0, mask]), head(target[0, mask])).backward()
        gradients.append(hidden.grad)
    for weights in reversed(layers):
        weights.load_into(layer)
        for i, hidden in enumerate(inputs.pop()):
            given = hidden.detach().requires_grad_(True)
            layer(given, **batch[i][0][1]).backward(gradients[i])
            gradients[i] = given.grad
        yield from weights.scale_gradients(layer)


def divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target || logits) of logits (S, V), the mean of the positions."""
    predicted, wanted = (one.log_softmax(-1) for one in (logits, target))
    return F.kl_div(predicted, wanted.detach(), log_target=True, reduction="batchmean")
