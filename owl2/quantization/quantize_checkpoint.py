"""`owl2 quantize`: a quantized checkpoint from a checkpoint, one weight at a time.

    weight files ──► one weight ──► 4 or 8 bits ──► model-00001-of-0000N.safetensors, ...
    config.json  ──► with ``quantization_config``
    tokenizer, processor, generation_config.json ──► copies

The memory is that of the largest weight file, which is memory-mapped, and of one new file.
The format is described in docs/reference/quantized-checkpoints.md.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from owl2.checkpoints.config_file import CONFIG_FILE, read_json
from owl2.checkpoints.hf_quantizer import UNQUANTIZED, Owl2QuantizationConfig
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.load_memory import BUFFERS, loaded_size
from owl2.checkpoints.quantized_weights import QuantizeWeight, quantized_weights, round_to_nearest
from owl2.checkpoints.stored_weights import (
    MAX_SHARD_SIZE,
    copy_small_files,
    open_weights,
    write_weights,
)
from owl2.checkpoints.weight_files import fingerprint, weight_files
from owl2.checkpoints.weight_names import HEAD
from owl2.errors import ErrorCode, InputError, error_prefix
from owl2.files import atomic_directory, atomic_write_json, require_new
from owl2.memory import require_memory


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    config: Owl2QuantizationConfig | None = None,
    quantize_weight: QuantizeWeight = round_to_nearest,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write a quantized checkpoint, which `from_pretrained` loads.

    Args:
        model: A directory or a hub id with a checkpoint in the released layout.
        output: A directory that does not exist yet.
        config: The bits; default: 4. Its `base_fingerprint` is set.
        quantize_weight: Quantizes a weight; default: rounds to the nearest value.

    Returns:
        `output`.

    Raises:
        InputError: `model` is an adapter, already quantized, has values that are not finite, or
            does not have the weights of its configuration or the tied embeddings that `config`
            needs; `output` exists or cannot be written.
    """
    source, reader, _ = open_weights(model)
    config = config or Owl2QuantizationConfig()
    write_quantized(source, reader, output, config, quantize_weight, max_shard_size)
    return Path(output)


def write_quantized(
    source: Path,
    reader: WeightReader,
    output: str | Path,
    config: Owl2QuantizationConfig,
    quantize_weight: QuantizeWeight = round_to_nearest,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """`quantize_checkpoint` of a directory and its weights, both from `open_weights`.

    Raises:
        InputError: `output` exists or cannot be written, values are not finite, the embeddings are
            not tied although `config` needs it, or the memory is too small.
    """
    require_new(output)
    config.base_fingerprint = fingerprint(source)
    needed = quantization_memory(reader.tensors, config, max_shard_size)
    file_size = max(file.stat().st_size for file in weight_files(source))
    require_memory(f"Quantizing {source}", needed, file_size)
    with error_prefix(f"{source}: "):
        weights = quantized_weights(reader, config, partial(_quantize_finite, quantize_weight))
    with atomic_directory(output) as directory:
        write_weights(weights, directory, max_shard_size)
        copy_small_files(source, directory)
        values = read_json(source / CONFIG_FILE)
        values.pop("auto_map", None)  # the authors' code cannot read the weights
        values["quantization_config"] = config.to_dict()
        if config.bits_of(HEAD) < UNQUANTIZED:  # the embeddings are not quantized
            values["tie_word_embeddings"] = False
        atomic_write_json(directory / CONFIG_FILE, values)


def _quantize_finite(
    quantize_weight: QuantizeWeight, name: str, weight: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_weight(name, weight, bits)
    if not scale.isfinite().all():
        raise InputError(
            f"{name}.weight cannot be quantized: it contains NaN or infinite values",
            ErrorCode.NON_FINITE,
        )
    return values, scale


def quantization_memory(
    tensors: Mapping[str, torch.Tensor],
    config: Owl2QuantizationConfig,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> int:
    """The bytes that `quantize_checkpoint` needs when it rounds to nearest.

    The largest weight file is mapped in addition.

    Args:
        tensors: The stored tensors by name, on the meta device.
    """
    largest = max(tensor.nbytes for tensor in tensors.values())
    return 2 * min(max_shard_size, loaded_size(tensors, None, config)) + largest + BUFFERS
