"""The memory that the weights of a checkpoint take when they are loaded, from their headers."""

from collections.abc import Mapping

import torch

from owl2.checkpoints.hf_quantizer import (
    UNQUANTIZED,
    Owl2QuantizationConfig,
    is_visual_linear,
)
from owl2.checkpoints.quantized_weights import bits_of_weight
from owl2.engine.backends.weight_only_quantization import BITS, quantize_linear
from owl2.memory import format_size, require_memory

BUFFERS = 200_000_000  # bytes, of the temporary tensors while a weight is quantized
SCALE = ".scale"


def loaded_size(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    config: Owl2QuantizationConfig | None = None,
) -> int:
    """The bytes of a model's weights after loading.

    Args:
        tensors: The stored tensors by name, on the meta device; they may be quantized.
        dtype: Of the floating-point weights; None: as stored.
        config: Quantizes them while they are loaded.
    """
    total = 0.0
    is_quantized = config is not None or any(not t.is_floating_point() for t in tensors.values())
    for name, tensor in tensors.items():
        bits = UNQUANTIZED if config is None else bits_of_weight(name, tensor, config)
        if bits < UNQUANTIZED:
            packed = quantize_linear(tensor, bits)
            total += sum(part.nbytes for part in packed)
        elif dtype is None or not tensor.is_floating_point() or name.endswith(SCALE):
            total += tensor.nbytes
        else:
            keeps_dtype = is_quantized and is_visual_linear(name, tensor)
            size = min(dtype.itemsize, tensor.itemsize) if keeps_dtype else dtype.itemsize
            total += tensor.numel() * size
    return int(total)


def require_load_memory(
    source: str,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, int],
    dtype: torch.dtype | None,
    config: Owl2QuantizationConfig | None,
) -> None:
    """Check before weights are read that they fit into memory.

    Args:
        source: The checkpoint, for the message.
        files: The sizes of the weight files in bytes.

    Raises:
        InputError: See `owl2.memory.require_memory`.
    """
    needed = loaded_size(tensors, dtype, config)
    if config is not None:
        needed, mapped = needed + BUFFERS, max(files.values(), default=0)
    else:  # weights with the stored dtype remain in the mapped files
        changed = {n: t for n, t in tensors.items() if t.is_floating_point() and t.dtype != dtype}
        copies = 0 if dtype is None else loaded_size(changed, dtype)
        mapped = max(0, sum(files.values()) + copies - needed)
    is_stored = any(not tensor.is_floating_point() for tensor in tensors.values())
    advice = "Free memory, or use a machine with more."
    if not is_stored and (config is None or config.bits == 8):
        size = loaded_size(tensors, dtype, Owl2QuantizationConfig(BITS["4bit"])) + BUFFERS
        advice = (
            f"With --quantize 4bit it needs {format_size(size)}; `owl2 quantize` writes such a "
            "checkpoint, which also loads faster."
        )
    require_memory(f"Loading {source}", needed, mapped, advice)
