"""Quantization of decoder layers, one after the other, with the activations of samples.

::

    samples ──embeddings, image encoder──► hidden states h' = h of each sample
    layer 0 ──► h' = layer(h'), h = quantized layer(h)
    layer 1 ──► ...

Within a layer the Linears are quantized in the order of their use, so that each is calibrated on
the inputs that the quantized model computes. A Linear of one modality (Specification §1.3)
receives only the tokens of this modality, so its statistics are those of this modality.

The outputs of some Linears are added to the hidden states. The norm of the next layer divides each
token's error by the size of its hidden state, so the statistics are divided by it. Otherwise the
first token, whose hidden state can be more than a hundred times larger than others, would have
almost all of the weight in some layers.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from owl2.quantization.gptq import InputStatistics

# Ends of the names of a layer's Linears, in the order of their use: LLaMA's, then Qwen's. Those of
# a stage have the same inputs.
STAGES = (
    ("q_proj", "k_proj", "v_proj", "c_attn"),
    ("o_proj", "attn.c_proj"),
    ("gate_proj", "up_proj", "w1", "w2"),
    ("down_proj", "mlp.c_proj"),
)
TO_HIDDEN = ("o_proj", "c_proj", "down_proj")  # their outputs are added to the hidden states
# Linears with the same inputs as another one of their modality, whose statistics they use.
SAME_INPUTS = {"v_proj": "k_proj", "up_proj": "gate_proj", "w2": "w1"}
Hidden = tuple[torch.Tensor, dict[str, Any]]  # (1, S, D), and the other arguments of a layer
Inputs = dict[str, torch.Tensor]  # (T, K) of Linears by their names in the layer
# (index of the layer, name of a Linear in it, weight, statistics) to the rounded weight.
RoundWeight = Callable[[int, str, torch.Tensor, InputStatistics], torch.Tensor]


class _Stop(Exception):
    """Ends a forward pass whose remaining results are not used."""


@torch.no_grad()
def first_hidden(model: Any, inputs: Mapping[str, torch.Tensor]) -> Hidden:
    """What the first layer of an `Owl2Model` receives for its arguments `inputs`, in float32."""
    captured: list[Hidden] = []

    def capture(_: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        captured.append((args[0], kwargs))
        raise _Stop

    handle = model.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    with suppress(_Stop):
        model(**inputs, use_cache=False)
    handle.remove()
    [(hidden, arguments)] = captured
    rotation = tuple(part.float() for part in arguments["position_embeddings"])
    return hidden.float(), arguments | {"position_embeddings": rotation}


@torch.no_grad()
def calibrate_layers(
    layers: Iterable[nn.Module], samples: Iterable[Hidden], round_weight: RoundWeight
) -> None:
    """Round the weights of the Linears in each layer, in place.

    Args:
        layers: The decoder's layers in order, in float32. A layer is not used after the next one
            is requested, so both can be the same object with other weights.
        samples: See `first_hidden`.
    """
    hidden, arguments = map(list, zip(*samples, strict=True))
    originals = list(hidden)
    for index, layer in enumerate(layers):
        wanted: list[Inputs] = []  # of each sample; 16 bits, because they are many
        sizes: list[torch.Tensor] = []  # (S, 1) of each sample's hidden states after the layer
        for i, options in enumerate(arguments):
            inputs, originals[i] = _run(layer, originals[i], options, range(len(STAGES)))
            wanted.append({name: given.bfloat16() for name, given in inputs.items()})
            sizes.append(originals[i].square().mean(2).sqrt().T)
        for stage in range(len(STAGES)):
            linears = dict(_linears(layer, [stage]))
            statistics = {
                name: InputStatistics.empty(linear.in_features)
                for name, linear in linears.items()
                if _source_of(name, linears) == name
            }
            for i, options in enumerate(arguments):
                inputs, _ = _run(layer, hidden[i], options, [stage])
                for name, given in inputs.items():
                    size = sizes[i] if name.endswith(TO_HIDDEN) else 1
                    statistics[name].add(given / size, wanted[i].pop(name) / size)
            for name, linear in linears.items():
                known = statistics[_source_of(name, linears)]
                linear.weight.copy_(round_weight(index, name, linear.weight, known))
        for i, options in enumerate(arguments):
            hidden[i] = layer(hidden[i], **options)


def _source_of(name: str, names: Collection[str]) -> str:
    """The Linear among `names` whose statistics the Linear `name` uses."""
    prefix, dot, own = name.rpartition(".")
    source = prefix + dot + SAME_INPUTS.get(own, own)
    return source if source in names else name  # K and V may have weights of other modalities


def _linears(layer: nn.Module, stages: Iterable[int]) -> Iterator[tuple[str, nn.Linear]]:
    ends = tuple(f".{name}" for stage in stages for name in STAGES[stage])
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and f".{name}".endswith(ends):
            yield name, module


def _run(
    layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any], stages: Sequence[int]
) -> tuple[Inputs, torch.Tensor]:
    """The inputs of the Linears of some stages that have own statistics, and the layer's output.

    Without the last stage, the layer is not run to its end, and the output is `hidden`. A Linear
    without tokens is not called and has no inputs.
    """
    inputs: Inputs = {}

    def hook(linear: nn.Linear, function: Callable[[torch.Tensor], None]) -> Any:
        return linear.register_forward_pre_hook(lambda _, args: function(args[0]))

    def record(name: str) -> Callable[[torch.Tensor], None]:
        return lambda given: inputs.update({name: given.flatten(0, -2)})

    def stop(_: torch.Tensor) -> None:
        raise _Stop

    following = [stage for stage in (stages[-1] + 1,) if stage < len(STAGES)]
    linears = dict(_linears(layer, stages))
    handles = [
        hook(linear, record(name))
        for name, linear in linears.items()
        if _source_of(name, linears) == name
    ]
    handles += [hook(linear, stop) for _, linear in _linears(layer, following)]
    with suppress(_Stop):
        hidden = layer(hidden, **arguments)
    for handle in handles:
        handle.remove()
    return inputs, hidden
