"""The weights of a checkpoint, each quantized as it is read.

`owl2 quantize` writes these weights to a file, and `from_pretrained` loads them into a model, so
that both have the same values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from owl2.checkpoints.hf_quantizer import (
    UNQUANTIZED,
    Owl2QuantizationConfig,
    Owl2Quantizer,
)
from owl2.checkpoints.key_report import check_keys
from owl2.checkpoints.lazy_weights import LazyTensor, WeightReader
from owl2.checkpoints.weight_names import (
    EMBEDDINGS,
    EMBEDDINGS_WEIGHT,
    HEAD,
    HEAD_WEIGHT,
    released_name,
)
from owl2.engine.backends.weight_only_quantization import (
    QuantizedLinear,
    from_blocks,
    quantize_linear,
)
from owl2.errors import ErrorCode, InputError

# (released name of the module, weight (N, K), bits) to `weight` and `scale` of a QuantizedLinear.
QuantizeWeight = Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def round_to_nearest(
    name: str, weight: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_linear`, as a `QuantizeWeight`."""
    return quantize_linear(weight, bits)


@dataclass
class _QuantizedPair:
    """The two tensors of a quantized weight; the first that is read quantizes it."""

    quantize: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.values:
            weight, scale = self.quantize()
            self.values = {"weight": weight, "scale": scale}
        return self.values.pop(name)


def bits_of_weight(name: str, tensor: torch.Tensor, config: Owl2QuantizationConfig) -> int:
    """The bits of a stored tensor; `UNQUANTIZED` for all but the weights of quantized Linears."""
    module = name.removesuffix(".weight")
    is_matrix = name != module and tensor.dim() == 2 and tensor.is_floating_point()
    return config.bits_of(module) if is_matrix else UNQUANTIZED


def quantized_weights(
    reader: WeightReader,
    config: Owl2QuantizationConfig,
    quantize_weight: QuantizeWeight = round_to_nearest,
) -> dict[str, LazyTensor]:
    """The tensors of the quantized checkpoint by their stored names, in the order of the files.

    Raises:
        InputError: The embeddings cannot share the values of the head, because they are not tied.
    """
    weights: dict[str, LazyTensor] = {}
    embeddings = reader.stored_name(EMBEDDINGS_WEIGHT)
    bits, has_head = config.bits_of(HEAD), HEAD_WEIGHT in reader.tensors
    if has_head and config.bits_of(EMBEDDINGS) < UNQUANTIZED:
        raise InputError(
            "the checkpoint has a head of its own, so the embeddings cannot be shared with it",
            ErrorCode.UNSUPPORTED,
        )

    def add(stored: str, module: str, bits: int) -> None:
        pair = _QuantizedPair(lambda: quantize_weight(module, reader.read(stored), bits))
        for part in ("weight", "scale"):
            weights[f"{module}.{part}"] = LazyTensor(partial(pair.read, part))

    for name, tensor in reader.tensors.items():
        own = bits_of_weight(name, tensor, config)
        if own < UNQUANTIZED and name == embeddings:
            continue  # see `weights_to_load`
        if own < UNQUANTIZED:
            add(name, name.removesuffix(".weight"), own)
        else:  # a copy, which does not keep the file open
            weights[name] = LazyTensor(partial(reader.read_copy, name))
    if bits < UNQUANTIZED and not has_head and embeddings is not None:  # they are tied
        add(embeddings, HEAD, bits)
    return weights


def check_shapes(model: nn.Module, reader: WeightReader, quantizer: Owl2Quantizer) -> None:
    """Check the weights that are quantized while they are read: afterwards, they are padded.

    Raises:
        InputError: The shape of a weight does not fit the model.
    """
    if quantizer.pre_quantized:
        return
    stored = {released_name(name): tensor.shape for name, tensor in reader.tensors.items()}
    weights = {
        f"{released_name(name)}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    shapes = {key: (stored[key], own) for key, own in weights.items() if key in stored}
    check_keys("the checkpoint", shapes=shapes)


def weights_to_load(
    reader: WeightReader, quantizer: Owl2Quantizer, width: int
) -> dict[str, Any] | None:
    """The tensors of a model that is being loaded; None if transformers can read them itself.

    A quantized checkpoint with tied embeddings may not contain the embeddings: they are then the
    values of its head, which has 8 bits.

    Args:
        width: The number of values of an embedding; rows of the head are padded.
    """
    weights: dict[str, Any]
    embeddings = reader.stored_name(EMBEDDINGS_WEIGHT)
    if not quantizer.pre_quantized:
        weights = {**quantized_weights(reader, quantizer.quantization_config)}
        if embeddings is not None:  # also if the configuration shares them
            weights.setdefault(embeddings, LazyTensor(partial(reader.read_copy, embeddings)))
        return weights
    if embeddings is not None or f"{HEAD}.scale" not in reader.tensors:
        return None
    weights = {name: reader.read(name) for name in reader.tensors}  # memory-mapped
    scale = weights[f"{HEAD}.scale"]
    values = from_blocks(weights[HEAD_WEIGHT], len(scale))[:, :width].float() - 128
    return weights | {EMBEDDINGS_WEIGHT: values * scale[:, None]}
