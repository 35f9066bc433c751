"""The options of `owl2 quantize`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from owl2.checkpoints.hf_quantizer import UNQUANTIZED, Owl2QuantizationConfig
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.stored_weights import open_weights
from owl2.checkpoints.weight_names import EMBEDDINGS, HEAD, released_name
from owl2.engine.backends.weight_only_quantization import GROUP
from owl2.errors import ErrorCode, InputError
from owl2.processing.processor import Owl2Processor
from owl2.quantization.calibrated_weights import CalibratedWeights
from owl2.quantization.calibration_data import PYTHON_REFERENCE, calibration_inputs
from owl2.quantization.quantize_checkpoint import write_quantized
from owl2.registry import look_up

METHODS = {"rtn": "round to nearest", "gptq": "GPTQ with calibration samples"}


@dataclass(frozen=True)
class Calibration:
    """The calibration samples of GPTQ; see `calibration_inputs`."""

    sources: Sequence[str] = (PYTHON_REFERENCE,)
    num_samples: int = 128
    max_length: int = 512

    @property
    def num_tokens(self) -> int:
        """The largest possible number of tokens."""
        return self.num_samples * self.max_length


def quantize(
    model: str | Path,
    output: str | Path,
    bits: int = 4,
    *,
    method: str = "rtn",
    modules_8bit: Iterable[str] = (),
    share_embeddings: bool = False,
    calibration: Calibration | None = None,
    console: Console | None = None,
) -> Path:
    """Write a quantized checkpoint.

    Args:
        model: A directory or a hub id.
        output: A directory that does not exist yet.
        bits: 4 or 8.
        method: One of `METHODS`.
        modules_8bit: Linears with 8 bits, see `matching_modules`.
        share_embeddings: Store the embeddings of a tied model once, as its head with 8 bits.
        calibration: For GPTQ; default: the built-in text.

    Returns:
        `output`.

    Raises:
        InputError: An unknown method or pattern; calibration samples without GPTQ; see
            `quantize_checkpoint` and `calibration_inputs`.
    """
    look_up("method", method, METHODS)
    if calibration is not None and method != "gptq":
        raise InputError("calibration data needs method=gptq", ErrorCode.CONFLICT)
    console = console or Console(quiet=True)
    config = Owl2QuantizationConfig(bits, method=method)
    source, reader, _ = open_weights(model)
    for pattern in modules_8bit:
        config.modules |= dict.fromkeys(matching_modules(reader, config, pattern), 8)
    if share_embeddings:
        config.modules |= {EMBEDDINGS: 8, HEAD: 8}
    if method == "rtn":
        write_quantized(source, reader, output, config)
    else:
        options = calibration or Calibration()
        processor = Owl2Processor.from_pretrained(source)
        inputs = partial(
            calibration_inputs,
            options.sources,
            processor,
            options.num_samples,
            options.max_length,
        )
        weights = CalibratedWeights(source, reader, config, inputs, console)
        write_quantized(source, reader, output, config, weights)
        if weights.uncalibrated:
            console.print(
                f"{len(weights.uncalibrated)} Linears received no calibration token and are "
                "rounded without calibration. Add samples with images (--calibration)."
            )
    console.print(f"{average_bits(reader, config):.2f} bits per weight of decoder and head")
    return Path(output)


def matching_modules(
    reader: WeightReader, config: Owl2QuantizationConfig, pattern: str
) -> list[str]:
    """The quantized Linears whose released name contains a pattern, such as ``down_proj``.

    A pattern consists of complete parts between dots: ``layers.1`` is not part of ``layers.11``.

    Raises:
        InputError: There is none.
    """
    found = [name for name in _quantized(reader, config) if f".{pattern}." in f".{name}."]
    if not found:
        raise InputError(
            f"no quantized module has {pattern!r} in its name; examples are down_proj and layers.0",
            ErrorCode.UNKNOWN_NAME,
        )
    return found


def average_bits(reader: WeightReader, config: Owl2QuantizationConfig) -> float:
    """Bits per weight of all quantized Linears, including scales and shifts, 32 bits together."""
    bits = weights = 0
    for name, (rows, columns) in _quantized(reader, config).items():
        own = config.bits_of(name)
        scales = rows if own == 8 else rows * -(-columns // GROUP)
        bits += own * rows * columns + 32 * scales
        weights += rows * columns
    return bits / weights


def _quantized(reader: WeightReader, config: Owl2QuantizationConfig) -> dict[str, tuple[int, int]]:
    """The shapes of the quantized Linears by their released names."""
    named = {
        released_name(name).removesuffix(".weight"): tensor.shape
        for name, tensor in reader.tensors.items()
        if tensor.dim() == 2
    }
    named.setdefault(HEAD, named[EMBEDDINGS])  # tied
    return {
        name: (shape[0], shape[1])
        for name, shape in named.items()
        if config.bits_of(name) < UNQUANTIZED and name != EMBEDDINGS
    }
