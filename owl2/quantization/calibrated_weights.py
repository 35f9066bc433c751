"""GPTQ for a checkpoint: the layers are read, calibrated and rounded one after the other.

Memory: one layer twice in float32, the vision encoder and the abstractor, the hidden states of the
samples twice in float32, the statistics of the widest Linear, and the rounded weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import UNQUANTIZED, Owl2QuantizationConfig
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.load_memory import loaded_size
from owl2.checkpoints.quantized_weights import round_to_nearest
from owl2.checkpoints.weight_files import COMPUTED_KEYS, weight_files
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.engine.backends.weight_only_quantization import GROUP, pack, split_scale
from owl2.errors import ErrorCode, InputError
from owl2.memory import require_memory
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.progress import ProgressReporter
from owl2.quantization.calibrate import calibrate_layers, first_hidden
from owl2.quantization.calibration_data import Inputs
from owl2.quantization.gptq import InputStatistics, gptq

STATISTICS = 7  # (K, K) matrices in float32 while a weight is rounded
ROUNDING = 8  # copies in float32 of the largest weight while it is rounded
Packed = tuple[torch.Tensor, torch.Tensor]  # `weight` and `scale` of a QuantizedLinear


def calibration_memory(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    quantization: Owl2QuantizationConfig,
    num_tokens: int,
) -> int:
    """An estimate of the bytes that GPTQ needs; the largest weight file is mapped in addition.

    Args:
        config: Of the model.
        tensors: The stored tensors by name, on the meta device.
        num_tokens: Of the calibration samples.
    """
    inner, width = config.intermediate_size, config.hidden_size
    first = "model.layers.0."
    layer = sum(t.numel() for name, t in tensors.items() if released_name(name).startswith(first))
    head = width * config.vocab_size
    result = loaded_size(tensors, None, quantization)
    # Per token: the inputs of the Linears in 16 bits; in float32 the hidden states of both models
    # and those before the first layer.
    tokens = num_tokens * (2 * (3 * width + inner) + 3 * 4 * width)
    statistics = 4 * STATISTICS * max(inner, width) ** 2
    rounding = 4 * ROUNDING * inner * width
    return tokens + result + statistics + rounding + 4 * (2 * layer + 2 * head)


class _FirstLayer(Owl2ForConditionalGeneration):
    """The model with a single layer, for checkpoints with more."""

    _keys_to_ignore_on_load_unexpected = [
        *Owl2ForConditionalGeneration._keys_to_ignore_on_load_unexpected,
        r"^(model\.layers|transformer\.h)\.(?!0\.)",
    ]


class CalibratedWeights:
    """A `QuantizeWeight` that rounds the decoder with GPTQ and other weights to nearest.

    All layers are processed when the first weight is requested.

    Args:
        source: The directory of the checkpoint.
        reader: Its weights.
        config: The bits of its Linears.
        inputs: Returns the arguments of the model for each calibration sample, in batches of one.

    Attributes:
        uncalibrated: Names of Linears that received no token: those of a modality that the samples
            do not have.
    """

    def __init__(
        self,
        source: Path,
        reader: WeightReader,
        config: Owl2QuantizationConfig,
        inputs: Callable[[], Iterable[Inputs]],
        console: Console | None = None,
    ) -> None:
        self.source, self.reader, self.config, self.inputs = source, reader, config, inputs
        self.console = console or Console(quiet=True)
        self.uncalibrated: list[str] = []

    def __call__(self, name: str, weight: torch.Tensor, bits: int) -> Packed:
        """The packed values and the scales of the Linear `name`."""
        packed = self._layers.pop(released_name(name), None)
        return packed or round_to_nearest(name, weight, bits)

    @cached_property
    def _layers(self) -> dict[str, Packed]:
        """The Linears of all layers by their released names."""
        config = read_config(self.source)
        given = list(self.inputs())
        if not given:
            raise InputError("there are no calibration samples", ErrorCode.EMPTY_DATASET)
        num_tokens = sum(inputs["input_ids"].numel() for inputs in given)
        require_memory(
            f"Calibrating with {num_tokens:,} tokens",
            calibration_memory(config, self.reader.tensors, self.config, num_tokens),
            max(file.stat().st_size for file in weight_files(self.source)),
            "Use fewer or shorter samples.",
        )
        count, config.num_hidden_layers = config.num_hidden_layers, 1
        model = _FirstLayer.from_pretrained(self.source, config=config, dtype=torch.float32)
        samples = [first_hidden(model.model, inputs) for inputs in given]
        layer = model.model.layers[0]
        del model, given  # the vision encoder and the images
        found: dict[str, Packed] = {}

        def round_weight(
            index: int, name: str, weight: torch.Tensor, statistics: InputStatistics
        ) -> torch.Tensor:
            full = released_name(f"model.layers.{index}.{name}")
            if (bits := self.config.bits_of(full)) >= UNQUANTIZED:
                return weight
            if not statistics.tokens:
                self.uncalibrated.append(full)
            found[full], rounded = round_linear(weight, statistics, bits)
            return rounded

        progress = ProgressReporter(self.console, "calibrating", total=count, unit="layers")
        with progress:
            layers = self._read_layers(layer, count, progress)
            calibrate_layers(layers, samples, round_weight)
        return found

    def _read_layers(
        self, layer: nn.Module, count: int, progress: ProgressReporter
    ) -> Iterator[nn.Module]:
        """The same module with the weights of each layer."""
        for index in range(count):
            prefix = f"model.layers.{index}."
            weights = {
                module_name(released_name(name)).removeprefix(prefix): self.reader.read(name)
                for name in self.reader.tensors
                if released_name(name).startswith(prefix) and not name.endswith(COMPUTED_KEYS)
            }
            layer.load_state_dict(weights)
            yield layer
            progress.advance()


def round_linear(
    weight: torch.Tensor, statistics: InputStatistics, bits: int
) -> tuple[Packed, torch.Tensor]:
    """Round a weight (N, K) with GPTQ in the format of `QuantizedLinear`.

    Returns:
        The packed values and scales, and the weight after rounding, float32.
    """
    width, padding = weight.shape[1], -weight.shape[1] % GROUP
    values, scale = gptq(F.pad(weight, (0, padding)), statistics.padded(padding), bits)
    if bits == 8:
        rounded = values * scale[:, None]
    else:
        scales, shifts = split_scale(scale)
        rounded = (values.view(*scales.shape[:2], -1) * scales + shifts).flatten(1)
    return pack(values, scale, bits), rounded[:, :width]
