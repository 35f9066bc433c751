"""A model for answering: on which device, in which dtype, and read."""

from pathlib import Path
from typing import Any

import torch

from owl2.checkpoints.quantization import quantization
from owl2.engine.backends.weight_only_quantization import quantise, require_bits
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.runtime import has_bfloat16, keep_memory

DEVICES = ("cuda", "mps", "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else the fastest there is: cuda, mps, cpu.

    Raises:
        InputError: for a device that torch does not know, or that this machine does not have.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device {str(device)!r} is none that torch knows: try {', '.join(DEVICES)}"
        ) from error
    if chosen.type not in DEVICES:
        raise InputError(f"device {str(device)!r} cannot be used: try {', '.join(DEVICES)}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(chosen.type, True):
        raise InputError(f"device {str(device)!r} cannot be used: torch finds none on this machine")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r}: there are {torch.cuda.device_count()} of them")
    return chosen


def choose_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The dtype asked for (a name or a torch dtype), else what suits the device.

    Raises:
        InputError: for a name that is none of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        # bfloat16 has float32's range, so nothing overflows. GPUs before Ampere only emulate it,
        # slowly: there float16, as the released checkpoint was run by its authors.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float16  # every macOS with MPS has it; bfloat16 only the later ones
    # Other CPUs compute 16-bit numbers by way of 32 bits, more slowly.
    return torch.bfloat16 if has_bfloat16() else torch.float32


def load_model(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> Owl2ForConditionalGeneration:
    """A checkpoint's model, ready to answer.

    Args:
        quantize: 8bit or 4bit: the decoder's weights in fewer bits: on a CPU by `quantised`, on a
            GPU by bitsandbytes.

    Raises:
        InputError: no such checkpoint, device, dtype or attention implementation.
    """
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_memory()
    if quantize is not None:
        require_bits(quantize)
    options: dict[str, Any] = {"dtype": choose_dtype(chosen, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None and chosen.type == "cuda":
        options["quantization_config"] = quantization(quantize, options["dtype"])
        options["device_map"] = {"": chosen}  # it stays where it is loaded
    try:
        model = Owl2ForConditionalGeneration.from_pretrained(name_or_path, **options)
    except (ImportError, ValueError) as error:  # flash_attention_2 not installed, or no such name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name_or_path} cannot be loaded: {error}") from error
    if "quantization_config" in options:
        return model.eval()
    if quantize is not None:
        quantise(model, quantize)
    try:
        return model.to(chosen).eval()
    except RuntimeError as error:  # no driver, or too little memory
        raise InputError(f"the model cannot be put on device {str(chosen)!r}: {error}") from error
