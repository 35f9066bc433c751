"""GPTQ for a checkpoint: the layers are read, calibrated and rounded one after the other.

Memory: one layer twice in float32, the vision encoder and the abstractor, the hidden states of the
samples twice in float32, the statistics of the widest Linear, and the rounded weights.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import UNQUANTIZED, Owl2QuantizationConfig
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.quantized_weights import round_to_nearest
from owl2.checkpoints.weight_files import COMPUTED_KEYS
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.engine.backends.weight_only_quantization import GROUP, pack
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.progress import ProgressReporter
from owl2.quantization.calibrate import calibrate_layers, first_hidden
from owl2.quantization.calibration_data import Inputs
from owl2.quantization.gptq import InputStatistics, gptq

Packed = tuple[torch.Tensor, torch.Tensor]  # `weight` and `scale` of a QuantizedLinear


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
        count, config.num_hidden_layers = config.num_hidden_layers, 1
        model = _FirstLayer.from_pretrained(self.source, config=config, dtype=torch.float32)
        samples = [first_hidden(model.model, inputs) for inputs in self.inputs()]
        layer = model.model.layers[0]
        del model  # the vision encoder
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
    width = weight.shape[1]
    padding = -width % GROUP
    group = width + padding if bits == 8 else GROUP
    values, scale = gptq(F.pad(weight, (0, padding)), statistics.padded(padding), bits, group)
    rounded = values * scale.repeat_interleave(group, 1)
    return pack(values, scale, bits), rounded[:, :width]
